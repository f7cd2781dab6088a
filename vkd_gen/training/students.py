"""What a recipe's user says about the student, and the student that comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from diffusers import ModelMixin, UNet2DModel

from vkd_gen.schedule import Schedule
from vkd_gen.students import (
    REDUCTIONS,
    Inheritance,
    Reduction,
    best_layers,
    build_student,
    inherit_weights,
    reduce_config,
)
from vkd_gen.students.channels import ChannelChoice
from vkd_gen.students.inherit import Rescaling
from vkd_gen.training.models import check_memory, load_unet, read_student_config, unet_without_weights

LARGEST_START = 2**18
"""Pixels, in all draws together, that students are fitted on: every layer's output of them is held in memory."""


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """Which student, and what it starts from."""

    student: str = ""
    """A published student by name (bk-base, bk-small, bk-tiny, koala-1b, koala-700m, ddpm-20m), of which the flags
    below change a trait; or a config.json; or folder or hub id of a pipeline or UNet, whose weights are the start. Left
    empty: what the flags below make of the teacher."""
    student_width: float | None = None
    """Factor on the teacher's channels; by default 0.5, or what --student has."""
    student_layers_per_block: int | tuple[int, ...] | None = None
    """Residual layers of each block of the student, one number or one for each stage; by default the teacher's."""
    student_transformer_layers: int | tuple[int, ...] | None = None
    """Transformer blocks of each attention layer, likewise."""
    student_drop_stages: tuple[int, ...] = ()
    """Stages that the student does without; 0 has the highest resolution, -1 the lowest."""
    student_drop_mid_block: bool = False
    """Leave out the middle block."""
    student_drop_attention: tuple[int, ...] = ()
    """Stages of the teacher that lose their attention."""
    inherit_weights: bool = True
    """Start from the teacher's weights, if the student comes without weights of its own."""
    inherit_channels: ChannelChoice = "activation"
    """Which of the teacher's channels a narrower student starts from: those that best restore the others' effect, those
    of the largest weights, the first, or random ones."""
    inherit_rescaling: Rescaling = "least_squares"
    """What makes up for missing channels and layers at the start: each of the student's layers fitted to what the
    teacher's computes, weights multiplied for the smaller fan-in, or nothing."""
    inherit_layers: Literal["best", "rule"] = "best"
    """Which of the teacher's layers a shallower student starts from: those with which it comes closest to the teacher,
    or as in BK-SDM the first of each block and the decoder's last."""
    inherit_samples: int = 256
    """Draws of (image, noise, timestep) for these, all held in memory at once with every layer's output: fewer, down to
    4, if they have more than 2^18 pixels together."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.inherit_samples < 1:
            raise ValueError(f"--inherit_samples must be at least 1, not {self.inherit_samples}")


SharedStudentOptions = Annotated[StudentOptions, tyro.conf.OmitArgPrefixes]
"""The type of a recipe's field `start`: its flags carry no prefix."""


def resolve_student(options: StudentOptions, teacher: ModelMixin) -> dict[str, Any]:
    """The configuration of the student that --student and the flags beside it describe, at the teacher's resolution.

    Raises:
        ValueError: for what is not there, does not fit the teacher, or is said twice.
    """
    traits: dict[str, Any] = {
        "width": options.student_width,
        "layers_per_block": options.student_layers_per_block,
        "transformer_layers": options.student_transformer_layers,
        "drop_stages": options.student_drop_stages or None,
        "drop_mid_block": options.student_drop_mid_block or None,
        "drop_attention": options.student_drop_attention or None,
    }
    traits = {name: value for name, value in traits.items() if value is not None}
    if not options.student:
        return reduce_config(teacher.config, Reduction(**{"width": 0.5, **traits}))
    if options.student in REDUCTIONS:
        return reduce_config(teacher.config, replace(REDUCTIONS[options.student], **traits))
    if traits:
        raise ValueError(f"--student {options.student} is complete; leave out --student_{next(iter(traits))}")
    return read_student_config(options.student, teacher)


def build_resolved_student(options: StudentOptions, teacher: UNet2DModel) -> tuple[UNet2DModel, bool]:
    """The student, and whether it comes with weights of its own."""
    resolved = resolve_student(options, teacher)
    check_memory(unet_without_weights(resolved, "the student"), "the student")
    if not options.student or options.student in REDUCTIONS or Path(options.student).is_file():
        return build_student(resolved), False
    student = load_unet(options.student)
    student.register_to_config(sample_size=teacher.config.sample_size)
    return student, True


def num_starting_draws(options: StudentOptions, resolution: int) -> int:
    """Draws to start a student on: as asked for, but for large images fewer."""
    return max(4, min(options.inherit_samples, LARGEST_START // resolution**2))


def inherit(
    options: StudentOptions,
    student: UNet2DModel,
    teacher: UNet2DModel,
    batches: Sequence[Mapping[str, Any]],
    schedule: Schedule,
    *,
    seed: int,
) -> Inheritance:
    """Start the student from the teacher, both in float32 on the batches' device."""
    best = options.inherit_layers == "best"
    return inherit_weights(
        student,
        teacher,
        channels=options.inherit_channels,
        rescaling=options.inherit_rescaling,
        batches=batches,
        schedule=schedule,
        layers=best_layers(student, teacher, batches, schedule) if best else None,
        seed=seed,
    )
