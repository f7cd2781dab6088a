"""Published students by name, the teachers they are students of, and what their authors say they cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vkd_gen.families.build import PER_STAGE, reduce_config
from vkd_gen.families.classes import complete_config, network_class
from vkd_gen.reductions import REDUCTIONS, Reduction

STABLE_DIFFUSION = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1": STABLE_DIFFUSION,
    "stable-diffusion-2": {
        **STABLE_DIFFUSION,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "stable-diffusion-xl": {
        **STABLE_DIFFUSION,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "ddpm-cifar10-32": {
        "_class_name": "UNet2DModel",
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "dit-xl-2": {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": 32,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 1000,
    },
}
"""Configurations of well-known teachers, as the config.json of their denoisers has them: Stable Diffusion 1 (1.1 to
1.5), 2 (2.0 and 2.1 at 512 pixels; at 768 the sample_size is 96) and XL (base 0.9 and 1.0), google/ddpm-cifar10-32, and
DiT-XL/2 (at 256 pixels; at 512 the sample_size is 64)."""


@dataclass(frozen=True, kw_only=True)
class PublishedCost:
    """What the authors of a UNet say it costs.

    Attributes:
        parameters: of the UNet; to the digit where the weights are published, else as rounded in the source.
        macs: multiply-accumulates of one forward pass on one sample, as rounded in the source; None if it names none.
            Counters differ: attention's matrix products are often left out.
        source: where the numbers stand.
    """

    parameters: int
    macs: int | None = None
    source: str


NOTA = "parameters of the weights at huggingface.co/nota-ai"
KOALA = "model card huggingface.co/etri-vilab/koala-700m"
DIFF_PRUNING = "Fang et al., 2023, arXiv 2305.10924; table at github.com/VainF/Diff-Pruning"

PUBLISHED: dict[tuple[str, str | None], PublishedCost] = {
    ("stable-diffusion-1", None): PublishedCost(
        parameters=859_520_964, source="parameters of the weights of stable-diffusion-v1-5"
    ),
    ("stable-diffusion-1", "bk-base"): PublishedCost(parameters=579_384_964, source=f"{NOTA}/bk-sdm-base"),
    ("stable-diffusion-1", "bk-small"): PublishedCost(parameters=482_346_884, source=f"{NOTA}/bk-sdm-small"),
    ("stable-diffusion-1", "bk-tiny"): PublishedCost(parameters=323_384_964, source=f"{NOTA}/bk-sdm-tiny"),
    ("stable-diffusion-2", None): PublishedCost(parameters=865_000_000, source=KOALA),
    ("stable-diffusion-2", "bk-base"): PublishedCost(parameters=583_480_964, source=f"{NOTA}/bk-sdm-v2-base"),
    ("stable-diffusion-2", "bk-small"): PublishedCost(parameters=485_787_524, source=f"{NOTA}/bk-sdm-v2-small"),
    ("stable-diffusion-2", "bk-tiny"): PublishedCost(parameters=326_825_604, source=f"{NOTA}/bk-sdm-v2-tiny"),
    ("stable-diffusion-xl", None): PublishedCost(parameters=2_567_000_000, source=KOALA),
    ("stable-diffusion-xl", "koala-1b"): PublishedCost(parameters=1_161_000_000, source=KOALA),
    ("stable-diffusion-xl", "koala-700m"): PublishedCost(parameters=782_000_000, source=KOALA),
    ("stable-diffusion-xl", "ssd-1b-like"): PublishedCost(
        parameters=1_300_000_000, source="model card huggingface.co/segmind/SSD-1B; this UNet is the nearest"
    ),
    ("ddpm-cifar10-32", None): PublishedCost(parameters=35_700_000, macs=6_100_000_000, source=DIFF_PRUNING),
    ("ddpm-cifar10-32", "ddpm-20m"): PublishedCost(
        parameters=19_800_000,
        macs=3_400_000_000,
        source=f"{DIFF_PRUNING}; a pruned module, to which this UNet is the nearest",
    ),
    ("dit-xl-2", None): PublishedCost(
        parameters=749_800_000,
        source="675 M by Peebles and Xie, 2022, arXiv 2212.09748, and an embedder for each block, as in diffusers",
    ),
}
"""(teacher, student or None for the teacher itself) -> its cost; names of `TEACHERS` and `REDUCTIONS`."""

WITHOUT_COST = frozenset(
    {"sample_size", "center_input_sample", "dropout", "upcast_attention", "norm_eps", "flip_sin_to_cos", "freq_shift"}
    | {"mid_block_scale_factor", "downsample_padding"}
)
"""Entries of a configuration that change no parameter."""


def published_cost(config: Mapping[str, Any]) -> PublishedCost | None:
    """What is published about a UNet of this configuration; at another sample size than that without `macs`."""
    wanted = _structure(config)
    for (teacher, student), cost in PUBLISHED.items():
        known = {**TEACHERS[teacher], **reduce_config(TEACHERS[teacher], REDUCTIONS.get(student or "", Reduction()))}
        if _structure(known) == wanted:
            same_size = complete_config(config)["sample_size"] == known["sample_size"]
            return cost if same_size else PublishedCost(parameters=cost.parameters, source=cost.source)
    return None


def _structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters depend on, written in one way."""
    entries = {name: value for name, value in complete_config(config).items() if name not in WITHOUT_COST}
    for name in PER_STAGE if "block_out_channels" in entries else ():
        if name in entries and not isinstance(entries[name], list | tuple):
            entries[name] = [entries[name]] * len(entries["block_out_channels"])
    entries = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
    return {**entries, "class": network_class(config).__name__}
