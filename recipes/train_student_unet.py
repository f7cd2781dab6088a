"""Distil a teacher UNet into a smaller student.

accelerate launch recipes/train_student_unet.py
accelerate launch recipes/train_student_unet.py --preset custom --teacher FOLDER_OR_HUB_ID --dataset IMAGES
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
import vkd_gen as vkd
from vkd_gen.cli import announce, repository_path, run_recipe
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.reductions import REDUCTIONS
from vkd_gen.training.options import (
    METHODS,
    DataOptions,
    MatchingOptions,
    StudentOptions,
    TrainingOptions,
    complete,
    default_cifar10,
    flat_config,
)

if TYPE_CHECKING:
    from diffusers import ModelMixin


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Distil a teacher into a student."""

    preset: str = "digits"
    """Which of digits, mnist, cifar10 and custom to start from; every flag overrides a field of it."""
    teacher: str = ""
    """Folder of a diffusers pipeline, of a UNet or of a recipe's run, or a hub id. Wherever a hub id is taken,
    ID@REVISION is a commit, tag or branch of it."""
    data: DataOptions = field(default_factory=DataOptions)
    """Images to train on."""
    matching: MatchingOptions = field(default_factory=MatchingOptions)
    """How the student learns from the teacher."""
    start: StudentOptions = field(default_factory=StudentOptions)
    """The student and what it starts from."""
    scores: ScoreOptions = field(default_factory=lambda: ScoreOptions(extractor="none"))
    """What samples are scored by."""
    score_teacher: bool = True
    """Score the teacher's samples too; without, its row holds its cost and errors alone."""
    training: TrainingOptions
    """Options of the training loop."""


DIGITS = StudentConfig(
    teacher="recipes/assets/digits-teacher",
    data=DataOptions(dataset="digits"),
    scores=ScoreOptions(extractor="auto", kid_subset_size=250, num_inference_steps=25),
    training=TrainingOptions(
        output_dir="runs/digits", max_train_steps=1000, learning_rate=2e-3, preview_every_steps=250
    ),
)
MNIST = replace(
    DIGITS,
    preset="mnist",
    teacher="recipes/assets/mnist-teacher",
    data=DataOptions(dataset="mnist"),
    start=StudentOptions(student="bk-base"),
    training=replace(
        DIGITS.training,
        output_dir="runs/mnist",
        train_batch_size=64,
        max_train_steps=2000,
        learning_rate=1e-3,
        preview_every_steps=500,
    ),
)
CIFAR10 = replace(
    DIGITS,
    preset="cifar10",
    teacher="runs/cifar10-teacher/pipeline",
    data=DataOptions(dataset=default_cifar10(), random_flip=True),
    scores=ScoreOptions(extractor="none"),
    training=replace(
        DIGITS.training,
        output_dir="runs/cifar10",
        max_train_steps=50_000,
        learning_rate=4e-4,
        preview_every_steps=5000,
        checkpointing_steps=5000,
        dataloader_num_workers=4,
    ),
)
CUSTOM = replace(
    CIFAR10,
    preset="custom",
    teacher="",
    data=DataOptions(),
    training=replace(CIFAR10.training, output_dir="runs/custom"),
)
PRESETS = {config.preset: config for config in (DIGITS, MNIST, CIFAR10, CUSTOM)}


def show_plan(config: StudentConfig, start: StudentOptions, teacher: "ModelMixin", show: Callable[[str], None]) -> None:
    """What would be trained, from configurations alone."""
    from diffusers import UNet2DModel

    from vkd_gen.evaluation.compare import describe_models
    from vkd_gen.pairing import pair_table
    from vkd_gen.training.matching import pair_named_or_all, target_channels
    from vkd_gen.training.models import unet_without_weights
    from vkd_gen.training.students import resolve_student

    student = unet_without_weights(resolve_student(start, teacher), "the student")
    before, after = (json.loads(unet.to_json_string()) for unet in (teacher, student))
    changed = {name: value for name, value in after.items() if value != before.get(name)}
    show(f"student: {type(student).__name__}, the teacher's but for {json.dumps(changed) if changed else 'nothing'}")
    show(describe_models(teacher, student))
    for name, unet in (("teacher", teacher), ("student", student)):
        published = vkd.published_cost(unet.config)
        if published:
            macs = f", {published.macs:,} MACs" if published.macs else ""
            show(f"{name}, as published: {published.parameters:,} parameters{macs} ({published.source})")
    pairs = pair_named_or_all(config.matching, student, teacher)
    if pairs:
        widths = [f"{pair.student_channels} -> {target_channels(config.matching, pair)}" for pair in pairs]
        show(pair_table(pairs, {f"projector ({config.matching.projector})": widths}))
    if not isinstance(teacher, UNet2DModel):
        show(f"this recipe cannot train it: a {type(teacher).__name__} needs another recipe, with text and latents")
    show(json.dumps(flat_config(config), indent=2))


def main(config: StudentConfig) -> None:
    """Distil, export, score and show one student."""
    if not config.teacher:
        raise ValueError(f"--preset {config.preset} needs --teacher and --dataset")
    config = complete(config)
    preset, teacher_path = PRESETS[config.preset], repository_path(config.teacher, __file__)
    if config.teacher == preset.teacher and not Path(teacher_path).exists():
        raise ValueError(
            f"there is no {config.teacher}, the teacher of --preset {config.preset}: recipes/train_teacher_unet.py "
            f"--preset {config.preset} makes it; or name another by --teacher"
        )
    aim = "what would be trained" if config.training.dry_run else f"into {config.training.output_dir}"
    announce(f"distilling {config.teacher} on {config.data.dataset}, {aim}")

    import torch
    from diffusers import DDPMScheduler

    from vkd_gen.data.images import evenly_spaced
    from vkd_gen.distillation import matching_table
    from vkd_gen.evaluation.compare import compare_to_teacher, describe_models, markdown_table, print_table
    from vkd_gen.evaluation.diagnostics_figure import save_diagnostics
    from vkd_gen.evaluation.report import save_results
    from vkd_gen.evaluation.scorer import make_scorer
    from vkd_gen.pipelines import num_classes_of
    from vkd_gen.provenance import hub_revision, only_warns
    from vkd_gen.training.accelerator import compile_as_asked, make_accelerator, on_main_process
    from vkd_gen.training.export import (
        after_export,
        check_upload,
        export_pipeline,
        finish_export,
        model_card,
        try_export,
    )
    from vkd_gen.training.facts import compare_folder, hash_model, run_facts, start_folder
    from vkd_gen.training.finished import show_if_finished
    from vkd_gen.training.images import load_data, prepare_data
    from vkd_gen.training.loop import TrainingRun, fixed_batches
    from vkd_gen.training.matching import build_projected_student, pair_named_or_all
    from vkd_gen.training.models import check_checkpoint, load_teacher
    from vkd_gen.training.probe import check_finite, check_time_embedding
    from vkd_gen.training.run_folder import RunFolder
    from vkd_gen.training.students import build_resolved_student, inherit, num_starting_draws

    torch.set_float32_matmul_precision("high")
    options, matching = config.training, config.matching
    folder = RunFolder(options.output_dir)
    scored_by = {**asdict(config.scores), "score_teacher": config.score_teacher}
    if not options.dry_run:  # which writes nothing, whatever the folder holds
        folder.check(flat_config(config), options.resume_from_checkpoint)
        check_checkpoint(folder.resume_point(options.resume_from_checkpoint))
        check_upload(options)
    accelerator = make_accelerator(
        options,
        # A loss of features alone does not reach the output layer, one without features no trained projector.
        find_unused_parameters=not (matching.denoising_weight or matching.output_weight) or matching.ends_early,
    )

    if config.teacher == preset.teacher and data_label(config.data.dataset) != data_label(preset.data.dataset):
        accelerator.print(
            f"note: the teacher of --preset {config.preset} was trained on {preset.data.dataset}, not on "
            f"{config.data.dataset}, and its students make what it makes; for images of your own: --preset custom "
            "--teacher FOLDER_OR_HUB_ID, such as one that train_teacher_unet.py --preset custom trains"
        )
    last = math.ceil(matching.feature_decay_end * options.max_train_steps)
    if matching.feature_weight and last <= (options.lr_warmup_steps or 0) and options.lr_scheduler != "constant":
        accelerator.print(
            f"note: the feature loss ends at step {last}, before the learning rate has risen (--lr_warmup_steps "
            f"{options.lr_warmup_steps}): features hardly train the student"
        )
    teacher_unet, teacher_scheduler, schedule_origin = load_teacher(teacher_path, without_weights=options.dry_run)
    if config.start.resolution is not None:
        teacher_unet.register_to_config(sample_size=config.start.resolution)
    prediction_type = vkd.Schedule.of(teacher_scheduler).prediction_type
    noise_scheduler = DDPMScheduler.from_config(
        teacher_scheduler.config, prediction_type=config.start.student_prediction_type or prediction_type
    )
    schedule = vkd.Schedule.of(noise_scheduler).to(accelerator.device)
    schedule.check_convertible(prediction_type)
    check_time_embedding(teacher_unet, schedule, f"the teacher {config.teacher}")
    accelerator.print(
        f"schedule: {len(schedule)} steps, {noise_scheduler.config.beta_schedule}; the teacher predicts "
        f"{prediction_type}, the student {schedule.prediction_type} (from {schedule_origin})"
    )
    start = replace(config.start, student=repository_path(config.start.student, __file__))
    if options.dry_run:
        show_plan(config, start, teacher_unet, accelerator.print)
        return
    student, has_weights = build_resolved_student(start, teacher_unet)
    pairs = pair_named_or_all(matching, student, teacher_unet)
    accelerator.print(describe_models(teacher_unet, student))

    num_classes = num_classes_of(student)
    loaded = load_data(
        replace(config.data, dataset=repository_path(config.data.dataset, __file__)),
        resolution=student.config.sample_size,
        channels=student.config.in_channels,
        with_labels=num_classes is not None,
        num_classes=num_classes,
    )
    stream, images, held_out = prepare_data(loaded, accelerator, config.data)
    scores = replace(config.scores, extractor=repository_path(config.scores.extractor, __file__))
    scorer = make_scorer(scores, images, held_out, batch_size=options.eval_batch_size)
    if config.data.max_train_samples is not None:
        images = evenly_spaced(images, config.data.max_train_samples)
        accelerator.print(f"training on {len(images):,} of them")
    facts = {**flat_config(config), **run_facts(accelerator, images, stream)}
    for name, source in (("teacher_revision", config.teacher), ("student_revision", config.start.student)):
        if (revision := hub_revision(source)) is not None:
            facts[name] = revision
    facts["teacher_sha256"] = hash_model(teacher_unet.state_dict(), teacher_unet, teacher_scheduler)
    if config.start.student not in ("", *REDUCTIONS):
        facts["student_sha256"] = hash_model(student.state_dict() if has_weights else {}, student)
    draws = partial(
        fixed_batches,
        images,
        schedule,
        seed=options.seed,
        batch_size=options.eval_batch_size,
        device=accelerator.device,
    )
    few = next(draws(4))
    check_finite(teacher_unet.to(accelerator.device), schedule, few, f"the teacher {config.teacher}")
    facts = compare_folder(folder, accelerator, facts, images, held_out)
    if show_if_finished(folder, options, scored_by, print_table):
        return
    start_folder(folder, accelerator, facts, images, held_out)
    resumes = folder.resume_point(options.resume_from_checkpoint) is not None
    if start.inherit_weights and not has_weights and not resumes:
        batches = list(draws(num_starting_draws(start, images.resolution)))
        student = student.to(accelerator.device)
        accelerator.print(inherit(start, student, teacher_unet, batches, schedule, seed=options.seed))
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    torch.nn.Module.to(teacher_unet, accelerator.device, dtype)  # past diffusers' warning about casting
    teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs], prediction_type=prediction_type)
    check_finite(teacher, schedule, few, f"the teacher {config.teacher}")
    check_finite(student.to(accelerator.device), schedule, few, "the student that training starts from")
    exported, title = folder.path / "pipeline", f"{data_label(config.data.dataset)} student"
    card = {"teacher": config.teacher, "method": matching.method, "steps": options.max_train_steps}
    card |= {"seed": options.seed}
    describe = partial(model_card, title, data=config.data.dataset, num_classes=num_classes)
    on_main_process(
        lambda: try_export(
            student,
            noise_scheduler,
            exported,
            describe(card, ""),
            num_inference_steps=config.scores.num_inference_steps,
            name="the student",
        )
    )
    calibration = folder.path / "calibration.safetensors"
    projected, balance = build_projected_student(
        matching,
        student,
        teacher,
        pairs,
        partial(draws, guidance_dropout=config.data.guidance_dropout),
        schedule,
        num_steps=options.max_train_steps,
        calibration=calibration,
        resumes=resumes,
        device=accelerator.device,
    )
    if pairs:
        accelerator.print(matching_table(projected, matching.feature_loss))
    if accelerator.is_main_process and pairs:
        saved = {pair.teacher: norm.statistics for pair, norm in zip(pairs, projected.normalizers, strict=True)}
        vkd.save_statistics(saved, calibration)

    run = TrainingRun(
        accelerator=accelerator,
        options=options,
        folder=folder,
        model=projected,
        unet=student,
        parameter_groups=vkd.parameter_groups(student, projected.projectors, options.adam_weight_decay),
        images=images,
        noise_scheduler=noise_scheduler,
        random_flip=config.data.random_flip,
        guidance_dropout=config.data.guidance_dropout,
        stream=stream,
        config=flat_config(config),
        score=(lambda unet: scorer.score_unet("student", unet, noise_scheduler)[0]) if scorer else None,
        diagnose=balance.look,
    )
    teacher_in_steps = compile_as_asked(accelerator, teacher)
    for batch in run.batches():
        losses = vkd.distillation_losses(
            run.model,
            batch,
            schedule=schedule,
            teacher=teacher_in_steps,
            weights=balance.weights(run.step),
            feature_loss_kind=matching.feature_loss,
            timestep_weighting=matching.timestep_weighting,
            snr_gamma=matching.snr_gamma,
        )
        run.backward(losses)

    student = run.finish()
    card |= {"training": run.cost()}
    # Exported before it is scored, so that nothing which fails from here on can lose it.
    run.on_main_process(lambda: export_pipeline(student, noise_scheduler, exported, describe(card, "")))
    with after_export(exported):
        results, samples = compare_to_teacher(
            student,
            noise_scheduler,
            teacher,
            teacher_scheduler,
            held_out=held_out,
            scorer=scorer,
            num_inference_steps=config.scores.num_inference_steps,
            batch_size=options.eval_batch_size,
            score_teacher=config.score_teacher,
        )
        if accelerator.is_main_process:
            save_results(folder.path, {**results, "scored_by": scored_by}, samples)
    run.end()
    if accelerator.is_main_process:
        figure = folder.path / "diagnostics.png"
        with only_warns(f"the figure {figure}", "the numbers are in metrics.jsonl"):
            save_diagnostics(folder.path / "metrics.jsonl", figure)
        finish_export(exported, lambda: describe(card, markdown_table(results)), options)
        print_table(results)
        print(f"student: {exported}\nsamples: {folder.path / 'samples.png'}\nreport: {folder.path / 'report.html'}")
        if figure.exists():
            print(f"diagnostics: {figure}")


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="digits", methods=METHODS)
