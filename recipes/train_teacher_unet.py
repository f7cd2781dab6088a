"""Train a teacher: the one that a preset of train_student_unet.py names, or one for your images.

accelerate launch recipes/train_teacher_unet.py --preset digits --output_dir runs/digits-teacher
accelerate launch recipes/train_teacher_unet.py --preset digits --class_conditional --output_dir runs/digits-by-class
accelerate launch recipes/train_teacher_unet.py --preset custom --dataset IMAGES --resolution 32 --channels 3
"""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from vkd_gen.cli import announce, repository_path, run_recipe

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
    aim = "what would be trained" if config.training.dry_run else f"into {config.training.output_dir}"
    announce(f"a teacher of {config.data.dataset}, {aim}")

    import torch
    from diffusers import DDPMScheduler

    from vkd_gen.evaluation.compare import markdown_table, print_table, score_model
    from vkd_gen.evaluation.cost import count_parameters
    from vkd_gen.evaluation.report import save_results
    from vkd_gen.evaluation.scorer import make_scorer
    from vkd_gen.families.unet import call
    from vkd_gen.losses import prediction_loss
    from vkd_gen.pictures import to_uint8
    from vkd_gen.pipelines import num_classes_of
    from vkd_gen.training.accelerator import make_accelerator, on_main_process
    from vkd_gen.training.export import (
        after_export,
        check_upload,
        export_pipeline,
        finish_export,
        model_card,
        try_export,
    )
    from vkd_gen.training.facts import compare_folder, run_facts, start_folder
    from vkd_gen.training.finished import show_if_finished
    from vkd_gen.training.images import load_data, prepare_data
    from vkd_gen.training.loop import TrainingRun
    from vkd_gen.training.models import check_checkpoint
    from vkd_gen.training.run_folder import RunFolder

    torch.set_float32_matmul_precision("high")
    options = config.training
    folder = RunFolder(options.output_dir)
    scored_by = asdict(config.scores)
    if not config.training.dry_run:  # which writes nothing, whatever the folder holds
        folder.check(flat_config(config), options.resume_from_checkpoint)
        check_checkpoint(folder.resume_point(options.resume_from_checkpoint))
        check_upload(options)
    accelerator = make_accelerator(options)
    preset = PRESETS[config.preset]
    form, of_preset = ((given.resolution, given.channels) for given in (config, preset))
    if preset.data.dataset and form == of_preset and data_label(config.data.dataset) != data_label(preset.data.dataset):
        accelerator.print(
            f"note: {config.data.dataset} becomes {config.resolution} x {config.resolution} pixels in "
            f"{'grey' if config.channels == 1 else 'RGB'}, as --preset {config.preset} is for {preset.data.dataset}; "
            "for images of your own: --preset custom, with --resolution and --channels"
        )
    # The number of classes is the data's: those come first then, in a dry run too.
    load = partial(
        load_data,
        replace(config.data, dataset=repository_path(config.data.dataset, __file__)),
        resolution=config.resolution,
        channels=config.channels,
        with_labels=config.class_conditional,
    )
    loaded = load() if config.class_conditional else None
    num_classes = loaded.train.num_classes if loaded else 0
    unet = build_unet(config, num_classes)
    classes = f", for {num_classes} classes" if num_classes else ""
    data = data_label(config.data.dataset)
    accelerator.print(f"{data}: a UNet of {count_parameters(unet):,} parameters{classes}")
    if config.training.dry_run:
        accelerator.print(json.dumps(flat_config(config), indent=2))
        return
    stream, images, held_out = prepare_data(loaded or load(), accelerator, config.data)
    scores = replace(config.scores, extractor=repository_path(config.scores.extractor, __file__))
    scorer = make_scorer(scores, images, held_out, batch_size=options.eval_batch_size)
    facts = {**flat_config(config), **run_facts(accelerator, images, stream)}
    facts = compare_folder(folder, accelerator, facts, images, held_out)
    if show_if_finished(folder, options, scored_by, print_table):
        return
    start_folder(folder, accelerator, facts, images, held_out)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    noise_scheduler = DDPMScheduler(prediction_type=config.prediction_type, beta_schedule=config.beta_schedule)
    exported, title = folder.path / "pipeline", f"{data} teacher"
    card = {"parameters": f"{count_parameters(unet):,}", "steps": options.max_train_steps, "seed": options.seed}
    describe = partial(model_card, title, data=config.data.dataset, num_classes=num_classes_of(unet))
    on_main_process(
        lambda: try_export(
            unet,
            noise_scheduler,
            exported,
            describe(card, ""),
            num_inference_steps=config.scores.num_inference_steps,
            name="the teacher",
        )
    )

    run = TrainingRun(
        accelerator=accelerator,
        options=options,
        folder=folder,
        model=unet,
        unet=unet,
        parameter_groups=[{"params": list(unet.parameters()), "weight_decay": options.adam_weight_decay}],
        images=images,
        noise_scheduler=noise_scheduler,
        random_flip=config.data.random_flip,
        guidance_dropout=config.data.guidance_dropout,
        stream=stream,
        config=flat_config(config),
        score=(lambda unet: scorer.score_unet("teacher", unet, noise_scheduler)[0]) if scorer else None,
    )
    for batch in run.batches():
        sample, noise, timesteps = batch["sample"], batch["noise"], batch["timesteps"]
        noisy_sample = run.schedule.noisy(sample, noise, timesteps)
        prediction = call(run.model, noisy_sample, timesteps, batch.get("conditioning"))
        target = run.schedule.target(sample, noise, timesteps)
        run.backward({"total": prediction_loss(prediction, target)})

    unet = run.finish()
    card |= {"training": run.cost()}
    # Exported before it is scored, so that nothing which fails from here on can lose it.
    run.on_main_process(lambda: export_pipeline(unet, noise_scheduler, exported, describe(card, "")))
    with after_export(exported):
        results, samples = score_model(
            "teacher",
            unet,
            noise_scheduler,
            held_out=held_out,
            scorer=scorer,
            num_inference_steps=config.scores.num_inference_steps,
            batch_size=options.eval_batch_size,
        )
        if accelerator.is_main_process:
            samples["held-out images"] = to_uint8(held_out.stack(32))
            save_results(folder.path, {**results, "scored_by": scored_by}, samples)
    run.end()
    if accelerator.is_main_process:
        finish_export(exported, lambda: describe(card, markdown_table(results)), options)
        print_table(results)
        print(f"teacher: {exported}\nsamples: {folder.path / 'samples.png'}\nreport: {folder.path / 'report.html'}")


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="digits")
