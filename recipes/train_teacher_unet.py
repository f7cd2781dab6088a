"""Train a teacher: the one that a preset of train_student_unet.py names, or one for your images.

accelerate launch recipes/train_teacher_unet.py --preset digits --output_dir runs/digits-teacher
accelerate launch recipes/train_teacher_unet.py --preset digits --class_conditional --output_dir runs/digits-by-class
accelerate launch recipes/train_teacher_unet.py --preset custom --dataset IMAGES --resolution 32 --channels 3
"""

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from vkd_gen.cli import announce, run_recipe

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.training.options import (
    DataOptions,
    TrainingOptions,
    complete,
    default_cifar10,
    flat_config,
)

if TYPE_CHECKING:
    from diffusers import UNet2DModel


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Train a diffusion UNet from random weights."""

    preset: str = "digits"
    """Which of digits, mnist, cifar10 and custom to start from; every flag overrides a field of it."""
    data: DataOptions
    """Images to train on."""
    class_conditional: bool = False
    """Learn images of given classes: the labels come from the data, and their number decides the network's."""
    resolution: int
    """Height and width of the images in pixels."""
    channels: int = 1
    """1 for grey, 3 for RGB."""
    block_out_channels: tuple[int, ...]
    """Channels of each stage, from the highest resolution to the lowest."""
    attention_stages: tuple[int, ...] = ()
    """Stages, counted from 0, whose blocks have self-attention; the middle block has it if any stage does."""
    layers_per_block: int = 2
    """Residual layers of each block."""
    norm_num_groups: int = 8
    """Groups of the group norms; divides every stage's channels."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts."""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule, 1,000 steps."""
    scores: ScoreOptions = field(default_factory=lambda: ScoreOptions(extractor="none"))
    """What samples are scored by."""
    training: TrainingOptions
    """Options of the training loop."""


DIGITS = TeacherConfig(
    data=DataOptions(dataset="digits"),
    resolution=8,
    block_out_channels=(32, 64),
    scores=ScoreOptions(extractor="auto", kid_subset_size=250, num_inference_steps=25),
    training=TrainingOptions(output_dir="runs/digits-teacher", max_train_steps=3500, learning_rate=2e-3),
)
MNIST = replace(
    DIGITS,
    preset="mnist",
    data=DataOptions(dataset="mnist"),
    resolution=28,
    block_out_channels=(16, 32, 64),
    training=replace(
        DIGITS.training,
        output_dir="runs/mnist-teacher",
        max_train_steps=6000,
        learning_rate=1e-3,
        train_batch_size=64,
        preview_every_steps=1000,
    ),
)
CIFAR10 = replace(
    DIGITS,
    preset="cifar10",
    data=DataOptions(dataset=default_cifar10(), random_flip=True),
    resolution=32,
    channels=3,
    block_out_channels=(64, 128, 128, 128),
    attention_stages=(1,),
    norm_num_groups=32,
    scores=ScoreOptions(extractor="none"),
    training=replace(
        DIGITS.training,
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


def build_unet(config: TeacherConfig, num_classes: int = 0) -> "UNet2DModel":
    """The UNet that the configuration describes; with classes it knows one label more, for no class."""
    from diffusers import UNet2DModel

    from vkd_gen.training.models import check_memory, unet_without_weights

    stages = range(len(config.block_out_channels))
    with_attention = [stage in config.attention_stages for stage in stages]
    if not with_attention:
        raise ValueError("--block_out_channels must name at least one stage")
    least = {"--resolution": config.resolution, "--norm_num_groups": config.norm_num_groups}
    least |= {"--layers_per_block": config.layers_per_block, "--block_out_channels": min(config.block_out_channels)}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if set(config.attention_stages) - set(stages):
        raise ValueError(f"--attention_stages must name stages 0 to {len(stages) - 1}")
    if config.resolution % 2 ** (len(stages) - 1):
        raise ValueError(
            f"--resolution {config.resolution} cannot be halved {len(stages) - 1} times, once between each two of "
            f"the {len(stages)} stages of --block_out_channels"
        )
    if any(channels % config.norm_num_groups for channels in config.block_out_channels):
        raise ValueError(
            f"--norm_num_groups {config.norm_num_groups} must divide each of --block_out_channels "
            f"{' '.join(map(str, config.block_out_channels))}"
        )
    entries = {
        "sample_size": config.resolution,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "block_out_channels": config.block_out_channels,
        "down_block_types": tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in with_attention),
        "up_block_types": tuple(
            "AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(with_attention)
        ),
        "add_attention": any(with_attention),
        "attention_head_dim": 32,
        "norm_num_groups": config.norm_num_groups,
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }
    check_memory(unet_without_weights(entries, "the teacher"), "the teacher")  # before any of it is taken
    return UNet2DModel(**entries)


def main(config: TeacherConfig) -> None:
    """Train, export and sample one teacher."""
    config = complete(config)
    options, preset = config.training, PRESETS[config.preset]
    aim = "what would be trained" if options.dry_run else f"into {options.output_dir}"
    announce(f"a teacher of {config.data.dataset}, {aim}")

    from diffusers import DDPMScheduler

    from vkd_gen.evaluation.cost import count_parameters
    from vkd_gen.families import family_of
    from vkd_gen.losses import prediction_loss
    from vkd_gen.models import Model
    from vkd_gen.training.loop import Loop
    from vkd_gen.training.run import Run

    with Run(options, flat_config(config), script=__file__) as run:
        data, form = config.data.dataset, (config.resolution, config.channels)
        is_of_preset = not preset.data.dataset or data_label(data) == data_label(preset.data.dataset)
        if not is_of_preset and form == (preset.resolution, preset.channels):
            run.print(
                f"note: {data} becomes {form[0]} x {form[0]} pixels in {'grey' if form[1] == 1 else 'RGB'}, as "
                f"--preset {config.preset} is for {preset.data.dataset}; for images of your own: --preset custom, with "
                "--resolution and --channels"
            )
        # The number of classes is the data's: those come first then, in a dry run too.
        by_class, num_classes = config.class_conditional, 0
        if by_class:
            num_classes = run.load_data(config.data, form, num_classes=0).train.num_classes
        unet = build_unet(config, num_classes)
        classes = f", for {num_classes} classes" if num_classes else ""
        run.print(f"{data_label(data)}: a UNet of {count_parameters(unet):,} parameters{classes}")
        if options.dry_run:
            run.print(f"the same command without --dry_run trains it, into {options.output_dir}")
            return
        if not by_class:
            run.load_data(config.data, form)
        scorer = run.make_scorer(config.scores)
        if not run.begin({}, asdict(config.scores)):
            return
        if options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        scheduler = DDPMScheduler(prediction_type=config.prediction_type, beta_schedule=config.beta_schedule)
        teacher = Model.of_unet(unet, scheduler)
        draws = run.data.draws(teacher.schedule, config.data, seed=options.seed, batch_size=options.eval_batch_size)
        facts = {"parameters": f"{count_parameters(unet):,}"}
        steps = config.scores.num_inference_steps
        run.try_end("teacher", teacher, facts, dataset=data, num_inference_steps=steps)

        groups = [{"params": list(unet.parameters()), "weight_decay": options.adam_weight_decay}]
        loop = Loop(run, unet, draws, average=unet, parameter_groups=groups)
        loop.every(options.preview_every_steps, run.preview(teacher), averaged=True)
        loop.every(options.score_every_steps, run.score("teacher", teacher, scorer), averaged=True)
        schedule, call = teacher.schedule.to(run.device), family_of(unet).call
        for batch in loop:
            sample, noise, timesteps, conditioning = batch.values()
            prediction = call(loop.module, schedule.noisy(sample, noise, timesteps), timesteps, conditioning)
            loop.backward({"total": prediction_loss(prediction, schedule.target(sample, noise, timesteps))})
        loop.finish()
        run.finish({"teacher": teacher}, scorer, shows_data=True)


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="digits")
