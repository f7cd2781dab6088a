"""What a recipe's user says about the student, and the student that comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, UNet2DModel

from vkd_gen.families import (
    REDUCTIONS,
    Inheritance,
    Reduction,
    best_layers,
    build_student,
    inherit_weights,
    reduce_config,
)
from vkd_gen.schedule import Schedule
from vkd_gen.training.models import check_memory, load_unet, read_student_config, unet_without_weights
from vkd_gen.training.options import StudentOptions

LARGEST_START = 2**18
"""Pixels, in all draws together, that students are fitted on: every layer's output of them is held in memory."""


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
