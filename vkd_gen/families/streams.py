"""Channels that layers share, and which teacher layer each student layer takes its weights from.

A stream is a set of channels that layers write and read together: everything added to one residual stream, the hidden
channels inside a residual layer, the channels of attention heads, the time embedding. Whoever drops a channel of a
stream drops it in all its writers and readers. A skip concatenation reads two streams, one after the other.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Layer = Any
"""A module; torch gives a module's attributes no useful type."""


@dataclass(eq=False)
class Stream:
    """Channels that layers write and read together.

    Attributes:
        teacher: channels in the teacher.
        student: channels in the student.
        heads: attention heads in the student and in the teacher that the channels are divided into; 1 for others.
        same_heads: the stream of the values, for that of queries and keys: both keep the same heads.
        edges: where group norms divide the teacher's channels.
        kept: for each of the student's channels the teacher's, once chosen.
    """

    teacher: int
    student: int
    heads: tuple[int, int] = (1, 1)
    same_heads: "Stream | None" = None
    edges: set[int] = field(default_factory=set)
    kept: Tensor | None = None

    def index(self) -> Tensor:
        """The teacher's channel of each of the student's."""
        assert self.kept is not None
        return self.kept

    def copies(self) -> Tensor:
        """How many of the student's channels stand for the same channel of the teacher's, for each of the student's."""
        return torch.bincount(self.index(), minlength=self.teacher)[self.index()]


@dataclass(eq=False)
class Link:
    """A student layer, the teacher layer that it is made from, and the streams that both are between.

    Attributes:
        student: layer with weights.
        teacher: the teacher's; None where there is none.
        reads: streams of the input channels in their order; None where they are not the teacher's.
        writes: streams of the output channels in their order.
        scale: factor on the weights, so that attention logits stay what they are.
        residual: student and teacher module that add their input to this layer's output, if any.
        is_logit: the layer computes queries or keys.
        ends_branch: what the layer computes is added to what went around it.
    """

    student: Layer
    teacher: Layer
    reads: tuple[Stream, ...] | None
    writes: tuple[Stream, ...]
    scale: float = 1.0
    residual: tuple[Layer, Layer] | None = None
    is_logit: bool = False
    ends_branch: bool = False


def channels_of(module: Layer) -> tuple[int, int]:
    """Input and output channels of a layer."""
    match module:
        case nn.Conv2d() | nn.ConvTranspose2d():
            return module.in_channels, module.out_channels
        case nn.Linear():
            return module.in_features, module.out_features
        case nn.Embedding():
            return module.num_embeddings, module.embedding_dim
    count = next(module.parameters()).shape[0]  # norms, and the frequencies of a Fourier embedding
    return count, count


def channel_axes(module: Layer) -> tuple[int, int]:
    """Axes of a weight's input and output channels; for weights of two or more axes."""
    return (0, 1) if isinstance(module, nn.ConvTranspose2d | nn.Embedding) else (1, 0)


def weights_by_stream(link: Link, *, reading: bool) -> list[tuple[Stream, slice, Tensor]]:
    """For each stream that a teacher layer reads, or writes: where it lies among the channels, and its weights.

    Weights are `[channels, all others]`, float32; there are none for norms.
    """
    weight = getattr(link.teacher, "weight", None)
    streams = link.reads if reading else link.writes
    if weight is None or weight.ndim < 2 or streams is None:
        return []
    weight = weight.detach().float().movedim(channel_axes(link.teacher)[0 if reading else 1], 0).flatten(1)
    parts, offset = [], 0
    for stream in streams:
        part = slice(offset, offset + stream.teacher)
        parts.append((stream, part, weight[part]))
        offset += stream.teacher
    return parts
