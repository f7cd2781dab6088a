"""Train a teacher: the one that a preset of train_student_unet.py names, or one for your images.

accelerate launch recipes/train_teacher_unet.py --preset digits --output_dir runs/digits-teacher
accelerate launch recipes/train_teacher_unet.py --preset digits --class_conditional --output_dir runs/digits-by-class
accelerate launch recipes/train_teacher_unet.py --preset custom --dataset IMAGES --resolution 32 --channels 3
"""

from dataclasses import asdict, dataclass, field, replace

# What takes seconds to load, torch and all that needs it, is imported in `main`: flags are read before.
from vkd_gen.cli import announce, run_recipe
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.training.options import (
    DataOptions,
    TeacherOptions,
    TrainingOptions,
    complete,
    default_cifar10,
    flat_config,
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Train a diffusion UNet from random weights."""

    preset: str = "digits"
    """What the other flags start from: digits, mnist, cifar10 or custom."""
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions
    teacher: TeacherOptions
    scores: ScoreOptions = field(default_factory=lambda: ScoreOptions(extractor="none"))


DIGITS = TeacherConfig(
    data=DataOptions(dataset="digits"),
    teacher=TeacherOptions(),
    scores=ScoreOptions(extractor="auto", kid_subset_size=250, num_inference_steps=25),
    training=TrainingOptions(output_dir="runs/digits-teacher", max_train_steps=3500, learning_rate=2e-3),
)
MNIST = replace(
    DIGITS,
    preset="mnist",
    data=DataOptions(dataset="mnist"),
    teacher=TeacherOptions(resolution=28, block_out_channels=(16, 32, 64)),
    training=TrainingOptions(
        output_dir="runs/mnist-teacher",
        max_train_steps=6000,
        learning_rate=1e-3,
        train_batch_size=64,
        preview_every_steps=1000,
    ),
)
CIFAR10 = TeacherConfig(
    preset="cifar10",
    data=DataOptions(dataset=default_cifar10(), random_flip=True),
    teacher=TeacherOptions(
        resolution=32, channels=3, block_out_channels=(64, 128, 128, 128), attention_stages=(1,), norm_num_groups=32
    ),
    training=TrainingOptions(
        output_dir="runs/cifar10-teacher",
        max_train_steps=100_000,
        learning_rate=4e-4,
        preview_every_steps=5000,
        checkpointing_steps=5000,
        dataloader_num_workers=4,
    ),
)
CUSTOM = replace(
    CIFAR10,
    preset="custom",
    data=DataOptions(),
    training=replace(CIFAR10.training, output_dir="runs/custom-teacher"),
)
PRESETS = {config.preset: config for config in (DIGITS, MNIST, CIFAR10, CUSTOM)}


def main(config: TeacherConfig) -> None:
    """Train, export and sample one teacher."""
    config = complete(config)
    options, dataset, preset = config.training, config.data.dataset, PRESETS[config.preset]
    aim = "what would be trained" if options.dry_run else f"into {options.output_dir}"
    announce(f"a teacher of {dataset}, {aim}")

    from vkd_gen.evaluation.cost import count_parameters
    from vkd_gen.families import family_of
    from vkd_gen.losses import prediction_loss
    from vkd_gen.training.loop import Loop
    from vkd_gen.training.run import Run
    from vkd_gen.training.teachers import build_teacher, warn_of_form

    with Run(options, flat_config(config), script=__file__) as run:
        warn_of_form(dataset, config.teacher, preset.data.dataset, preset.teacher, run.print)
        form, num_classes = (config.teacher.resolution, config.teacher.channels), 0
        if config.teacher.class_conditional:  # the number of classes is the data's: those come first, dry run or not
            num_classes = run.load_data(config.data, form, num_classes=0).train.num_classes
        teacher = build_teacher(config.teacher, num_classes)
        parameters = f"{count_parameters(teacher.network):,}"
        classes = f", for {num_classes} classes" if num_classes else ""
        run.print(f"{data_label(dataset)}: a UNet of {parameters} parameters{classes}")
        if options.dry_run:
            run.print(f"the same command without --dry_run trains it, into {options.output_dir}")
            return
        if not config.teacher.class_conditional:
            run.load_data(config.data, form)
        scorer = run.make_scorer(config.scores)
        if not run.begin({}, asdict(config.scores)):
            return
        if options.gradient_checkpointing:
            teacher.network.enable_gradient_checkpointing()
        draws = run.draws(teacher.schedule)
        run.try_end("teacher", teacher, {"parameters": parameters})

        groups = [{"params": list(teacher.network.parameters()), "weight_decay": options.adam_weight_decay}]
        loop = Loop(run, teacher.network, draws, average=teacher.network, parameter_groups=groups)
        loop.every(options.preview_every_steps, run.preview(teacher), averaged=True)
        loop.every(options.score_every_steps, run.score("teacher", teacher, scorer), averaged=True)
        schedule, call = teacher.schedule.to(run.device), family_of(teacher.network).call
        for batch in loop:
            sample, noise, timesteps, conditioning = batch.values()
            prediction = call(loop.module, schedule.noisy(sample, noise, timesteps), timesteps, conditioning)
            loop.backward({"total": prediction_loss(prediction, schedule.target(sample, noise, timesteps))})
        loop.finish()
        run.finish({"teacher": teacher}, scorer, shows_data=True)


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="digits")
