"""`UNet2DModel` and `UNet2DConditionModel`: how they are called, and what lies where in them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from vkd_gen.families.family import Stage, unknown
from vkd_gen.features import bare

KNOWN_CONDITIONS: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None, "timestep", "projection", "simple_projection"),
    "addition_embed_type": (None, "text", "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "dual_cross_attention": (None, False),
}
"""Entries of a configuration that say what else a UNet takes, and the values whose inputs `example` knows."""


def bare_unet(model: Any) -> Any:
    """The model itself, once it is known to be a UNet in no wrapper.

    Raises:
        ValueError: for a pipeline, a folder's name, a model of another kind, and what `bare` refuses.
    """
    if not isinstance(bare(model), UNet2DModel | UNet2DConditionModel):
        raise ValueError(unknown(model))
    return model


def call(unet: nn.Module, sample: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any] | None = None) -> Tensor:
    """The prediction `[B, C, H, W]`."""
    return unet(sample=sample, timestep=timesteps, **(conditioning or {}), return_dict=False)[0]


def stages(unet: ModelMixin) -> list[Stage]:
    """Blocks of the encoder, the middle, and blocks of the decoder."""
    layers = [f"down_blocks.{number}" for number in range(len(unet.down_blocks))]
    layers += ["mid_block"] if unet.mid_block is not None else []
    layers += [f"up_blocks.{number}" for number in range(len(unet.up_blocks))]
    return [
        Stage(
            layer,
            part=layer.split(".")[0],
            # A block resamples at its end: what it works at is the resolution of its residual layers.
            works_at=None if layer == "mid_block" else f"{layer}.resnets.0",
            self_attention=_self_attention(unet, layer),
            last_layer=_last_layer(unet, layer),
        )
        for layer in layers
    ]


def _self_attention(unet: ModelMixin, stage: str) -> tuple[str, ...]:
    """The `attn1` of a `UNet2DConditionModel`'s transformer blocks (tokens), a `UNet2DModel`'s `attentions` (maps)."""
    return tuple(
        f"{stage}.{name}"
        for name, module in unet.get_submodule(stage).named_modules()
        if isinstance(module, Attention)
        and not module.is_cross_attention
        and (name.endswith(".attn1") or re.fullmatch(r"attentions\.\d+", name))
    )


def _last_layer(unet: ModelMixin, stage: str) -> str:
    """`attentions.N.proj_out` in a `UNet2DConditionModel`, `attentions.N` in a `UNet2DModel`, `resnets.N` in both."""
    block = unet.get_submodule(stage)
    attentions = list(getattr(block, "attentions", []))  # of a middle without attention they are None
    if attentions and attentions[-1] is not None:
        layer = f"{stage}.attentions.{len(attentions) - 1}"
        return f"{layer}.proj_out" if hasattr(attentions[-1], "proj_out") else layer
    return f"{stage}.resnets.{len(block.resnets) - 1}"


def example(unet: ModelMixin) -> dict[str, Any]:
    """Arguments of the right shapes for one forward pass, batch size 1.

    Raises:
        ValueError: for a UNet without a sample size, or that takes conditions which are not known here.
    """
    _check_conditions(unet)
    config, size = unet.config, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs: dict[str, Any] = {
        "sample": torch.zeros(1, config.in_channels, height, width),
        "timestep": torch.zeros(1, dtype=torch.long),
    }
    if "cross_attention_dim" in config:
        width = config.get("encoder_hid_dim") or config.cross_attention_dim
        width = width[0] if isinstance(width, list | tuple) else width
        inputs["encoder_hidden_states"] = None if width is None else torch.zeros(1, 8, width)
    if config.class_embed_type == "timestep":
        inputs["class_labels"] = torch.zeros(1)
    elif config.class_embed_type is not None:
        inputs["class_labels"] = torch.zeros(1, config.projection_class_embeddings_input_dim)
    elif config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
    if config.get("addition_embed_type") == "text_time":
        text_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, text_width), "time_ids": torch.zeros(1, 6)}
    return inputs


def _check_conditions(unet: ModelMixin) -> None:
    config = unet.config
    for entry, known in KNOWN_CONDITIONS.items():
        if config.get(entry) not in known:
            raise ValueError(
                f"{type(unet).__name__} with {entry} {config[entry]!r} takes conditions that are not known here; known "
                f"are {', '.join(map(str, known))}"
            )
    if config.sample_size is None:
        raise ValueError(f"{type(unet).__name__} names no sample_size in its config; set one to know its shapes")
