"""LoRA merged into a pipeline's weights: afterwards it is a pipeline like any other."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from vkd_gen.hub import hub_folder, split_revision
from vkd_gen.loading import read_tensors
from vkd_gen.text import reason

FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA in a folder or on the hub."""

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Parts that a LoRA may change."""


def merge_lora(pipeline: DiffusionPipeline, source: str) -> None:
    """Add a LoRA to the weights of the parts that are loaded.

    Args:
        pipeline: of Stable Diffusion, in float32; parts that are None are passed over.
        source: safetensors file, folder or hub id with `pytorch_lora_weights.safetensors`; with `=SCALE` behind it the
            change is multiplied by that.

    Raises:
        ValueError: in one line: nothing there, no LoRA, one of another model, or peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError("merging a LoRA needs peft: pip install 'vkd-gen[text]'") from error
    _, scale = _split_scale(source)
    file = find_lora(source)
    try:
        tensors = read_tensors(file)
        state, alphas = pipeline.lora_state_dict(tensors, unet_config=getattr(pipeline.unet, "config", None))
    except Exception as error:  # diffusers knows many formats, and refuses others in all kinds of ways
        raise ValueError(f"the LoRA {source} cannot be read: {reason(error, 300)}") from error
    by_part = {part: {name: value for name, value in state.items() if name.startswith(f"{part}.")} for part in PARTS}
    if not any(by_part.values()):
        raise ValueError(f"{file} holds no LoRA of Stable Diffusion: none of its weights is named as one's are")
    for part, own in by_part.items():
        model = getattr(pipeline, part, None)
        if own and part not in pipeline.components:
            raise ValueError(f"the LoRA {source} is of another model: this one has no {part}")
        if own and model is not None:
            _merge(pipeline, part, own, alphas, scale, source)


def _merge(
    pipeline: DiffusionPipeline, part: str, state: dict[str, Tensor], alphas: Any, scale: float, source: str
) -> None:
    """Merge what a LoRA has for one part, once every one of its layers is there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, adapter = getattr(pipeline, part), "merged"
    names = {name.split(".lora")[0].rsplit(".processor", 1)[0] for name in state}
    try:
        if part == "unet":
            pipeline.load_lora_into_unet(state, alphas, model, adapter_name=adapter)
        else:
            pipeline.load_lora_into_text_encoder(state, alphas, model, prefix=part, adapter_name=adapter)
    except Exception as error:  # shapes that do not fit, and layers that are not there, each have an error of their own
        raise ValueError(f"the LoRA {source} is of another model: in {part}, {reason(error, 200)}") from error
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"the LoRA {source} is of another model: none of its {len(names)} layers is in {part}")
    pipeline.fuse_lora(components=[part], lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()


def _split_scale(source: str) -> tuple[str, float]:
    path, sign, scale = source.rpartition("=")
    if not sign or Path(source).exists():
        return source, 1.0
    try:
        return path, float(scale)
    except ValueError as error:
        raise ValueError(f"--teacher_lora {source}: behind the = stands a number, such as 0.8") from error


def find_lora(source: str) -> Path:
    """The file of a LoRA, in which the hub's is downloaded.

    Raises:
        ValueError: in one line: nothing there, or no safetensors.
    """
    source, _ = _split_scale(source)
    path = Path(source)
    if path.is_dir():
        path = path / FILE
    elif (
        not path.exists() and path.suffix == "" and split_revision(source)[0].count("/") == 1 and source[0] not in "./~"
    ):
        try:
            path = hub_folder(source, [FILE]) / FILE
        except ValueError as error:
            raise ValueError(f"there is no LoRA {source}, and the hub did not give it: {error}") from error
    if not path.is_file():
        raise ValueError(f"there is no LoRA {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"the LoRA {path} is no .safetensors file; pickles can run code when loaded and are not")
    return path
