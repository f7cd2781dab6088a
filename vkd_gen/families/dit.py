"""`DiTTransformer2DModel` (Peebles and Xie, 2022, arXiv 2212.09748): how it is called, and what lies where in it.

B batch, C channels, H x W latents, N tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from vkd_gen.families.family import Stage

BLOCKS = "transformer_blocks"


def call(network: nn.Module, sample: Tensor, times: Tensor, conditioning: Mapping[str, Any] | None = None) -> Tensor:
    """The prediction `[B, C, H, W]`: of a network that predicts a variance too, the first half of the channels."""
    output = network(hidden_states=sample, timestep=times, **(conditioning or {}), return_dict=False)[0]
    return output[:, : sample.shape[1]]


def prepare(network: nn.Module) -> None:
    """Let a network drop no labels by itself: diffusers does so in training, in every block by another random number.

    Which labels are dropped is part of a draw. Weights and configuration stay, so that what is saved is stock.
    """
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def stages(network: ModelMixin) -> list[Stage]:
    """The blocks, each of which ends a share of the depth; what they compute is tokens, `[B, N, C]`."""
    count = len(network.transformer_blocks)
    return [
        Stage(
            f"{BLOCKS}.{number}",
            part=BLOCKS,
            works_at=None,
            self_attention=(f"{BLOCKS}.{number}.attn1",),
            last_layer=f"{BLOCKS}.{number}",
            depth=(number + 1) / count,
        )
        for number in range(count)
    ]


def example(network: ModelMixin) -> dict[str, Any]:
    """Arguments of the right shapes for one call, batch size 1."""
    config = network.config
    return {
        "sample": torch.zeros(1, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.zeros(1, dtype=torch.long),
        "class_labels": torch.zeros(1, dtype=torch.long),
    }
