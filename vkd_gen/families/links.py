"""Walk student and teacher as a sample goes through them, and pair their layers."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from vkd_gen.families.streams import Layer, Link, Stream, channels_of

BlockLayers = Mapping[str, Sequence[int]]
"""Student block -> the teacher's layer that each of its layers copies, such as `{"up_blocks.0": (0, 2)}`."""

BLOCKS = frozenset(
    {f"{kind}{way}Block2D" for kind in ("", "Attn", "CrossAttn", "SimpleCrossAttn") for way in ("Down", "Up")}
    | {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}
    | {"UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"}
)
"""diffusers' blocks that are read here; those after Karras or with a picture in their skips are not."""


def _check_alike(name: str, student: Layer, teacher: Layer) -> None:
    if type(student) is not type(teacher):
        raise ValueError(
            f"the student's {name} is a {type(student).__name__} and the teacher's a {type(teacher).__name__}: such a "
            "student cannot inherit the teacher's weights"
        )


def match_stages(student: ModelMixin, teacher: ModelMixin) -> tuple[int, ...]:
    """The teacher's stage that each stage of the student stands for.

    Among all ways to leave stages out, the one in which the student's channels are most nearly one multiple of the
    teacher's, then the one whose blocks are of the same kinds, then the one that keeps the highest resolutions.
    """
    channels, full = (tuple(unet.config.block_out_channels) for unet in (student, teacher))
    kinds, all_kinds = (tuple(unet.config.down_block_types) for unet in (student, teacher))
    if len(channels) > len(full):
        raise ValueError(f"a student of {len(channels)} stages cannot inherit from a teacher of {len(full)}")

    def cost(stages: tuple[int, ...]) -> tuple[float, int, tuple[int, ...]]:
        logs = [math.log(count / full[stage]) for count, stage in zip(channels, stages, strict=True)]
        unlike = sum(kind != all_kinds[stage] for kind, stage in zip(kinds, stages, strict=True))
        return round(max(logs) - min(logs), 3), unlike, stages

    return min(itertools.combinations(range(len(full)), len(channels)), key=cost)


def default_layers(num_student: int, num_teacher: int, *, decoder: bool) -> tuple[int | None, ...]:
    """The teacher's layer that each layer of a block copies; None where the teacher has none for it.

    An encoder's block keeps its first layers. A decoder's block keeps its first ones and its last, which alone reads
    the skip connection from the stage above, with that stage's channels: as in BK-SDM (arXiv 2305.15798).
    """
    if decoder:
        first = [index if index < num_teacher - 1 else None for index in range(num_student - 1)]
        return (*first, num_teacher - 1)
    return tuple(index if index < num_teacher else None for index in range(num_student))


def link_layers(student: ModelMixin, teacher: ModelMixin, layers: BlockLayers | None = None) -> list[Link]:
    """Links in the order in which the student, made by `build_student`, runs; there are none of layers without weights.

    Args:
        student: a diffusers UNet.
        teacher: a diffusers UNet.
        layers: the teacher's layers to copy in named blocks; by default `default_layers`.

    Raises:
        ValueError: for blocks of unknown kinds, and for layers that the teacher does not have.
    """
    return _Walk(student, teacher, dict(layers or {})).links


class _Walk:
    """Collects links; the methods take the stream that comes in and return the one that goes out."""

    def __init__(
        self,
        student: ModelMixin,
        teacher: ModelMixin,
        layers: dict[str, Sequence[int]],
    ):
        self.links: list[Link] = []
        self.layers = layers
        self.stages = match_stages(student, teacher)
        blocks = {f"{way}_blocks.{index}" for way in ("down", "up") for index in range(len(self.stages))}
        if unknown := set(layers) - blocks:
            raise ValueError(f"layers names {sorted(unknown)[0]!r}, which is no block of the student")
        for unet in (student, teacher):
            for block in (*unet.down_blocks, *unet.up_blocks, unet.mid_block):
                if block is not None and type(block).__name__ not in BLOCKS:
                    raise ValueError(f"weights of a {type(block).__name__} cannot be inherited")
        self.embedding = self._embeddings(student, teacher)
        self._samples(student, teacher)

    # ---- what layers are made of

    def _link(
        self,
        student: Layer,
        teacher: Layer,
        reads: Sequence[Stream],
        writes: Sequence[Stream],
        scale: float = 1.0,
        residual: tuple[Layer, Layer] | None = None,
        is_logit: bool = False,
        ends_branch: bool = False,
    ) -> None:
        if student is None or next(student.parameters(), None) is None:
            return
        assert channels_of(student) == tuple(sum(stream.student for stream in streams) for streams in (reads, writes))
        if teacher is None or channels_of(teacher)[1] != sum(stream.teacher for stream in writes):
            self.links.append(Link(student, None, None, tuple(writes), ends_branch=ends_branch))
            return
        fits = channels_of(teacher)[0] == sum(stream.teacher for stream in reads)
        if isinstance(student, nn.GroupNorm) and fits:
            size, offset = channels_of(teacher)[0] // teacher.num_groups, 0
            for stream in reads:
                stream.edges |= {edge - offset for edge in range(0, offset + stream.teacher, size) if edge > offset}
                offset += stream.teacher
        link_reads = tuple(reads) if fits else None
        self.links.append(Link(student, teacher, link_reads, tuple(writes), scale, residual, is_logit, ends_branch))

    def _new(self, student: Layer, teacher: Layer) -> Stream:
        return Stream(0 if teacher is None else channels_of(teacher)[1], channels_of(student)[1])

    def _layer(self, student: Layer, teacher: Layer, reads: Sequence[Stream]) -> Stream | None:
        """A layer that begins a stream of its own."""
        if student is None:
            return None
        stream = self._new(student, teacher)
        self._link(student, teacher, reads, [stream])
        return stream

    def _outside(self, student: Layer, teacher: Layer) -> Stream:
        """What comes from outside the UNet: every channel as it is."""
        full, count = (channels_of(module)[0] if module is not None else 0 for module in (teacher, student))
        return Stream(full, count, kept=_spread(full, count))

    # ---- embeddings

    def _embeddings(self, student: ModelMixin, teacher: ModelMixin) -> tuple[Stream, ...]:
        source = self._time_projection(student, teacher)
        stream = self._mlp(student.time_embedding, teacher.time_embedding, source, None)
        embedding: tuple[Stream, ...] = (stream,)
        concat = getattr(student.config, "class_embeddings_concat", False)
        for name in ("class_embedding", "add_embedding"):
            module, origin = getattr(student, name, None), getattr(teacher, name, None)
            if module is None or next(module.parameters(), None) is None:
                continue
            _check_alike(name, module, origin)
            if name == "class_embedding" and concat:
                target = Stream(stream.teacher, stream.student)
                embedding = (stream, target)
            else:
                target = stream
            if hasattr(module, "linear_1"):
                takes_time = name == "class_embedding" and student.config.class_embed_type == "timestep"
                reads = source if takes_time else (self._outside(module.linear_1, origin.linear_1),)
                self._mlp(module, origin, reads, target)
            elif isinstance(module, nn.Embedding | nn.Linear):
                self._link(module, origin, (self._outside(module, origin),), [target])
        return embedding

    def _time_projection(self, student: ModelMixin, teacher: ModelMixin) -> tuple[Stream, ...]:
        module, origin = student.time_proj, teacher.time_proj
        _check_alike("time_proj", module, origin)
        if next(module.parameters(), None) is None:
            width, full = (channels_of(unet.time_embedding.linear_1)[0] for unet in (student, teacher))
            return (Stream(full, width, kept=_nearest_frequencies(full, width, module.downscale_freq_shift)),)
        stream = self._new(module, origin)
        is_table = isinstance(module, nn.Embedding)
        self._link(module, origin, [self._outside(module, origin) if is_table else stream], [stream])
        return (stream,) if is_table else (stream, stream)  # sines and cosines of the same frequencies

    def _mlp(self, student: Layer, teacher: Layer, reads: Sequence[Stream], target: Stream | None) -> Stream:
        hidden = self._layer(student.linear_1, teacher.linear_1, reads)
        assert hidden is not None
        target = target or self._new(student.linear_2, teacher.linear_2)
        self._link(student.linear_2, teacher.linear_2, [hidden], [target])
        return target

    # ---- the way of a sample

    def _samples(self, student: ModelMixin, teacher: ModelMixin) -> None:
        stream = self._layer(student.conv_in, teacher.conv_in, [self._outside(student.conv_in, teacher.conv_in)])
        assert stream is not None
        skips = [stream]
        for index, stage in enumerate(self.stages):
            name = f"down_blocks.{index}"
            stream = self._down(student.down_blocks[index], teacher.down_blocks[stage], stream, skips, name)
        if student.mid_block is not None:
            stream = self._mid(student.mid_block, teacher.mid_block, stream)
        for index, stage in enumerate(reversed(self.stages)):
            position = len(teacher.down_blocks) - 1 - stage
            stream = self._up(
                student.up_blocks[index], teacher.up_blocks[position], stream, skips, f"up_blocks.{index}"
            )
        if student.conv_norm_out is not None:
            self._link(student.conv_norm_out, teacher.conv_norm_out, [stream], [stream])
        self._layer(student.conv_out, teacher.conv_out, [stream])
        out = self.links[-1].writes[0]
        out.kept = _spread(out.teacher, out.student)

    def _chosen(self, name: str, num_student: int, num_teacher: int, *, decoder: bool) -> tuple[int | None, ...]:
        if name not in self.layers:
            return default_layers(num_student, num_teacher, decoder=decoder)
        chosen = tuple(self.layers[name])
        if len(chosen) != num_student or not all(0 <= layer < num_teacher for layer in chosen):
            raise ValueError(
                f"layers of {name} must name {num_student} of the teacher's 0 to {num_teacher - 1}, not {chosen}"
            )
        return chosen

    def _down(self, student: Layer, teacher: Layer, stream: Stream, skips: list[Stream], name: str) -> Stream:
        chosen = self._chosen(name, len(student.resnets), len(teacher.resnets), decoder=False)
        for index, origin in enumerate(chosen):
            stream = self._resnet(student.resnets[index], _at(teacher.resnets, origin), [stream])
            stream = self._attention_at(student, teacher, index, origin, stream)
            skips.append(stream)
        if student.downsamplers is not None:
            stream = self._resample(student.downsamplers, teacher.downsamplers, stream)
            skips.append(stream)
        return stream

    def _mid(self, student: Layer, teacher: Layer, stream: Stream) -> Stream:
        resnets = () if teacher is None else teacher.resnets
        for index, resnet in enumerate(student.resnets):
            if index:
                stream = self._attention_at(student, teacher, index - 1, index - 1, stream)
            stream = self._resnet(resnet, _at(resnets, index), [stream])
        return stream

    def _up(self, student: Layer, teacher: Layer, stream: Stream, skips: list[Stream], name: str) -> Stream:
        chosen = self._chosen(name, len(student.resnets), len(teacher.resnets), decoder=True)
        for index, origin in enumerate(chosen):
            stream = self._resnet(student.resnets[index], _at(teacher.resnets, origin), [stream, skips.pop()])
            stream = self._attention_at(student, teacher, index, origin, stream)
        if student.upsamplers is not None:
            stream = self._resample(student.upsamplers, teacher.upsamplers, stream)
        return stream

    def _resample(self, student: Layer, teacher: Layer, stream: Stream) -> Stream:
        for index, layer in enumerate(student):
            origin = _at(teacher or (), index)
            if hasattr(layer, "conv1"):
                stream = self._resnet(layer, origin, [stream])
                continue
            convs = [getattr(module, "conv", None) or getattr(module, "Conv2d_0", None) for module in (layer, origin)]
            if convs[0] is not None and next(convs[0].parameters(), None) is not None:
                stream = self._layer(convs[0], convs[1], [stream]) or stream
        return stream

    def _resnet(self, student: Layer, teacher: Layer, reads: Sequence[Stream]) -> Stream:
        self._link(*_both(student, teacher, "norm1"), reads, reads)
        hidden = self._new(student.conv1, getattr(teacher, "conv1", None))
        self._link(*_both(student, teacher, "conv1"), reads, [hidden])
        twice = student.time_embedding_norm == "scale_shift"
        self._link(*_both(student, teacher, "time_emb_proj"), self.embedding, [hidden, hidden] if twice else [hidden])
        self._link(*_both(student, teacher, "norm2"), [hidden], [hidden])
        stays = student.conv_shortcut is None and getattr(teacher, "conv_shortcut", None) is None and len(reads) == 1
        out = reads[0] if stays else self._new(student.conv2, getattr(teacher, "conv2", None))
        both = None if teacher is None else (student, teacher)
        adds = student.conv_shortcut is None
        self._link(
            *_both(student, teacher, "conv2"), [hidden], [out], residual=both if adds else None, ends_branch=adds
        )
        self._link(*_both(student, teacher, "conv_shortcut"), reads, [out], residual=both)
        return out

    # ---- attention

    def _attention_at(self, student: Layer, teacher: Layer, index: int, origin: int | None, stream: Stream) -> Stream:
        layer = _at(getattr(student, "attentions", None) or (), index)
        source = None if origin is None else _at(getattr(teacher, "attentions", None) or (), origin)
        if layer is None:
            return stream
        if hasattr(layer, "to_q"):
            self._attention(layer, source, stream, residual=True)
        else:
            self._transformer(layer, source, stream)
        return stream

    def _attention(self, student: Layer, teacher: Layer, stream: Stream, *, residual: bool) -> None:
        if type(teacher) is not type(student):
            teacher = None

        self._link(*_both(student, teacher, "group_norm"), [stream], [stream])
        heads = student.heads, student.heads if teacher is None else teacher.heads
        out = (student.to_out[0], None if teacher is None else teacher.to_out[0])
        full, count = (0 if layer is None else channels_of(layer)[0] for layer in (out[1], out[0]))
        values = Stream(full, count, heads)
        logits = dataclasses.replace(self._new(*_both(student, teacher, "to_q")), heads=heads, same_heads=values)
        sizes = [student.to_q.out_features // heads[0], max(1, logits.teacher // heads[1])]
        # Logits are divided by the root of a head's channels; a head that has each channel twice adds up each twice.
        scale = math.sqrt(sizes[0] / sizes[1]) / max(1, sizes[0] / sizes[1])
        source = self._outside(*_both(student, teacher, "to_k")) if student.is_cross_attention else stream
        self._link(*_both(student, teacher, "to_q"), [stream], [logits], scale=scale, is_logit=True)
        self._link(*_both(student, teacher, "to_k"), [source], [logits], is_logit=True)
        self._link(*_both(student, teacher, "to_v"), [source], [values])
        for name, target in (("add_k_proj", logits), ("add_v_proj", values)):
            layer, origin = _both(student, teacher, name)
            if layer is not None:
                self._link(layer, origin, [self._outside(layer, origin)], [target])
        adds = residual and teacher is not None
        self._link(*out, [values], [stream], residual=(student, teacher) if adds else None, ends_branch=True)

    def _transformer(self, student: Layer, teacher: Layer, stream: Stream) -> None:
        if type(teacher) is not type(student):
            teacher = None
        self._link(*_both(student, teacher, "norm"), [stream], [stream])
        inner = self._layer(*_both(student, teacher, "proj_in"), [stream])
        assert inner is not None
        for index, block in enumerate(student.transformer_blocks):
            self._transformer_block(block, _at(getattr(teacher, "transformer_blocks", ()), index), inner)
        both = None if teacher is None else (student, teacher)
        self._link(*_both(student, teacher, "proj_out"), [inner], [stream], residual=both, ends_branch=True)

    def _transformer_block(self, student: Layer, teacher: Layer, stream: Stream) -> None:
        for norm, attention in (("norm1", "attn1"), ("norm2", "attn2")):
            if getattr(student, attention, None) is None:
                continue
            self._link(getattr(student, norm), getattr(teacher, norm, None), [stream], [stream])
            self._attention(getattr(student, attention), getattr(teacher, attention, None), stream, residual=False)
        self._link(student.norm3, getattr(teacher, "norm3", None), [stream], [stream])
        feed, origin = student.ff.net, None if teacher is None else teacher.ff.net
        first, source = feed[0].proj, None if origin is None else origin[0].proj
        hidden = Stream(0 if origin is None else channels_of(origin[2])[0], channels_of(feed[2])[0])
        gated = channels_of(first)[1] // hidden.student  # a gated layer computes hidden channels, then their gates
        self._link(first, source, [stream], [hidden] * gated)
        self._link(feed[2], None if origin is None else origin[2], [hidden], [stream], ends_branch=True)


def _both(student: Layer, teacher: Layer, name: str) -> tuple[Layer, Layer]:
    return getattr(student, name, None), getattr(teacher, name, None)


def _at(modules: Any, index: int | None) -> Layer:
    return modules[index] if index is not None and index < len(modules) else None


def _spread(teacher: int, student: int) -> Tensor:
    """Evenly spaced channels, each of them several times where the student has more."""
    return torch.arange(student) * teacher // max(1, student)


def _nearest_frequencies(teacher: int, student: int, shift: float) -> Tensor:
    """Channels of the sinusoidal embedding that are nearest in frequency: 10000^(-i / (half - shift)) for channel i."""
    half, full = student // 2, teacher // 2
    index = (torch.arange(half) * (full - shift) / max(1e-9, half - shift)).round().long().clamp(max=full - 1)
    return torch.cat([index, full + index])
