"""Distil a teacher UNet into a smaller student.

accelerate launch recipes/train_student_unet.py
accelerate launch recipes/train_student_unet.py --preset custom --teacher FOLDER_OR_HUB_ID --dataset IMAGES
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel

import vkd_gen as vkd
from vkd_gen.data import Images, OnBadImage, data_facts, default_cifar10, load_images
from vkd_gen.diffusion import check_convertible, prediction_type_of
from vkd_gen.distillation import matching_table
from vkd_gen.evaluation.compare import (
    compare_to_teacher,
    describe_models,
    markdown_table,
    print_table,
)
from vkd_gen.evaluation.report import save_results
from vkd_gen.evaluation.scorer import ScoreOptions, SharedScoreOptions, check_score_options, make_scorer
from vkd_gen.normalization import Normalization
from vkd_gen.pairing import PairedLayers, pair_table
from vkd_gen.pipelines import num_classes_of
from vkd_gen.projectors import Projector, principal_directions, random_orthonormal
from vkd_gen.provenance import hub_revision, write_json
from vkd_gen.training.command_line import refuse_links, repository_path, run_recipe
from vkd_gen.training.export import export_pipeline, model_card, upload, write_model_card
from vkd_gen.training.loop import TrainingRun, fixed_batches, make_accelerator, run_facts
from vkd_gen.training.models import check_checkpoint, load_teacher, unet_without_weights
from vkd_gen.training.options import SharedOptions, TrainingOptions, flat_config
from vkd_gen.training.run_folder import RunFolder
from vkd_gen.training.students import (
    SharedStudentOptions,
    StudentOptions,
    build_resolved_student,
    inherit,
    num_starting_draws,
    resolve_student,
)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Distil a teacher into a student. What --method decides is left empty here and can be overridden."""

    preset: str = "digits"
    """Which of digits, mnist, cifar10 and custom to start from; every flag overrides a field of it."""
    teacher: str = ""
    """Folder or hub id of a diffusers pipeline or UNet. Wherever a hub id is taken, ID@REVISION is a commit, tag or
    branch of it."""
    dataset: str = ""
    """`digits`, `mnist`, a folder of images, parquet or arrow files, or a data set's id on the hub."""
    image_column: str | None = None
    """Column of the images in a table; by default the only one that holds images."""
    on_bad_image: OnBadImage = "refuse"
    """An image that cannot be read: `refuse` stops, at once or when it is read; `skip` decodes all images once before
    the run, leaves bad ones out and names them in skipped_images.json."""
    label_column: str | None = None
    """Column of the classes in a table, for a class-conditional teacher; by default the only one of classes, else
    `label`."""
    guidance_dropout: float = 0.1
    """Share of the images whose label is hidden from a class-conditional teacher and its student."""
    resolution: int | None = None
    """Height and width of the images in pixels; by default the teacher's sample size."""
    student_prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the student predicts; by default what the teacher does."""
    method: Literal["vkd", "vkd-paper", "output", "fitnet", "none"] = "vkd"
    """vkd: solved orthogonal projector. vkd-paper: learned orthogonal projector, full whitening by batch statistics,
    smooth-L1, as published. fitnet: free 1x1 convolution. output: distil the teacher's output alone. none: no
    distillation."""
    layers: PairedLayers = "all"
    """Stages whose features are matched: all, the middle and the decoder, or the last decoder stage; or the
    self-attention layers of all stages."""
    layer_pairs: tuple[str, ...] = ()
    """Pairs to use instead, each as STUDENT_LAYER:TEACHER_LAYER or, where the names agree, LAYER; LAYER/2 is its output
    average-pooled by 2."""
    denoising_weight: float = 1.0
    """Weight of the denoising loss; 0 removes it."""
    output_weight: float | None = None
    """Weight of the output distillation loss; by default 1, or 0 for --method none."""
    feature_weight: float | None = None
    """Weight of the feature loss, summed over layers; by default what --method uses, see METHODS."""
    feature_decay_start: float = 1.0
    """Share of the run after which the feature weight falls linearly, to 0 at the end; 1 keeps it."""
    feature_loss: Literal["mse", "smooth_l1"] | None = None
    """Feature loss; by default what --method uses."""
    projector: Literal["solved", "cayley", "matrix_exp", "random", "pca", "linear", "identity"] | None = None
    """Map from the student's to the teacher's channels; by default what --method uses."""
    projector_start: Literal["identity", "procrustes"] = "identity"
    """Where cayley and matrix_exp start."""
    projector_refresh_steps: int = 10
    """Steps between two solutions of the solved projector."""
    feature_normalization: Normalization | None = None
    """Normalisation of the teacher's features; by default what --method uses."""
    whitening_rank: int | None = None
    """Directions that `whiten` keeps; by default as many as the student's layer has channels."""
    whitening_exponent: float = 1.0
    """From 0, rotation only, to 1, full whitening."""
    whitening_shrinkage: float = 1e-3
    """Share of the mean variance mixed into what is inverted."""
    calibration_samples: int = 2048
    """Draws of (image, noise, timestep) that the teacher's statistics are taken from."""
    num_timestep_bins: int = 10
    """Bins that the teacher's features are centred in."""
    timestep_weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the timesteps in every term."""
    snr_gamma: float = 5.0
    """Bound of min_snr."""
    dry_run: bool = False
    """Print the student, its cost beside the teacher's, the layer pairs and the resolved configuration, then stop.
    Needs no data and no weights: --teacher may also be a config.json, or stable-diffusion-1, stable-diffusion-2,
    stable-diffusion-xl or ddpm-cifar10-32."""
    start: SharedStudentOptions = field(default_factory=StudentOptions)
    """The student and what it starts from."""
    scores: SharedScoreOptions = field(default_factory=lambda: ScoreOptions(extractor="none"))
    """What samples are scored by."""
    training: SharedOptions
    """Options of the training loop."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not 0 <= self.guidance_dropout < 1:
            raise ValueError(f"--guidance_dropout must be at least 0 and below 1, not {self.guidance_dropout}")
        if not 0 <= self.feature_decay_start <= 1:
            raise ValueError(f"--feature_decay_start must lie between 0 and 1, not {self.feature_decay_start}")
        least = {"calibration_samples": 1, "num_timestep_bins": 1, "projector_refresh_steps": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} must be at least {value}, not {getattr(self, name)}")
        if self.calibration_samples < self.num_timestep_bins:
            raise ValueError(
                f"too few samples to calibrate on: --num_timestep_bins {self.num_timestep_bins} need at least as many "
                f"--calibration_samples, not {self.calibration_samples}"
            )


METHODS: dict[str, dict[str, Any]] = {
    "vkd": {"feature_weight": 0.3, "projector": "solved", "feature_normalization": "none", "feature_loss": "mse"},
    "vkd-paper": {
        "feature_weight": 0.3,
        "projector": "matrix_exp",
        "feature_normalization": "batch_whiten",
        "feature_loss": "smooth_l1",
    },
    "fitnet": {"feature_weight": 0.3, "projector": "linear", "feature_normalization": "none", "feature_loss": "mse"},
    "output": {"feature_weight": 0.0},
    "none": {"feature_weight": 0.0, "output_weight": 0.0},
}
"""What each --method stands for; `output_weight` is 1 where it is not named."""

DIGITS = StudentConfig(
    teacher="recipes/assets/digits-teacher",
    dataset="digits",
    scores=ScoreOptions(
        extractor="recipes/assets/digits-features.safetensors", kid_subset_size=250, num_inference_steps=25
    ),
    training=TrainingOptions(
        output_dir="runs/digits", max_train_steps=1000, learning_rate=2e-3, preview_every_steps=250
    ),
)
MNIST = replace(
    DIGITS,
    preset="mnist",
    teacher="recipes/assets/mnist-teacher",
    dataset="mnist",
    start=StudentOptions(student="bk-base"),
    scores=replace(DIGITS.scores, extractor="recipes/assets/mnist-features.safetensors"),
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
    dataset=default_cifar10(),
    scores=ScoreOptions(extractor="none"),
    training=replace(
        DIGITS.training,
        output_dir="runs/cifar10",
        max_train_steps=50_000,
        learning_rate=4e-4,
        lr_warmup_steps=1000,
        random_flip=True,
        preview_every_steps=5000,
        checkpointing_steps=5000,
        dataloader_num_workers=4,
    ),
)
CUSTOM = replace(
    CIFAR10,
    preset="custom",
    teacher="",
    dataset="",
    training=replace(CIFAR10.training, output_dir="runs/custom", random_flip=False),
)
PRESETS = {config.preset: config for config in (DIGITS, MNIST, CIFAR10, CUSTOM)}


def resolve(config: StudentConfig) -> StudentConfig:
    """Fill in what --method decides."""
    if not config.teacher or not config.dataset:
        raise ValueError(f"--preset {config.preset} needs --teacher and --dataset")
    asked = bool(config.layer_pairs or config.projector or config.feature_normalization)
    defaults = {"output_weight": 1.0, **METHODS[config.method]}
    config = replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    if config.feature_weight and None in (config.projector, config.feature_normalization, config.feature_loss):
        raise ValueError(
            f"--method {config.method} has no feature loss; for one of your own set --projector, "
            "--feature_normalization and --feature_loss too, or choose --method vkd"
        )
    loss_weights(config, 0)
    check_score_options(config.scores, config.training.score_every_steps)
    if asked and not config.feature_weight:
        raise ValueError(
            "the feature weight is 0: there is no feature loss for --layer_pairs, --projector or "
            "--feature_normalization to act on; choose another --method, or set --feature_weight"
        )
    return config


def build_matching(config: StudentConfig, pair: vkd.LayerPair, statistics: vkd.FeatureStatistics):
    """Projector and normaliser of one layer pair."""
    student_channels = pair.student_channels
    reachable = min(student_channels, pair.teacher_channels)
    rank = reachable if config.whitening_rank is None else config.whitening_rank
    try:
        normalizer = vkd.FeatureNormalizer(
            config.feature_normalization,
            statistics,
            rank=rank,
            exponent=config.whitening_exponent,
            shrinkage=config.whitening_shrinkage,
        )
    except ValueError as error:
        raise ValueError(f"layer {pair.teacher}: {error}") from error
    widths = student_channels, normalizer.target_channels
    projector: Projector
    match config.projector:
        case "linear":
            projector = vkd.LinearProjector(*widths)
        case "identity":
            projector = vkd.IdentityProjector(*widths)
        case "random":
            projector = vkd.OrthogonalProjector(*widths, method="fixed", start=random_orthonormal(*sorted(widths)))
        case "pca":
            # In the wider one's space; a student that is wider keeps its own axes.
            start = principal_directions(normalizer.target_covariance(), min(widths))
            start = start if student_channels <= widths[1] else "identity"
            projector = vkd.OrthogonalProjector(*widths, method="fixed", start=start)
        case method:
            projector = vkd.OrthogonalProjector(
                *widths,
                method=method,
                start=config.projector_start,
                refresh_every_steps=config.projector_refresh_steps,
            )
    return projector, normalizer


def pair_named_or_all(config: StudentConfig, student: ModelMixin, teacher: ModelMixin) -> list[vkd.LayerPair]:
    """The pairs that the user names, or those of --layers."""
    named = [(text.split(":")[0], text.split(":")[-1]) for text in config.layer_pairs]
    return vkd.pair_layers(student, teacher, layers=config.layers, pairs=named or None)


def loss_weights(config: StudentConfig, step: int) -> vkd.LossWeights:
    """The weights at a step: constant, but for features, which may fall linearly to 0 towards the end."""
    share = step / config.training.max_train_steps
    start = config.feature_decay_start
    factor = 1.0 if share <= start else (1 - share) / (1 - start)
    return vkd.LossWeights(
        denoising=config.denoising_weight, output=config.output_weight, feature=config.feature_weight * factor
    )


def build_projected_student(
    config: StudentConfig,
    student: UNet2DModel,
    teacher: vkd.FrozenTeacher,
    pairs: list[vkd.LayerPair],
    images: Images,
    noise_scheduler: DDPMScheduler,
    folder: RunFolder,
    device: torch.device,
) -> vkd.ProjectedStudent:
    """Calibrate on the frozen teacher, report what the student's width allows, and start the projectors."""
    if not pairs:
        return vkd.ProjectedStudent(student)

    def draws(num_draws: int) -> Iterator[dict[str, Any]]:
        return fixed_batches(
            images,
            noise_scheduler,
            seed=config.training.seed,
            num_draws=num_draws,
            batch_size=config.training.eval_batch_size,
            device=device,
            guidance_dropout=config.guidance_dropout,
        )

    saved = folder.path / "calibration.safetensors"
    if saved.exists() and folder.resume_point(config.training.resume_from_checkpoint):
        statistics = vkd.load_statistics(saved)
    else:
        statistics = vkd.calibrate(
            teacher, draws(config.calibration_samples), noise_scheduler, num_timestep_bins=config.num_timestep_bins
        )
    matchings = [build_matching(config, pair, statistics[pair.teacher]) for pair in pairs]
    projected = vkd.ProjectedStudent(student, pairs, *zip(*matchings, strict=True)).to(device)
    projected.initialize_projectors(teacher, draws(min(512, config.calibration_samples)), noise_scheduler)
    return projected


def show_plan(config: StudentConfig, start: StudentOptions, teacher: ModelMixin, show: Callable[[str], None]) -> None:
    """What would be trained, from configurations alone."""
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
    if config.feature_weight > 0:
        pairs = pair_named_or_all(config, student, teacher)
        whitens = config.feature_normalization == "whiten"
        targets = [
            config.whitening_rank or min(pair.student_channels, pair.teacher_channels)
            if whitens
            else pair.teacher_channels
            for pair in pairs
        ]
        widths = [f"{pair.student_channels} -> {target}" for pair, target in zip(pairs, targets, strict=True)]
        show(pair_table(pairs, {f"projector ({config.projector})": widths}))
    if not isinstance(teacher, UNet2DModel):
        show(f"this recipe cannot train it: a {type(teacher).__name__} needs another recipe, with text and latents")
    show(json.dumps(flat_config(config), indent=2))


def main(config: StudentConfig) -> None:
    """Distil, export, score and show one student."""
    config = resolve(config)
    options = config.training
    folder = RunFolder(options.output_dir)
    if not config.dry_run:  # which writes nothing, whatever the folder holds
        refuse_links(folder.path)
        folder.check(flat_config(config), options.resume_from_checkpoint)
        check_checkpoint(folder.resume_point(options.resume_from_checkpoint))
    uses_features = config.feature_weight > 0
    accelerator = make_accelerator(
        options,
        # A loss of features alone does not reach the output layer.
        find_unused_parameters=not (config.denoising_weight or config.output_weight),
    )

    teacher_unet, teacher_scheduler, schedule_origin = load_teacher(
        repository_path(config.teacher, __file__), without_weights=config.dry_run
    )
    if config.resolution is not None:
        teacher_unet.register_to_config(sample_size=config.resolution)
    prediction_type = prediction_type_of(teacher_scheduler)
    noise_scheduler = DDPMScheduler.from_config(
        teacher_scheduler.config, prediction_type=config.student_prediction_type or prediction_type
    )
    check_convertible(noise_scheduler, prediction_type, prediction_type_of(noise_scheduler))
    schedule = noise_scheduler.config
    accelerator.print(
        f"schedule: {schedule.num_train_timesteps} steps, {schedule.beta_schedule}; the teacher predicts "
        f"{prediction_type}, the student {schedule.prediction_type} (from {schedule_origin})"
    )
    start = replace(config.start, student=repository_path(config.start.student, __file__))
    if config.dry_run:
        show_plan(config, start, teacher_unet, accelerator.print)
        return
    student, has_weights = build_resolved_student(start, teacher_unet)
    pairs = pair_named_or_all(config, student, teacher_unet) if uses_features else []
    accelerator.print(describe_models(teacher_unet, student))

    num_classes = num_classes_of(student)
    images, held_out = load_images(
        config.dataset,
        resolution=student.config.sample_size,
        channels=student.config.in_channels,
        image_column=config.image_column,
        on_bad_image=config.on_bad_image,
        with_labels=num_classes is not None,
        label_column=config.label_column,
        num_classes=num_classes,
    )
    accelerator.print(f"{config.dataset}: {len(images):,} images to train on, {len(held_out):,} held out")
    scores = replace(config.scores, extractor=repository_path(config.scores.extractor, __file__))
    scorer = make_scorer(scores, images, held_out, batch_size=options.eval_batch_size)
    skipped = [*images.skipped, *held_out.skipped]
    if skipped:
        accelerator.print(f"{len(skipped):,} images that cannot be read are left out, such as: {skipped[0]}")
    facts = {**flat_config(config), **run_facts(accelerator, images), **data_facts(images, held_out)}
    revisions = {
        "teacher_revision": hub_revision(config.teacher),
        "student_revision": hub_revision(config.start.student),
    }
    facts |= {name: revision for name, revision in revisions.items() if revision is not None}
    folder.check(facts, options.resume_from_checkpoint)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.start(facts)
        write_json(folder.path / "skipped_images.json", skipped)
    accelerator.wait_for_everyone()
    if start.inherit_weights and not has_weights and not folder.resume_point(options.resume_from_checkpoint):
        draws = fixed_batches(
            images,
            noise_scheduler,
            seed=options.seed,
            num_draws=num_starting_draws(start, images.resolution),
            batch_size=options.eval_batch_size,
            device=accelerator.device,
        )
        student, teacher_unet = student.to(accelerator.device), teacher_unet.to(accelerator.device)
        accelerator.print(inherit(start, student, teacher_unet, list(draws), noise_scheduler, seed=options.seed))
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    torch.nn.Module.to(teacher_unet, accelerator.device, dtype)  # past diffusers' warning about casting
    teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs], prediction_type=prediction_type)
    student.to(accelerator.device)
    projected = build_projected_student(
        config, student, teacher, pairs, images, noise_scheduler, folder, accelerator.device
    )
    if pairs:
        accelerator.print(matching_table(projected, config.feature_loss))
    if accelerator.is_main_process and pairs:
        saved = {pair.teacher: norm.statistics for pair, norm in zip(pairs, projected.normalizers, strict=True)}
        vkd.save_statistics(saved, folder.path / "calibration.safetensors")

    run = TrainingRun(
        accelerator=accelerator,
        options=options,
        folder=folder,
        model=projected,
        unet=student,
        parameter_groups=vkd.parameter_groups(student, projected.projectors, options.adam_weight_decay),
        images=images,
        noise_scheduler=noise_scheduler,
        guidance_dropout=config.guidance_dropout,
        config=flat_config(config),
        score=(lambda unet: scorer.score_unet("student", unet, noise_scheduler)[0]) if scorer else None,
    )
    for batch in run.batches():
        losses = vkd.distillation_losses(
            run.model,
            batch,
            noise_scheduler=noise_scheduler,
            teacher=teacher,
            weights=loss_weights(config, run.step),
            feature_loss_kind=config.feature_loss or "mse",
            timestep_weighting=config.timestep_weighting,
            snr_gamma=config.snr_gamma,
        )
        run.backward(losses)

    student = run.finish()
    title = f"{folder.path.name} student"
    card = {"teacher": config.teacher, "method": config.method, "steps": run.step, "seed": options.seed}
    card |= {"training": run.cost()}
    # Exported before it is scored, so that nothing which fails from here on can lose it.
    run.on_main_process(
        lambda: export_pipeline(
            student,
            noise_scheduler,
            folder.path / "pipeline",
            model_card(title, card, "", config.dataset, num_classes=num_classes),
        )
    )
    results, samples = compare_to_teacher(
        student,
        noise_scheduler,
        teacher,
        teacher_scheduler,
        held_out=held_out,
        scorer=scorer,
        num_inference_steps=config.scores.num_inference_steps,
        batch_size=options.eval_batch_size,
    )
    if accelerator.is_main_process:
        save_results(folder.path, results, samples)
        text = model_card(title, card, markdown_table(results), config.dataset, num_classes=num_classes)
        write_model_card(folder.path / "pipeline", text)
        print_table(results)
        print(f"student: {folder.path / 'pipeline'}\nsamples: {folder.path / 'samples.png'}")
        print(f"report: {folder.path / 'report.html'}")
        if options.push_to_hub:
            print(f"uploaded: {upload(folder.path / 'pipeline', options.hub_model_id)}")
    run.end()


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run_recipe(main, PRESETS, __doc__, default="digits")
