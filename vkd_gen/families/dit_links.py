"""Pair the layers of a DiT and a narrower or wider student of it, as a sample goes through them; see links.py."""

import dataclasses
from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from torch import Tensor

from vkd_gen.families.blocks import output_channels
from vkd_gen.families.streams import Layer, Link, Stream, channels_of


def link_blocks(student: ModelMixin, teacher: ModelMixin, kept: Sequence[int]) -> list[Link]:
    """Links in the order in which the student runs.

    All blocks write and read one residual stream, on which positions are embedded by sines that depend on the width: of
    it the channels are kept whose positions are nearest in frequency. A gate multiplies what a branch adds, so that
    layers are fitted to what the teacher's compute and not to what the stream still lacks.

    Args:
        student: a DiT of another number of heads, or of fewer blocks.
        teacher: a DiT.
        kept: the teacher's block that each of the student's is made from.
    """
    widths = teacher.proj_out_2.in_features, student.proj_out_2.in_features
    stream = Stream(*widths, kept=nearest_positions(*widths))
    links = [_link(student.pos_embed.proj, teacher.pos_embed.proj, [_outside(student.pos_embed.proj)], [stream])]
    embeddings: list[Stream] = []
    for block, number in zip(student.transformer_blocks, kept, strict=True):
        embeddings.append(Stream(*widths))
        links += _block(block, teacher.transformer_blocks[number], stream, embeddings[-1])
    links.append(_link(student.proj_out_1, teacher.proj_out_1, [embeddings[0]], [stream, stream]))
    of_teacher, own = (network.proj_out_2.out_features for network in (teacher, student))
    output = Stream(of_teacher, own, kept=output_channels(student, teacher))
    return [*links, _link(student.proj_out_2, teacher.proj_out_2, [stream], [output])]


def nearest_positions(teacher: int, student: int) -> Tensor:
    """The teacher's channel of each of the student's: sines and cosines of rows, then of columns, 10000^(-4 i / width).

    Args:
        teacher: channels.
        student: channels.

    Returns:
        `[student]`; exactly the teacher's frequencies where its width is a multiple of the student's.
    """
    quarter, full = student // 4, teacher // 4
    index = (torch.arange(quarter) * teacher / student).round().long().clamp(max=full - 1)
    return torch.cat([part * full + index for part in range(4)])


def _block(student: Layer, teacher: Layer, stream: Stream, embedding: Stream) -> list[Link]:
    """A block: the embedding of time and label, what modulates, attention, and the feed-forward layer."""
    own, origin = student.norm1.emb, teacher.norm1.emb
    time, of_time = own.timestep_embedder, origin.timestep_embedder
    table, of_classes = own.class_embedder.embedding_table, origin.class_embedder.embedding_table
    hidden = _inner(time.linear_1, of_time.linear_1)
    links = [
        _link(time.linear_1, of_time.linear_1, [_outside(time.linear_1)], [hidden]),
        _link(time.linear_2, of_time.linear_2, [hidden], [embedding]),
        _link(table, of_classes, [_outside(table)], [embedding]),
        _link(student.norm1.linear, teacher.norm1.linear, [embedding], [stream] * 6),
    ]
    links += _attention(student.attn1, teacher.attn1, stream)
    feed, source = student.ff.net, teacher.ff.net
    inner = Stream(channels_of(source[2])[0], channels_of(feed[2])[0])
    gated = channels_of(feed[0].proj)[1] // inner.student  # a gated layer computes hidden channels, then their gates
    links.append(_link(feed[0].proj, source[0].proj, [stream], [inner] * gated))
    links.append(_link(feed[2], source[2], [inner], [stream]))
    return links


def _attention(student: Layer, teacher: Layer, stream: Stream) -> list[Link]:
    values = _inner(student.to_v, teacher.to_v)
    values.heads = student.heads, teacher.heads
    logits = dataclasses.replace(values, same_heads=values)
    return [
        _link(student.to_q, teacher.to_q, [stream], [logits], is_logit=True),
        _link(student.to_k, teacher.to_k, [stream], [logits], is_logit=True),
        _link(student.to_v, teacher.to_v, [stream], [values]),
        _link(student.to_out[0], teacher.to_out[0], [values], [stream]),
    ]


def _link(
    student: Layer, teacher: Layer, reads: Sequence[Stream], writes: Sequence[Stream], *, is_logit: bool = False
) -> Link:
    assert channels_of(student) == tuple(sum(stream.student for stream in streams) for streams in (reads, writes))
    assert channels_of(teacher) == tuple(sum(stream.teacher for stream in streams) for streams in (reads, writes))
    return Link(student, teacher, tuple(reads), tuple(writes), is_logit=is_logit)


def _inner(student: Layer, teacher: Layer) -> Stream:
    """What a layer writes for the next one alone."""
    return Stream(channels_of(teacher)[1], channels_of(student)[1])


def _outside(layer: Layer) -> Stream:
    """What comes from outside of the network, and is the same for both."""
    return _whole(channels_of(layer)[0])


def _whole(channels: int) -> Stream:
    return Stream(channels, channels, kept=torch.arange(channels))
