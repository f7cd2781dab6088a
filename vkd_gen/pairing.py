"""Which student layer learns from which teacher layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffusers import ModelMixin

from vkd_gen.features import feature_shapes

PairedLayers = Literal["all", "mid_and_up", "last_up"]


@dataclass(frozen=True)
class LayerPair:
    """A student layer and the teacher layer it learns from.

    Attributes:
        student: dotted name in the student.
        teacher: dotted name in the teacher.
        student_shape: of the student's feature, `(C, H, W)` or `(N, C)`.
        teacher_shape: of the teacher's.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]

    @property
    def student_channels(self) -> int:
        """Channels of the student's feature."""
        return self.student_shape[0 if len(self.student_shape) == 3 else -1]

    @property
    def teacher_channels(self) -> int:
        """Channels of the teacher's feature."""
        return self.teacher_shape[0 if len(self.teacher_shape) == 3 else -1]


def stage_layers(unet: ModelMixin) -> list[str]:
    """Names of the stages of a diffusers UNet, in the order they run."""
    layers = [f"down_blocks.{number}" for number in range(len(unet.down_blocks))]
    layers += ["mid_block"] if unet.mid_block is not None else []
    return layers + [f"up_blocks.{number}" for number in range(len(unet.up_blocks))]


def pair_layers(
    student: ModelMixin,
    teacher: ModelMixin,
    *,
    layers: PairedLayers = "all",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> list[LayerPair]:
    """Pair layers of two diffusers UNets.

    Without `pairs`, stages are matched within the encoder, the middle and the decoder by the resolution of their
    outputs; where several have the same one, in order, counted from the end.

    Args:
        student: the student UNet.
        teacher: the teacher UNet.
        layers: which of the matched stages: `all`; `mid_and_up`, the middle and the decoder; `last_up`, the last
            decoder stage.
        pairs: (student layer, teacher layer) names to use instead.

    Returns:
        Pairs in the order the student runs them.

    Raises:
        ValueError: for an unknown name, a student layer named twice, unlike resolutions or no pair at all.
    """
    if pairs is not None:
        return _pair_named(student, teacher, pairs)
    student_shapes = feature_shapes(student, stage_layers(student))
    teacher_shapes = feature_shapes(teacher, stage_layers(teacher))
    found = []
    for part in ("down_blocks", "mid_block", "up_blocks"):
        unmatched = [name for name in teacher_shapes if name.startswith(part)]
        for student_layer in reversed([name for name in student_shapes if name.startswith(part)]):
            shape = student_shapes[student_layer]
            alike = [name for name in unmatched if teacher_shapes[name][1:] == shape[1:]]
            if alike:
                found.append(LayerPair(student_layer, alike[-1], shape, teacher_shapes[alike[-1]]))
                unmatched = unmatched[: unmatched.index(alike[-1])]
    order = list(student_shapes)
    found.sort(key=lambda pair: order.index(pair.student))
    match layers:
        case "all":
            chosen = found
        case "mid_and_up":
            chosen = [pair for pair in found if not pair.student.startswith("down_blocks")]
        case "last_up":
            chosen = [pair for pair in found if pair.student.startswith("up_blocks")][-1:]
        case _:
            raise ValueError(f"unknown choice of layers {layers!r}; choose all, mid_and_up or last_up")
    if not chosen:
        raise ValueError(
            "no stage of the student has the resolution of its counterpart in the teacher: student "
            f"{_describe(student_shapes)}, teacher {_describe(teacher_shapes)}; name the pairs"
        )
    return chosen


def _pair_named(student: ModelMixin, teacher: ModelMixin, pairs: Sequence[tuple[str, str]]) -> list[LayerPair]:
    if not pairs:
        raise ValueError("no layer pairs are given")
    student_layers = [pair[0] for pair in pairs]
    if len(set(student_layers)) < len(pairs):
        raise ValueError(f"a student layer is paired twice: {', '.join(student_layers)}")
    student_shapes = feature_shapes(student, student_layers)
    teacher_shapes = feature_shapes(teacher, dict.fromkeys(pair[1] for pair in pairs))
    for student_layer, teacher_layer in pairs:
        shapes = student_shapes[student_layer], teacher_shapes[teacher_layer]
        positions = [shape[1:] if len(shape) == 3 else shape[:-1] for shape in shapes]
        if positions[0] != positions[1]:
            raise ValueError(
                f"student layer {student_layer} {shapes[0]} and teacher layer {teacher_layer} {shapes[1]} "
                "differ in resolution"
            )
    return [LayerPair(s, t, student_shapes[s], teacher_shapes[t]) for s, t in pairs]


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
