"""Distil a teacher, a UNet or a diffusion transformer, into a smaller student.

accelerate launch recipes/train_student_unet.py
accelerate launch recipes/train_student_unet.py --preset custom --teacher FOLDER_OR_HUB_ID --dataset IMAGES
"""

from dataclasses import asdict, dataclass, field, replace

# What takes seconds to load, torch and all that needs it, is imported in `main`: flags are read before.
import vkd_gen as vkd
from vkd_gen.cli import Rare, announce, run_recipe
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.training.methods import METHODS, MatchingOptions
from vkd_gen.training.options import (
    DataOptions,
    StudentOptions,
    TrainingOptions,
    complete,
    default_cifar10,
    flat_config,
)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Distil a teacher into a student."""

    preset: str = "digits"
    """What the other flags start from: digits, mnist, emoji, cifar10 or custom."""
    teacher: str = ""
    """Folder or hub id (ID@REVISION) of a recipe's run, a UNet, or a diffusers pipeline (UNet, Stable Diffusion, DiT);
    or a .safetensors checkpoint of Stable Diffusion. For --dry_run also a config.json, or a name such as
    stable-diffusion-1."""
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions
    start: StudentOptions = field(default_factory=StudentOptions)
    matching: MatchingOptions = field(default_factory=MatchingOptions)
    scores: ScoreOptions = field(default_factory=lambda: ScoreOptions(extractor="none"))
    score_teacher: Rare[bool] = True
    """Score the teacher's samples too; if off, its row shows only cost and errors."""


# Muon is nearer to the teacher on small sets of pixels (experiments/RESULTS.md), and was tried on little else.
PIXELS = {"optimizer": "muon", "timestep_sampling": "stratified", "lr_scheduler": "linear", "preview_every_steps": 500}
DIGITS = StudentConfig(
    teacher="recipes/assets/digits-teacher",
    data=DataOptions(dataset="digits"),
    scores=ScoreOptions(extractor="auto", kid_subset_size=250, num_inference_steps=25),
    training=TrainingOptions(output_dir="runs/digits", learning_rate=2e-3, **PIXELS),
)
MNIST = replace(
    DIGITS,
    preset="mnist",
    teacher="recipes/assets/mnist-teacher",
    data=DataOptions(dataset="mnist"),
    start=StudentOptions(student="bk-base"),
    training=TrainingOptions(output_dir="runs/mnist", train_batch_size=64, max_train_steps=2000, **PIXELS),
)
EMOJI = StudentConfig(
    preset="emoji",
    teacher="recipes/assets/emoji-teacher",
    data=DataOptions(dataset="emoji"),
    scores=ScoreOptions(extractor="none", num_inference_steps=25, guidance_scale=4),
    training=TrainingOptions(
        output_dir="runs/emoji",
        train_batch_size=32,
        max_train_steps=400,
        preview_every_steps=200,
        validation_prompts=("hot dog", "grapes", "cactus", "cow", "fish", "penguin", "purple circle", "orange circle"),
    ),
)
CIFAR10 = StudentConfig(
    preset="cifar10",
    teacher="runs/cifar10-teacher/pipeline",
    data=DataOptions(dataset=default_cifar10(), random_flip=True),
    training=TrainingOptions(
        output_dir="runs/cifar10",
        max_train_steps=50_000,
        learning_rate=4e-4,
        preview_every_steps=5000,
        checkpointing_steps=5000,
        dataloader_num_workers=4,
    ),
)
CUSTOM_TRAINING = replace(CIFAR10.training, output_dir="runs/custom")
CUSTOM = replace(CIFAR10, preset="custom", teacher="", data=DataOptions(), training=CUSTOM_TRAINING)
PRESETS = {config.preset: config for config in (DIGITS, MNIST, EMOJI, CIFAR10, CUSTOM)}


def main(config: StudentConfig) -> None:
    """Distil, export, score and show one student."""
    config = complete(config)
    options, matching = config.training, config.matching
    aim = "what would be trained" if options.dry_run else f"into {options.output_dir}"
    announce(f"distilling {config.teacher} on {config.data.dataset}, {aim}")

    from vkd_gen.training import students
    from vkd_gen.training.accelerator import compile_as_asked
    from vkd_gen.training.loop import Loop
    from vkd_gen.training.matching import build_projected_student, measure_at_times, pair_named_or_all
    from vkd_gen.training.run import Run

    # A loss of features alone does not reach the output layer, one without features no trained projector.
    unused = not matching.denoising_weight + matching.output_weight or matching.ends_early
    with Run(options, flat_config(config), script=__file__, find_unused_parameters=unused) as run:
        teacher = students.load_teacher_model(config, PRESETS[config.preset], run)
        if options.dry_run:
            students.show_plan(config, teacher.network, run)
            return
        student, has_weights = students.make_student(config.start, teacher, run)
        pairs = pair_named_or_all(matching, student.network, teacher.network)
        run.load_data_for(student, config.data, teacher)
        scorer = run.make_scorer(config.scores)
        run.encode_data(config.data, teacher, student)
        draws = run.draws(student.schedule, both_branches=matching.guidance_branches == "both")
        run.check_finite(teacher.network.to(run.device), draws, f"the teacher {config.teacher}")
        sources = {"teacher": (config.teacher, teacher, True), "student": (config.start.student, student, has_weights)}
        if not run.begin(sources, {**asdict(config.scores), "score_teacher": config.score_teacher}):
            return
        students.start_student(config.start, student, has_weights, teacher, draws, run)
        frozen = run.freeze(teacher, [pair.teacher for pair in pairs], draws)
        run.try_end("student", student, {"teacher": config.teacher, "method": matching.method})
        projected, features = build_projected_student(matching, student.network, frozen, pairs, draws, run)

        groups = vkd.parameter_groups(student.network, projected.projectors, options.adam_weight_decay)
        loop = Loop(run, projected, draws, average=student.network, parameter_groups=groups)
        measure_at_times(loop, features, matching, projected, frozen, draws)
        loop.every(options.preview_every_steps, run.preview(student, teacher), averaged=True)
        loop.every(options.score_every_steps, run.score("student", student, scorer), averaged=True)
        schedule, asked = student.schedule.to(run.device), compile_as_asked(run.accelerator, frozen)
        for batch in loop:
            losses = vkd.distillation_losses(
                loop.module,
                batch,
                schedule=schedule,
                teacher=asked,
                weights=features.weights(loop.step),
                feature_loss_kind=matching.feature_loss,
                timestep_weighting=matching.timestep_weighting,
                snr_gamma=matching.snr_gamma,
            )
            loop.backward(losses)
        loop.finish()
        scored = None if config.score_teacher else {"student"}
        run.finish({"teacher": teacher, "student": student}, scorer, scored=scored)


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="digits", methods=METHODS)
