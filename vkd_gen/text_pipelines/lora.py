"""LoRA merged into a pipeline's weights: afterwards it is a pipeline like any other.

diffusers renames the layers of the many formats there are; the sum is taken here, since transformers refuses
versions of peft that diffusers takes.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from vkd_gen.hub import hub_folder, split_revision
from vkd_gen.loading import read_tensors
from vkd_gen.text import reason

FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA in a folder or on the hub."""

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Parts that a LoRA may change."""

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""What the names of a layer's two matrices end with, once renamed."""


@torch.no_grad()
def merge_lora(pipeline: DiffusionPipeline, source: str) -> None:
    """Add a LoRA to the weights of the parts that are loaded.

    Args:
        pipeline: of Stable Diffusion, in float32; parts that are None are passed over.
        source: safetensors file, folder or hub id with `pytorch_lora_weights.safetensors`; with `=SCALE` behind it the
            change is multiplied by that.

    Raises:
        ValueError: in one line: nothing there, no LoRA, or one of another model.
    """
    _, scale = _split_scale(source)
    file = find_lora(source)
    try:
        tensors = _without_alphas(read_tensors(file))
        with safe_open(file, framework="pt") as opened:
            settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        state, _ = pipeline.lora_state_dict(tensors, unet_config=getattr(pipeline.unet, "config", None))
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
            _merge(model, part, _renamed(own, part), scale, settings, source)


def _without_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA whose factors, which some trainers save for each layer, are multiplied into its matrices."""
    if any("dora_scale" in name or "lora_magnitude" in name for name in tensors):
        raise ValueError("it is a DoRA, whose sum depends on the weights; merge it by the tool that made it")
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer, alpha = name.removesuffix(".alpha"), float(tensors.pop(name))
        if f"{layer}.lora_up.weight" not in tensors:
            raise ValueError(f"{name} is the factor of no LoRA layer; other kinds of adapters are not known")
        up = tensors[f"{layer}.lora_up.weight"]
        tensors[f"{layer}.lora_up.weight"] = up.float() * (alpha / up.shape[1])
    return tensors


def _renamed(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Matrices by the model's own names of layers, and `DOWN` or `UP`."""
    state = {name.removeprefix(f"{part}."): value for name, value in state.items()}
    if part == "unet":
        return convert_unet_state_dict_to_peft(state)
    return convert_state_dict(state, {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT})


def _merge(
    model: nn.Module, part: str, state: Mapping[str, Tensor], scale: float, settings: Mapping[str, Any], source: str
) -> None:
    """Add a LoRA's products to a model's weights, once every one of its layers is there."""
    layers = {name.removesuffix(DOWN) for name in state if name.endswith(DOWN)}
    modules = {name.removeprefix("text_model."): module for name, module in model.named_modules()}
    places = {layer: modules.get(layer.removeprefix("text_model.")) for layer in layers}
    strange = [layer for layer, module in places.items() if not isinstance(module, nn.Linear | nn.Conv2d)]
    strange += [name for name in state if not name.endswith((DOWN, UP))]
    if strange or len(state) != 2 * len(layers):
        raise ValueError(
            f"the LoRA {source} is of another model, or no plain LoRA: {len(strange)} of its {len(state) // 2} layers "
            f"are not in {part}" + (f", such as {strange[0]}" if strange else "")
        )
    sums = {}
    for layer, module in places.items():
        down, up = state[layer + DOWN].float(), state[layer + UP].float()
        factor = scale * _factor(settings, part, layer, down.shape[0])
        change = up.flatten(1) @ down.flatten(1) if up.shape[1] == down.shape[0] else up
        if change.numel() != module.weight.numel() or len(change) != len(module.weight):  # type: ignore[union-attr]
            raise ValueError(
                f"the LoRA {source} is of another model: in {part}, {layer} maps {down.shape[1]} to {up.shape[0]} "
                f"channels, not {module.weight.shape[1]} to {module.weight.shape[0]}"  # type: ignore[union-attr]
            )
        sums[module] = factor * change.view_as(module.weight)  # type: ignore[union-attr]
    for module, change in sums.items():
        module.weight += change  # type: ignore[union-attr]


def _factor(settings: Mapping[str, Any], part: str, layer: str, rank: int) -> float:
    """What peft multiplies a layer's product by, as its settings, saved beside the matrices, say; without any 1."""
    alphas = settings.get(f"{part}.alpha_pattern") or {}
    alpha = next((value for name, value in alphas.items() if layer.endswith(name)), None)
    alpha = settings.get(f"{part}.lora_alpha", rank) if alpha is None else alpha
    return alpha / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)


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
