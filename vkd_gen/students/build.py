"""A smaller UNet's configuration from the teacher's.

A reduction is a rule, not a table: it reads the teacher's configuration, so one `Reduction` means the same for any
`UNet2DModel` or `UNet2DConditionModel`. What diffusers' classes cannot express is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import ModelMixin

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
    "CrossAttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
}


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What a student has less of than its teacher.

    Attributes:
        width: factor on every stage's channels, above 0; rounded up to what group norms and attention heads need.
        layers_per_block: residual layers of each block; one number, or (`UNet2DConditionModel` alone) one for each of
            the stages that are kept. None keeps the teacher's.
        drop_stages: stages to leave out, 0 being the one of the highest resolution and -1 the lowest.
        drop_mid_block: leave out the middle block.
        drop_attention: stages of the teacher to take the attention layers out of.
    """

    width: float = 1.0
    layers_per_block: int | tuple[int, ...] | None = None
    drop_stages: tuple[int, ...] = ()
    drop_mid_block: bool = False
    drop_attention: tuple[int, ...] = ()


REDUCTIONS = {
    # Kim et al., 2023, arXiv 2305.15798: one layer fewer in each block; no middle; no lowest stage.
    "bk-base": Reduction(layers_per_block=1),
    "bk-small": Reduction(layers_per_block=1, drop_mid_block=True),
    "bk-tiny": Reduction(layers_per_block=1, drop_mid_block=True, drop_stages=(-1,)),
}
"""Published students by name; for Stable Diffusion 1 and 2 they have the published numbers of parameters."""


def build_student(
    teacher: ModelMixin, reduction: Reduction | None = None, *, width: float = 1.0, layers_per_block: int | None = None
) -> ModelMixin:
    """A student of the teacher's class with random weights.

    Args:
        teacher: a diffusers `UNet2DModel` or `UNet2DConditionModel`; only its configuration is read.
        reduction: what to reduce, such as one of `REDUCTIONS`.
        width: of the reduction, where none is given.
        layers_per_block: of the reduction, where none is given.

    Returns:
        A UNet whose configuration `from_config` and `save_pretrained` take unchanged.

    Raises:
        ValueError: for what is out of range or cannot be expressed.
    """
    reduction = reduction or Reduction(width=width, layers_per_block=layers_per_block)
    return type(teacher).from_config(reduce_config(teacher.config, reduction))


def reduce_config(config: Mapping[str, Any], reduction: Reduction) -> dict[str, Any]:
    """The student's configuration; see `build_student`."""
    # diffusers' private notes say, for one, which entries to reset to their defaults.
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    is_condition_model = "cross_attention_dim" in config  # a UNet2DConditionModel
    num_stages = len(config["block_out_channels"])
    _drop_attention(config, _stage_numbers(reduction.drop_attention, num_stages))
    dropped = _stage_numbers(reduction.drop_stages, num_stages)
    if len(dropped) == num_stages:
        raise ValueError("a student needs at least one stage; drop_stages names all of them")
    _drop_stages(config, dropped)
    _set_layers_per_block(config, reduction.layers_per_block, per_stage=is_condition_model)
    if reduction.drop_mid_block:
        config["mid_block_type"] = None
    _set_width(config, reduction.width)
    return config


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
                raise ValueError(f"{blocks[position]} (position {position} of {entry}) has no attention to drop")
            blocks[position] = WITHOUT_ATTENTION[blocks[position]]
        config[entry] = tuple(blocks)


def _drop_stages(config: dict[str, Any], stages: set[int]) -> None:
    if not stages:
        return
    num_stages = len(config["block_out_channels"])
    for entry in ("block_out_channels", "down_block_types", *PER_STAGE):
        values = config.get(entry)
        if isinstance(values, list | tuple) and len(values) == num_stages:
            config[entry] = tuple(value for stage, value in enumerate(values) if stage not in stages)
    config["up_block_types"] = tuple(
        value for position, value in enumerate(config["up_block_types"]) if num_stages - 1 - position not in stages
    )
    if config.get("reverse_transformer_layers_per_block") is not None:
        raise ValueError("stages of a UNet with reverse_transformer_layers_per_block cannot be dropped")


def _set_layers_per_block(config: dict[str, Any], layers: int | tuple[int, ...] | None, *, per_stage: bool) -> None:
    if layers is None:
        return
    counts = [layers] if isinstance(layers, int) else list(layers)
    if not counts or any(count < 1 for count in counts):
        raise ValueError(f"layers_per_block must be at least 1, not {layers}")
    num_stages = len(config["block_out_channels"])
    if not isinstance(layers, int) and not per_stage:
        raise ValueError(
            "UNet2DModel takes one layers_per_block for all stages; only UNet2DConditionModel one for each"
        )
    if not isinstance(layers, int) and len(counts) != num_stages:
        raise ValueError(f"layers_per_block names {len(counts)} stages; the student has {num_stages}")
    config["layers_per_block"] = layers


def _set_width(config: dict[str, Any], width: float) -> None:
    if not 0 < width < math.inf:
        raise ValueError(f"width must be above 0 and finite, not {width}")
    if width == 1:
        return
    teacher_channels = config["block_out_channels"]
    groups = config["norm_num_groups"] or 1
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
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
    channels = [
        multiple * math.ceil(count * width / multiple)
        for count, multiple in zip(teacher_channels, multiples, strict=True)
    ]
    if width < 1:  # a teacher whose heads do not divide its channels is not widened
        channels = [min(pair) for pair in zip(channels, teacher_channels, strict=True)]
    config["block_out_channels"] = tuple(channels)
    if "cross_attention_dim" in config and not isinstance(heads, int):
        entry = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        config[entry] = tuple(count // size for count, size in zip(channels, sizes, strict=True))
