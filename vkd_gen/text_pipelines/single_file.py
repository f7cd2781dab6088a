"""Checkpoints of Stable Diffusion in one safetensors file, by the names of its authors' own code.

diffusers renames the weights; what comes out is checked by name and shape like any others.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from vkd_gen.loading import check_file, read_tensors, stored_layout

PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""What the names of a part's weights begin with."""


def configurations_of(path: Path) -> str:
    """The id of the pipeline whose configuration a checkpoint has, as diffusers knows it by names and shapes.

    Raises:
        ValueError: in one line: not a safetensors file, or no checkpoint of this kind.
    """
    layout = _layout(path)
    shapes = {name: torch.empty(shape, device="meta") for name, (shape, _) in layout.items()}
    return single_file_utils.fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def _layout(path: Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    check_file(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file; pickles can run code when loaded and are not: convert it once, or name "
            "the folder of a diffusers pipeline"
        )
    try:
        layout = stored_layout([path])
    except Exception as error:  # safetensors' own
        raise ValueError(f"cannot read {path}: it is no safetensors file ({str(error)[:80]})") from error
    if not any(name.startswith(PREFIXES["unet"]) for name in layout):
        raise ValueError(
            f"{path} holds no original checkpoint of Stable Diffusion: none of its weights is named "
            f"{PREFIXES['unet'][0]}...; of a diffusers pipeline name the folder; a LoRA is merged into a teacher by "
            "train_student_unet.py's --teacher_lora"
        )
    return layout


def check_checkpoint_file(path: Path, part: str) -> None:
    """Refuse a checkpoint that holds nothing of a part, by its header alone.

    Raises:
        ValueError: in one line.
    """
    if not any(name.startswith(PREFIXES[part]) for name in _layout(path)):
        raise ValueError(f"{path} holds no {part}: none of its weights is named {' or '.join(PREFIXES[part])}...")


def part_of_file(path: Path, part: str, model: Any) -> dict[str, Tensor]:
    """The weights of a part, by the names that diffusers or transformers has for them.

    Args:
        path: of the checkpoint.
        part: one of `PREFIXES`.
        model: that they are for, on the meta device.

    Raises:
        ValueError: in one line, for weights that cannot be renamed.
    """
    tensors = read_tensors(path, PREFIXES[part])
    try:
        match part:
            case "unet":
                return single_file_utils.convert_ldm_unet_checkpoint(tensors, dict(model.config))
            case "vae":
                return single_file_utils.convert_ldm_vae_checkpoint(tensors, dict(model.config))
        open_clip = next((prefix for prefix in OPEN_CLIP if any(name.startswith(prefix) for name in tensors)), None)
        if open_clip is None:
            return single_file_utils.convert_ldm_clip_checkpoint(tensors)
        found = single_file_utils.convert_open_clip_checkpoint(model, tensors, prefix=open_clip)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the {part} in {path} is not laid out as its configuration says: {type(error).__name__} at "
            f"{str(error)[:100]}; train_student_unet.py takes the right one by --teacher_config"
        ) from error
    if "text_projection.weight" not in model.state_dict():
        found.pop("text_projection.weight", None)  # which Stable Diffusion 2 stores and does not use
    return found


OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
"""What the names of text encoders by OpenCLIP begin with."""
