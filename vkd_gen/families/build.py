"""A smaller network's configuration from the teacher's; of a transformer see blocks.py.

A reduction is a rule, not a table: it reads the teacher's configuration, so one `Reduction` means the same for any
`UNet2DModel` or `UNet2DConditionModel`. What diffusers' classes cannot express is refused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DConditionModel

from vkd_gen.families.blocks import reduce_blocks
from vkd_gen.families.classes import complete_config, network_class
from vkd_gen.families.unet import bare_unet
from vkd_gen.features import bare
from vkd_gen.reductions import Reduction

PER_STAGE = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)
"""Configuration entries that may hold one value for each stage, from the highest resolution to the lowest."""

WITHOUT_ATTENTION = {
    "AttnDownBlock2D": "DownBlock2D",
    "AttnUpBlock2D": "UpBlock2D",
    "AttnSkipDownBlock2D": "SkipDownBlock2D",
    "AttnSkipUpBlock2D": "SkipUpBlock2D",
    "CrossAttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
    "SimpleCrossAttnDownBlock2D": "ResnetDownsampleBlock2D",
    "SimpleCrossAttnUpBlock2D": "ResnetUpsampleBlock2D",
}


def build_student(
    teacher: ModelMixin | Mapping[str, Any],
    reduction: Reduction | None = None,
    *,
    width: float = 1.0,
    layers_per_block: int | None = None,
) -> ModelMixin:
    """A student of the teacher's class with random weights.

    Args:
        teacher: a diffusers `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel`, of which only the
            configuration is read, or the configuration of one, as its config.json holds it.
        reduction: what to reduce, such as one of `REDUCTIONS`.
        width: of the reduction, where none is given.
        layers_per_block: of the reduction, where none is given.

    Raises:
        ValueError: for what is out of range or cannot be expressed, and a teacher in a wrapper.
    """
    if reduction is None:
        reduction = Reduction(width=width, layers_per_block=layers_per_block)
    elif (width, layers_per_block) != (1.0, None):
        raise ValueError("a student is given by a reduction, or by width and layers_per_block, not by both")
    if isinstance(teacher, Mapping):
        return network_class(teacher).from_config(reduce_config(teacher, reduction))
    kind = type(teacher) if isinstance(bare(teacher), DiTTransformer2DModel) else type(bare_unet(teacher))
    return kind.from_config(reduce_config(teacher.config, reduction))


def reduce_config(config: Mapping[str, Any], reduction: Reduction) -> dict[str, Any]:
    """The student's configuration, complete; see `build_student`."""
    if network_class(config) is DiTTransformer2DModel:
        return reduce_blocks(config, reduction)
    if reduction.blocks is not None:
        raise ValueError("a UNet's student has fewer layers or stages; blocks is of transformers")
    is_condition_model = network_class(config) is UNet2DConditionModel
    # diffusers' private notes, left out here, say, for one, which entries to reset to their defaults.
    config = complete_config(config)
    num_stages = len(config["block_out_channels"])
    _drop_attention(config, _stage_numbers(reduction.drop_attention, num_stages))
    _drop_stages(config, kept_stages(num_stages, reduction), reduction.transformer_layers)
    _set_layers_per_block(config, reduction.layers_per_block, per_stage=is_condition_model)
    _set_transformer_layers(config, reduction, is_condition_model)
    if reduction.drop_mid_block:
        config["mid_block_type"] = None
    _set_width(config, reduction.width)
    return config


def kept_stages(num_stages: int, reduction: Reduction) -> tuple[int, ...]:
    """The teacher's stage that each of the student's stages is made from, from the highest resolution to the lowest.

    Stage `s` is block `s` of the encoder and block `num_stages - 1 - s` of the decoder.

    Args:
        num_stages: of the teacher.
        reduction: that the student is made by.

    Raises:
        ValueError: if a dropped stage is unknown, or none is left.

    Example:
        >>> kept_stages(4, Reduction(drop_stages=(1, -1)))
        (0, 2)
    """
    dropped = _stage_numbers(reduction.drop_stages, num_stages)
    if len(dropped) == num_stages:
        raise ValueError("a student needs at least one stage; drop_stages names all of them")
    return tuple(stage for stage in range(num_stages) if stage not in dropped)


def _stage_numbers(stages: Sequence[int], num_stages: int) -> set[int]:
    unknown = [stage for stage in stages if not -num_stages <= stage < num_stages]
    if unknown:
        raise ValueError(f"there is no stage {unknown[0]}; the teacher's are 0 to {num_stages - 1}, or -1 for the last")
    return {stage % num_stages for stage in stages}


def _drop_attention(config: dict[str, Any], stages: set[int]) -> None:
    num_stages = len(config["block_out_channels"])
    for entry, positions in (
        ("down_block_types", stages),
        ("up_block_types", {num_stages - 1 - stage for stage in stages}),
    ):
        blocks = list(config[entry])
        for position in positions:
            if blocks[position] not in WITHOUT_ATTENTION:
                reason = "cannot be had without its" if "Attn" in blocks[position] else "has no"
                raise ValueError(f"{blocks[position]} (position {position} of {entry}) {reason} attention to drop")
            blocks[position] = WITHOUT_ATTENTION[blocks[position]]
        config[entry] = tuple(blocks)


def _drop_stages(config: dict[str, Any], kept: Sequence[int], transformer_layers: int | tuple | None) -> None:
    num_stages = len(config["block_out_channels"])
    if len(kept) == num_stages:
        return
    for entry in ("block_out_channels", "down_block_types", *PER_STAGE):
        values = config.get(entry)
        if isinstance(values, list | tuple) and len(values) == num_stages:
            config[entry] = tuple(values[stage] for stage in kept)
    config["up_block_types"] = tuple(config["up_block_types"][num_stages - 1 - stage] for stage in reversed(kept))
    if config.get("reverse_transformer_layers_per_block") is not None and transformer_layers is None:
        raise ValueError(
            "stages of a UNet with reverse_transformer_layers_per_block can only be dropped with transformer_layers"
        )


def _set_layers_per_block(config: dict[str, Any], layers: int | tuple[int, ...] | None, *, per_stage: bool) -> None:
    if layers is None:
        return
    _check_layers("layers_per_block", layers, len(config["block_out_channels"]))
    if not isinstance(layers, int) and not per_stage:
        raise ValueError(
            "UNet2DModel takes one layers_per_block for all stages; only UNet2DConditionModel one for each"
        )
    config["layers_per_block"] = layers


def _set_transformer_layers(config: dict[str, Any], reduction: Reduction, is_condition_model: bool) -> None:
    layers = reduction.transformer_layers
    if layers is not None:
        if not is_condition_model:
            raise ValueError(
                "UNet2DModel has no transformer layers; only UNet2DConditionModel takes transformer_layers"
            )
        _check_layers("transformer_layers", layers, len(config["block_out_channels"]))
        config["transformer_layers_per_block"] = layers
        config["reverse_transformer_layers_per_block"] = None
    elif is_condition_model and reduction.layers_per_block is not None:
        depths = config["transformer_layers_per_block"]
        if not isinstance(depths, int) and not all(isinstance(depth, int) for depth in depths):
            raise ValueError(
                "the teacher gives each of its layers a number of transformer layers of its own; with layers_per_block "
                "set transformer_layers too"
            )


def _check_layers(name: str, layers: int | tuple[int, ...], num_stages: int) -> None:
    counts = [layers] if isinstance(layers, int) else list(layers)
    if not counts or any(count < 1 for count in counts):
        raise ValueError(f"{name} must be at least 1, not {layers}")
    if not isinstance(layers, int) and len(counts) != num_stages:
        raise ValueError(f"{name} names {len(counts)} stages; the student has {num_stages}")


def _set_width(config: dict[str, Any], width: float) -> None:
    if not 0 < width * max(config["block_out_channels"]) < math.inf:
        raise ValueError(f"width must be above 0 and finite, not {width}")
    if width == 1:
        return
    teacher_channels = config["block_out_channels"]
    groups = config["norm_num_groups"] or 1
    heads = config["attention_head_dim"]
    if "cross_attention_dim" in config:
        # Here attention_head_dim counts heads. Where each stage has its own count, the channels of a head are kept.
        if isinstance(heads, int):
            multiples = [math.lcm(groups, heads)] * len(teacher_channels)
        else:
            sizes = [channels // count for channels, count in zip(teacher_channels, heads, strict=True)]
            multiples = [math.lcm(groups, size) for size in sizes]
    else:
        blocks = (*config["down_block_types"], *config["up_block_types"])
        has_attention = config["add_attention"] or any("Attn" in block for block in blocks)
        multiples = [math.lcm(groups, (heads or 1) if has_attention else 1)] * len(teacher_channels)
        multiples[-1] = math.lcm(multiples[-1], config["attn_norm_num_groups"] or 1)  # of the middle's attention
    # The first stage's channels are also those of the timestep's sines and cosines, half of them each.
    multiples[0] = math.lcm(multiples[0], 2)
    least = [2 * (config["freq_shift"] + 1), *[1] * (len(teacher_channels) - 1)]
    channels = [
        multiple * math.ceil(max(count * width, minimum) / multiple)
        for count, multiple, minimum in zip(teacher_channels, multiples, least, strict=True)
    ]
    if width < 1:  # a teacher whose heads do not divide its channels is not widened
        channels = [min(pair) for pair in zip(channels, teacher_channels, strict=True)]
    config["block_out_channels"] = tuple(channels)
    if "cross_attention_dim" in config and not isinstance(heads, int):
        config["attention_head_dim"] = tuple(count // size for count, size in zip(channels, sizes, strict=True))
