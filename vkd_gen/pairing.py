"""Which student layer learns from which teacher layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from diffusers import ModelMixin

from vkd_gen.choices import PairedLayers
from vkd_gen.families import Stage, family_of, feature_shapes
from vkd_gen.features import split_pooling

Part = TypeVar("Part")


@dataclass(frozen=True)
class LayerPair:
    """A student layer and the teacher layer it learns from, by name, at equal resolution.

    Shapes are `(C, H, W)` or `(N, C)`, after the pooling that a name such as `mid_block/2` says. Depths are those of
    blocks of transformers, see `Stage`.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    depths: tuple[float, float] | None = None

    @property
    def student_channels(self) -> int:
        """Channels of the student's feature."""
        return self.student_shape[0 if len(self.student_shape) == 3 else -1]

    @property
    def teacher_channels(self) -> int:
        """Channels of the teacher's feature."""
        return self.teacher_shape[0 if len(self.teacher_shape) == 3 else -1]


def pair_layers(
    student: ModelMixin,
    teacher: ModelMixin,
    *,
    layers: PairedLayers = "all",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> list[LayerPair]:
    """Pair layers of two denoisers, in the order the student runs them, or as they are named.

    Stages of the encoder and of the decoder are matched where they work at the same resolution, and the middle with the
    middle; a stage without a counterpart is left out. Of transformers each block of the student is paired with the
    teacher's block by whose end the same share of the depth has run. Where two features differ in resolution, the finer
    one is average-pooled to the coarser: `mid_block/2` is the output of `mid_block` pooled by 2.

    Args:
        student: the student.
        teacher: the teacher.
        layers: which of the matched stages: `all`; `mid_and_up`, the middle and the decoder; `last_up`, the last
            decoder stage. Or `self_attention`: the self-attention layers of all of them, each of a student's stage with
            the one as far through the teacher's stage (Lee et al., 2023, arXiv 2312.04005, distil those). Or `bk`:
            encoder and decoder without the middle, and where of two stages only one resamples its last attention's
            output projection in both, as in BK-SDM (Kim et al., 2023, arXiv 2305.15798). Of transformers `all` or
            `self_attention`.
        pairs: (student layer, teacher layer) names to use instead.

    Raises:
        ValueError: for an unknown name, a student layer named twice, samples of unlike sizes, resolutions of which
            neither divides the other, or no pair at all.
    """
    student_stages, teacher_stages = (family_of(network).stages(network) for network in (student, teacher))
    sizes = [_sides(network.config.sample_size) for network in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student takes samples of size {student.config.sample_size} and the teacher of "
            f"{teacher.config.sample_size}; give both configurations one sample_size"
        )
    if pairs is not None:
        if not pairs:
            raise ValueError("no layer pairs are given")
        if len({pair[0] for pair in pairs}) < len(pairs):
            raise ValueError(f"a student layer is paired twice: {', '.join(pair[0] for pair in pairs)}")
        student_shapes = feature_shapes(student, [pair[0] for pair in pairs])
        teacher_shapes = feature_shapes(teacher, dict.fromkeys(pair[1] for pair in pairs))
        return _with_depths(pairs, student_shapes, teacher_shapes, student_stages, teacher_stages)
    student_shapes = feature_shapes(student, _candidates(student_stages))
    teacher_shapes = feature_shapes(teacher, _candidates(teacher_stages))
    are_blocks = _are_blocks(student_stages, teacher_stages, layers)
    places = [_by_place(student_stages, student_shapes), _by_place(teacher_stages, teacher_shapes)]
    matched = _spread(student_stages, teacher_stages) if are_blocks else _match_stages(*places)
    chosen = _bk(matched, student_shapes, teacher_shapes) if layers == "bk" else _choose(matched, layers)
    if not chosen:
        stages = ", ".join(stage.layer for stage, _ in matched) or "none"
        raise ValueError(
            f"no layer of the student has a counterpart in the teacher for layers {layers!r}; the stages that "
            f"match are {stages}; choose other layers or name the pairs"
        )
    return _with_depths(chosen, student_shapes, teacher_shapes, student_stages, teacher_stages)


def _with_depths(
    chosen: Sequence[tuple[str, str]],
    student_shapes: Mapping[str, tuple[int, ...]],
    teacher_shapes: Mapping[str, tuple[int, ...]],
    student_stages: Sequence[Stage],
    teacher_stages: Sequence[Stage],
) -> list[LayerPair]:
    """Pairs of layers, with their shapes, and of blocks their depths."""
    depths, teacher_depths = (_depths(stages) for stages in (student_stages, teacher_stages))
    return [
        replace(
            _pool_finer(s, t, student_shapes[s], teacher_shapes[t]),
            depths=(depths[s], teacher_depths[t]) if s in depths and t in teacher_depths else None,
        )
        for s, t in chosen
    ]


def _are_blocks(student: Sequence[Stage], teacher: Sequence[Stage], layers: PairedLayers) -> bool:
    """Whether both networks are of blocks, which are paired by depth.

    Raises:
        ValueError: for a network of blocks and one of stages, and a choice of layers that blocks do not have.
    """
    kinds = [any(stage.depth is not None for stage in stages) for stages in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError("a UNet's stages and a transformer's blocks have no counterparts; name the pairs of layers")
    if all(kinds) and layers not in ("all", "self_attention"):
        raise ValueError(f"layers {layers!r} are a UNet's; of a transformer choose all or self_attention, or name them")
    return all(kinds)


def _depths(stages: Sequence[Stage]) -> dict[str, float]:
    """Of each block, and of its self-attention, the share of the depth."""
    return {layer: stage.depth for stage in stages if stage.depth for layer in (stage.layer, *stage.self_attention)}


def _candidates(stages: Sequence[Stage]) -> list[str]:
    """Layers that may be paired, and those that tell at which resolution a stage works."""
    return [
        layer
        for stage in stages
        for layer in dict.fromkeys(
            (stage.layer, *([stage.works_at] if stage.works_at else ()), *stage.self_attention, stage.last_layer)
        )
    ]


def _choose(matched: Sequence[tuple[Stage, Stage]], layers: PairedLayers) -> list[tuple[str, str]]:
    """Those of the matched stages, or of the layers in them, that `layers` names."""
    match layers:
        case "all":
            return [(student.layer, teacher.layer) for student, teacher in matched]
        case "mid_and_up":
            return [(student.layer, teacher.layer) for student, teacher in matched if student.part != "down_blocks"]
        case "last_up":
            return [(student.layer, teacher.layer) for student, teacher in matched if student.part == "up_blocks"][-1:]
        case "self_attention":
            return [
                pair for student, teacher in matched for pair in _spread(student.self_attention, teacher.self_attention)
            ]
    raise ValueError(f"unknown choice of layers {layers!r}; choose all, mid_and_up, last_up, self_attention or bk")


def _bk(
    matched: Sequence[tuple[Stage, Stage]],
    student_shapes: Mapping[str, tuple[int, ...]],
    teacher_shapes: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, str]]:
    """Outputs of the matched stages but the middle; their last layers where one stage resamples and the other not."""
    return [
        (student.layer, teacher.layer)
        if student_shapes[student.layer][1:] == teacher_shapes[teacher.layer][1:]
        else (student.last_layer, teacher.last_layer)
        for student, teacher in matched
        if student.part != "mid_block"
    ]


def _by_place(stages: Sequence[Stage], shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple, list[Stage]]:
    """Stages by their place: the part, and the resolution they work at before they resample at their end."""
    places: dict[tuple, list[Stage]] = {}
    for stage in stages:
        resolution = shapes[stage.works_at][1:] if stage.works_at else ()
        places.setdefault((stage.part, *resolution), []).append(stage)
    return places


def _match_stages(
    student: Mapping[tuple, Sequence[Stage]], teacher: Mapping[tuple, Sequence[Stage]]
) -> list[tuple[Stage, Stage]]:
    """Stages at equal places; of several at one place, as of maps of 1 x 1, the last ones."""
    return [
        pair
        for place, alike in student.items()
        for pair in reversed(list(zip(reversed(alike), reversed(teacher.get(place, ())), strict=False)))
    ]


def _spread(student_layers: Sequence[Part], teacher_layers: Sequence[Part]) -> list[tuple[Part, Part]]:
    """Each student layer with the teacher layer that ends the same share of the stage; the last with the last."""
    count = len(student_layers)
    return [
        (layer, teacher_layers[math.ceil((number + 1) * len(teacher_layers) / count) - 1])
        for number, layer in enumerate(student_layers)
        if teacher_layers
    ]


def _pool_finer(
    student_layer: str, teacher_layer: str, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]
) -> LayerPair:
    sides = [_positions(shape) for shape in (student_shape, teacher_shape)]
    if sides[0] == sides[1]:
        return LayerPair(student_layer, teacher_layer, student_shape, teacher_shape)
    message = (
        f"student layer {student_layer} {student_shape} and teacher layer {teacher_layer} {teacher_shape} differ in "
    )
    if len(student_shape) != len(teacher_shape) or len(student_shape) == 1:
        raise ValueError(message + "kind: maps (C, H, W), tokens (N, C) and vectors (C) cannot be compared")
    squares = [_square(side) for side in sides]
    finer = max(squares)
    coarser = min(squares)
    factor = finer[0] // max(coarser[0], 1)
    if tuple(factor * length for length in coarser) != finer or coarser[0] == 0:
        raise ValueError(message + "resolution, and pooling cannot help: neither divides the other")
    if squares[0] == finer:
        student_layer, student_shape = _pooled(student_layer, student_shape, factor)
    else:
        teacher_layer, teacher_shape = _pooled(teacher_layer, teacher_shape, factor)
    return LayerPair(student_layer, teacher_layer, student_shape, teacher_shape)


def _positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W) of a map, (N,) of tokens, () of a vector."""
    return shape[1:] if len(shape) == 3 else shape[:-1]


def _square(positions: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W), for tokens of the square map they are from; (0, 0) where they are from none."""
    if len(positions) == 2:
        return positions
    length = math.isqrt(positions[0])
    return (length, length) if length**2 == positions[0] else (0, 0)


def _pooled(layer: str, shape: tuple[int, ...], factor: int) -> tuple[str, tuple[int, ...]]:
    name, side = split_pooling(layer)
    if len(shape) == 3:
        shape = (shape[0], shape[1] // factor, shape[2] // factor)
    else:
        shape = (shape[0] // factor**2, shape[1])
    return f"{name}/{side * factor}", shape


def _sides(sample_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if sample_size is None:
        return None
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def pair_table(pairs: Sequence[LayerPair], columns: Mapping[str, Sequence[str]] | None = None) -> str:
    """What learns from what, a line for each pair under a line of headings.

    Args:
        pairs: from `pair_layers`.
        columns: further ones, heading -> an entry for each pair; by default the widths that a projector joins.
    """
    if columns is None:
        columns = {"projector": [f"{pair.student_channels} -> {pair.teacher_channels}" for pair in pairs]}
    depths = [[f"{pair.depths[side]:.0%}" if pair.depths else "" for pair in pairs] for side in (0, 1)]
    has_depths = any(pair.depths for pair in pairs)
    table = {
        "student layer": [pair.student for pair in pairs],
        "shape": [_by(pair.student_shape) for pair in pairs],
        **({"depth": depths[0]} if has_depths else {}),
        "teacher layer": [pair.teacher for pair in pairs],
        "shape ": [_by(pair.teacher_shape) for pair in pairs],
        **({"depth ": depths[1]} if has_depths else {}),
        **columns,
    }
    widths = [max(len(entry) for entry in (heading.strip(), *entries)) for heading, entries in table.items()]
    lines = [[heading.strip() for heading in table], *zip(*table.values(), strict=True)]
    return "\n".join(
        "  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
