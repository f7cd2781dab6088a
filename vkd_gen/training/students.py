"""The teacher and the student of a recipe, as its user named them, and what comes of a dry run."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel

from vkd_gen.data.draws import Draws
from vkd_gen.evaluation.compare import describe_models
from vkd_gen.evaluation.labels import data_label
from vkd_gen.families import (
    REDUCTIONS,
    build_student,
    family_of,
    published_cost,
)
from vkd_gen.families.dit import BLOCKS
from vkd_gen.loading import read_json
from vkd_gen.models import Model, SharedParts
from vkd_gen.pairing import pair_table
from vkd_gen.schedule import Schedule
from vkd_gen.text_pipelines import TextSource, pipeline_without_weights
from vkd_gen.training.class_teachers import class_teacher_of, load_class_teacher
from vkd_gen.training.matching import check_branches, pair_named_or_all, target_channels
from vkd_gen.training.memory import show_memory
from vkd_gen.training.options import StudentOptions
from vkd_gen.training.probe import check_time_embedding
from vkd_gen.training.run import Run
from vkd_gen.training.text_teachers import load_parts_of, pipeline_index, text_source
from vkd_gen.training.unets import (
    check_memory,
    load_teacher,
    load_unet,
    read_student_config,
    training_schedule,
    unet_without_weights,
)

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
        "blocks": options.student_blocks,
    }
    traits = {name: value for name, value in traits.items() if value is not None}
    if not options.student:
        family = family_of(teacher)
        return family.reduce(teacher.config, family.smaller(teacher.config, traits))
    if options.student in REDUCTIONS:
        return family_of(teacher).reduce(teacher.config, replace(REDUCTIONS[options.student], **traits))
    if traits:
        raise ValueError(f"--student {options.student} is complete; leave out --student_{next(iter(traits))}")
    return read_student_config(options.student, teacher)


def load_teacher_model(config: Any, preset: Any, run: Run) -> Model:
    """The teacher at the resolution that is asked for, checked against its schedule and the student's prediction type.

    Args:
        config: of the student recipe, complete.
        preset: that it began with.
        run: of the recipe; in a dry run the teacher has no weights.

    Raises:
        ValueError: in one line.
    """
    options, source = config.start, run.find(config.teacher)
    if config.teacher == preset.teacher and not Path(source).exists():
        raise ValueError(
            f"there is no {config.teacher}, the teacher of --preset {config.preset}: recipes/train_teacher_unet.py "
            f"--preset {config.preset} makes it; or name another by --teacher"
        )
    warn_of_preset(config, preset, run.print)
    model, origin = _load_teacher(source, options, config.training.dry_run)
    _set_size(model, options.resolution)
    check_branches(config.matching, model, config.teacher)
    schedule = model.schedule
    own = options.student_prediction_type or schedule.prediction_type
    if (own == "flow_prediction") == (schedule.prediction_type == "flow_prediction"):
        replace(schedule, prediction_type=own).check_convertible(schedule.prediction_type)
    else:
        _check_flow(model, own)
        if schedule.prediction_type == "epsilon" and config.matching.timestep_weighting == "uniform":
            run.print(
                "note: where nearly all is noise, a small error of the teacher's epsilon is a large one of what the "
                "student learns; --timestep_weighting min_snr weighs such draws less"
            )
    check_time_embedding(model.network, schedule, f"the teacher {config.teacher}")
    betas = model.noise_scheduler.config.get("beta_schedule")
    run.print(
        f"schedule: {len(schedule)} steps, {betas or 'flow matching'}; the teacher predicts "
        f"{schedule.prediction_type}, the student {own} (from {origin})"
    )
    return model


def _load_teacher(source: str, options: StudentOptions, dry_run: bool) -> tuple[Model, str]:
    """A teacher of prompts, of classes and latents, or of pixels, and where its schedule is from."""
    found = text_source(source, options)
    if found is not None:
        return _load_text_teacher(found, options, dry_run)
    teacher = load_class_teacher(source, without_weights=dry_run)
    if teacher is not None:
        return teacher
    network, noise_scheduler, origin = load_teacher(source, without_weights=dry_run)
    make = class_teacher_of if isinstance(network, DiTTransformer2DModel) else Model.of_unet
    return make(network, noise_scheduler), origin


def _check_flow(teacher: Model, own: str) -> None:
    """Refuse a student of flow matching, or of none, where its teacher's pipeline or schedule cannot have one."""
    if own != "flow_prediction":
        raise ValueError(
            f"--student_prediction_type {own}: a teacher of flow matching has students of flow_prediction; leave it out"
        )
    if not isinstance(teacher.network, DiTTransformer2DModel):
        raise ValueError(
            "--student_prediction_type flow_prediction is for teachers of flow matching and transformers; leave it out"
        )


def _load_text_teacher(source: TextSource, options: StudentOptions, dry_run: bool) -> tuple[Model, str]:
    """A teacher with prompts, and where its schedule is from; in a dry run without weights."""
    place = source.folder / "scheduler" / "scheduler_config.json"
    noise_scheduler = training_schedule(read_json(place), source.name)
    pipeline = pipeline_without_weights(source) if dry_run else load_parts_of(source, options)
    return Model(pipeline, noise_scheduler, SharedParts(partial(load_parts_of, source, options))), source.name


def _set_size(model: Model, resolution: int | None) -> None:
    """Make a model one for square images of so many pixels, which its VAE, if it has one, divides."""
    unet, factor, size = model.network, model.factor, model.network.config.sample_size
    if isinstance(unet, DiTTransformer2DModel) and resolution not in (None, size * factor):
        raise ValueError(
            f"--resolution {resolution}: a DiT knows the positions of {size * factor} pixels alone; leave it out"
        )
    if resolution is not None:
        if resolution % factor:
            nearest = max(factor, resolution // factor * factor)
            raise ValueError(
                f"--resolution {resolution} is no multiple of {factor}, the pixels that the teacher's VAE makes one "
                f"latent of: take {nearest} or {nearest + factor}"
            )
        unet.register_to_config(sample_size=resolution // factor)
    elif not isinstance(size, int):
        height, width = size
        if height != width:
            raise ValueError(f"the teacher's samples are of {height} x {width}; name a --resolution for square images")
        unet.register_to_config(sample_size=height)
    if hasattr(model.pipeline, "default_sample_size"):  # which SDXL's notes when it is made
        model.pipeline.default_sample_size = unet.config.sample_size


def make_student(options: StudentOptions, teacher: Model, run: Run) -> tuple[Model, bool]:
    """The student, in the teacher's pipeline, and whether it comes with weights of its own."""
    options = replace(options, student=run.find(options.student))
    config = resolve_student(options, teacher.network)
    check_memory(unet_without_weights(config, "the student"), "the student")
    has_weights = bool(options.student) and options.student not in REDUCTIONS and not Path(options.student).is_file()
    if has_weights:
        network = load_unet(options.student)
        network.register_to_config(sample_size=teacher.network.config.sample_size)
    else:
        network = build_student(config)
    run.print(describe_models(teacher.network, network))
    student = teacher.around(network, options.student_prediction_type)
    _tell_of_crossing(student.schedule, run.print)
    return student, has_weights


def _tell_of_crossing(schedule: Schedule, say: Callable[[str], None]) -> None:
    """Say which of the student's timesteps are not drawn, since the teacher's schedule has no such noise."""
    last = len(schedule) - 1 if schedule.last is None else schedule.last
    if missing := schedule.first + len(schedule) - 1 - last:
        say(
            f"schedule: {missing} of the student's {len(schedule):,} timesteps have less or more noise than any of the "
            f"teacher's; draws of them, {missing / len(schedule):.1%} of uniform ones, move to the nearest others, "
            f"{schedule.first} and {last}"
        )


def start_student(
    options: StudentOptions, student: Model, has_weights: bool, teacher: Model, draws: Draws, run: Run
) -> None:
    """Bring the student to the run's device, and one that begins without weights to a start, both in float32.

    Args:
        options: of the recipe.
        student: to start.
        has_weights: of its own.
        teacher: to start from.
        draws: of the run; for large images fewer of them.
        run: begun.

    Raises:
        ValueError: in one line, where the student is not finite.
    """
    network = student.network.to(run.device)
    if options.inherit_weights and not has_weights and run.is_fresh:
        schedule = teacher.schedule.to(run.device)
        _, *sides = draws.samples.shape(draws.samples.read(0))
        count = max(4, min(options.inherit_samples, LARGEST_START // math.prod(sides)))
        batches = list(draws.apart(count, device=run.device, guidance_dropout=0.0))
        family, layers = family_of(network), None
        if isinstance(options.student_blocks, tuple):
            layers = {BLOCKS: options.student_blocks}
        elif options.inherit_layers == "best":
            layers = family.best_layers(network, teacher.network, batches, schedule)
        inheritance = family.inherit(
            network,
            teacher.network,
            channels=options.inherit_channels,
            rescaling=options.inherit_rescaling,
            batches=batches,
            schedule=schedule,
            layers=layers,
            seed=draws.seed,
        )
        run.print(inheritance)
    run.check_finite(network, draws, "the student that training starts from")
    if run.options.gradient_checkpointing:
        network.enable_gradient_checkpointing()


def show_plan(config: Any, teacher: ModelMixin, run: Run) -> None:
    """What would be trained, from configurations alone; the answer comes last.

    Args:
        config: of the student recipe.
        teacher: without weights.
        run: of the recipe.
    """
    start, say = replace(config.start, student=run.find(config.start.student)), run.print
    student = unet_without_weights(resolve_student(start, teacher), "the student")
    before, after = (json.loads(unet.to_json_string()) for unet in (teacher, student))
    changed = {name: value for name, value in after.items() if value != before.get(name)}
    say(f"student: {type(student).__name__}, the teacher's but for {json.dumps(changed) if changed else 'nothing'}")
    for name, unet in (("teacher", teacher), ("student", student)):
        published = published_cost(unet.config)
        if published:
            macs = f", {published.macs:,} MACs" if published.macs else ""
            say(f"{name}, as published: {published.parameters:,} parameters{macs} ({published.source})")
    pairs = pair_named_or_all(config.matching, student, teacher)
    if pairs:
        widths = [f"{pair.student_channels} -> {target_channels(config.matching, pair)}" for pair in pairs]
        say(pair_table(pairs, {f"projector ({config.matching.projector})": widths}))
    say(describe_models(teacher, student))
    if config.data.num_teacher_images is not None:
        say(f"the teacher would draw {config.data.num_teacher_images:,} images of {config.data.dataset} to train on")
    show_memory(config, student, teacher, pairs, run)
    source = run.find(config.teacher)
    is_whole = isinstance(teacher, UNet2DModel) or text_source(source, config.start) or pipeline_index(source)
    if is_whole:
        say(f"the same command without --dry_run trains it, into {config.training.output_dir}")
    else:
        say("with the whole pipeline of such a teacher as --teacher, the same command without --dry_run trains it")


def warn_of_preset(config: Any, preset: Any, say: Callable[[str], None]) -> None:
    """Say where a preset's teacher meets other data than it was trained on, and where features end at once.

    Args:
        config: of the student recipe, complete.
        preset: that it began with.
        say: prints a line.
    """
    data, training, matching = config.data.dataset, config.training, config.matching
    is_of_others = config.data.num_teacher_images is None and data_label(data) != data_label(preset.data.dataset)
    if config.teacher == preset.teacher and is_of_others:
        say(
            f"note: the teacher of --preset {config.preset} was trained on {preset.data.dataset}, not on {data}, and "
            "its students make what it makes; for images of your own: --preset custom --teacher FOLDER_OR_HUB_ID, such "
            "as one that train_teacher_unet.py --preset custom trains"
        )
    last = math.ceil(matching.feature_decay_end * training.max_train_steps)
    if matching.feature_weight and last <= training.lr_warmup_steps and training.lr_scheduler != "constant":
        say(
            f"note: the feature loss ends at step {last}, before the learning rate has risen (--lr_warmup_steps "
            f"{training.lr_warmup_steps}): features hardly train the student"
        )
