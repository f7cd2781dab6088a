"""What training recipes let their users choose. Loads nothing heavy: flags are read before torch is loaded."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

import vkd_gen as vkd
from vkd_gen.choices import ChannelChoice, FeatureLoss, Normalization, OnBadImage, PairedLayers, Rescaling
from vkd_gen.evaluation.options import choose_extractor

T = TypeVar("T")
if TYPE_CHECKING:
    Rare = Annotated[T, None]
else:
    Rare = Annotated[T, tyro.conf.Suppress if "--help" in sys.argv or "-h" in sys.argv else None]
"""The type of a flag that few people change: --help leaves it out, --help_all shows it."""

FeatureWeighting = Literal["constant", "gradient_ratio"]
ProjectorChoice = Literal["solved", "cayley", "matrix_exp", "random", "linear", "identity"]


def check_at_least(options: Any, minima: Mapping[str, float]) -> None:
    """Check that options are finite and not too small, None aside.

    Args:
        options: with the names as attributes.
        minima: name of a flag -> its least value.

    Raises:
        ValueError: in one line, naming the flag.
    """
    for name, least in minima.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name} must be at least {least}{' and finite' * (value > least)}, not {value}")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training loop, named as in diffusers' own examples where those have them."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, samples and the exported pipeline."""
    dry_run: bool = False
    """Show what would be trained, from configurations alone, and stop."""
    seed: int = 0
    """Seed of initialisation, data order, noise and timesteps; 0 or above."""
    train_batch_size: int = 128
    """Images per process and forward pass."""
    eval_batch_size: int = 64
    """Images per forward pass in calibration, previews and scores."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    max_train_steps: int = 1000
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Learning rate schedule, as in diffusers."""
    lr_warmup_steps: int | None = None
    """Steps over which the learning rate rises from zero; by default a tenth of the run, but no more than 50, or than
    1,000 in the presets cifar10 and custom."""
    adam_weight_decay: float = 0.01
    """Weight decay of the network; projectors are never decayed."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to; 0 for no clipping."""
    max_skipped_steps: int = 20
    """Steps in a row that may be skipped because a loss or a gradient is not finite; one more ends the run."""
    ema_max_decay: float = 0.9999
    """Highest decay of the exponential moving average of the weights, which is what is exported. It warms up as
    1 - (1 + step)^-0.75. 0 exports the last weights."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks' forward passes; by default what `accelerate launch` says. Noising, statistics and
    losses stay in float32."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations a second time during backward."""
    dataloader_num_workers: int = 0
    """Processes that read images; 0 reads them in the training process."""
    log_every_steps: int = 20
    """Steps between lines in metrics.jsonl and the trackers."""
    preview_every_steps: int = 0
    """Steps between sample grids in previews/; 0 for none."""
    score_every_steps: int = 0
    """Steps between scores of the moving average; 0 for none before the end."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; one is always made at the end."""
    checkpoints_total_limit: int = 2
    """Checkpoints to keep; the oldest are removed."""
    checkpoints_keep_every_steps: int = 0
    """Keep also the checkpoints at multiples of this many steps; 0 keeps none beside the newest."""
    resume_from_checkpoint: str | None = None
    """`latest`, the newest whole checkpoint, or a checkpoint folder: go on from there, to the same result as without
    the interruption. With `latest` and no checkpoint the run starts anew. SIGTERM and SIGINT (Ctrl-C) finish the step,
    save a checkpoint and exit with status 143 and 130; a second one exits at once."""
    report_to: str | None = None
    """Experiment tracker, such as `tensorboard` or `wandb` (the extra `wandb`), its files in the run's folder;
    metrics.jsonl is always written."""
    push_to_hub: bool = False
    """Upload the exported pipeline to the Hugging Face hub. Its repository is made before the run."""
    hub_model_id: str | None = None
    """Repository to upload to; by default the name of the output folder."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, MINIMA)
        if not self.output_dir or "\0" in self.output_dir:
            raise ValueError("--output_dir must name a folder")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2^32, not {self.seed}")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"--ema_max_decay must be at least 0 and below 1, not {self.ema_max_decay}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate must be above 0 and finite, not {self.learning_rate}")


MINIMA = {
    "seed": 0,
    "train_batch_size": 1,
    "eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0,
    "max_grad_norm": 0,
    "max_skipped_steps": 0,
    "dataloader_num_workers": 0,
    "log_every_steps": 1,
    "preview_every_steps": 0,
    "score_every_steps": 0,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "checkpoints_keep_every_steps": 0,
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images to train on."""

    dataset: str = ""
    """`digits`, `mnist`, a folder of images, parquet or arrow files, or a data set's id on the hub."""
    image_column: str | None = None
    """Column of the images in a table; by default the only one that holds images."""
    max_train_samples: int | None = None
    """Train on so many of the images, evenly spaced; scores still compare to all of them."""
    on_bad_image: OnBadImage = "refuse"
    """An image that cannot be read: `refuse` stops, at once or when it is read; `skip` decodes all images once before
    the run, leaves bad ones out and names them in skipped_images.json."""
    random_flip: bool = False
    """Mirror half of the images."""
    image_cache: str = ""
    """Folder to keep the training images in, decoded, cropped and resized, so that it is done once and not in each pass
    through them; runs may share it. Empty for none."""
    label_column: str | None = None
    """Of a class-conditional model: column of the classes in a table; by default the only one of classes, else
    `label`."""
    guidance_dropout: float = 0.1
    """Of a class-conditional model: share of the images whose label is hidden, for classifier-free guidance."""
    streaming: bool = False
    """Read --dataset, parquet or arrow files or a data set of the hub, from front to back, epoch after epoch, instead
    of copying it to the disk. The run goes on only with as many processes and workers: see docs/SCALING.md."""
    stream_head: int = 6000
    """Images that are read before the run and kept in memory, encoded: a sixth of them, or as many of the test split,
    are held out; statistics, scores and what a student starts from are taken from the others."""
    stream_buffer: int = 4096
    """Images that each process, or each of its workers, shuffles among, encoded."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not 0 <= self.guidance_dropout < 1:
            raise ValueError(f"--guidance_dropout must be at least 0 and below 1, not {self.guidance_dropout}")
        check_at_least(self, {"max_train_samples": 1, "stream_head": 1, "stream_buffer": 1})
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                "--max_train_samples chooses among all images, which a stream's are not: leave it or --streaming out"
            )
        if self.streaming and self.image_cache:
            raise ValueError(
                "--image_cache keeps all images on the disk, which --streaming is to spare: leave one of them out"
            )


def default_cifar10() -> str:
    """CIFAR-10: the folder that the environment variable VKD_GEN_CIFAR10 names, else its id on the hub."""
    return os.path.expanduser(os.environ.get("VKD_GEN_CIFAR10") or "uoft-cs/cifar10")


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
    student_prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the student predicts; by default what the teacher does."""
    resolution: int | None = None
    """Height and width of the images in pixels; by default the teacher's sample size."""
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
        check_at_least(self, {"inherit_samples": 1, "resolution": 1})


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """How the student learns from the teacher. --method sets the defaults of the flags below it (see `METHODS`)."""

    method: Literal["vkd", "vkd-paper", "output", "fitnet", "none"] = "vkd"
    """vkd: the teacher's output, and features through a solved orthogonal projector, their gradient at first 0.3 of the
    output's and falling to 0 within the first 0.3 of the run; no denoising loss. vkd-paper: denoising, output, and
    features through a learned orthogonal projector, full whitening by batch statistics, smooth-L1, as published.
    fitnet: denoising, output, and features through a free 1x1 convolution. output: denoising and output. none:
    denoising alone."""
    denoising_weight: float = 0.0
    """Weight of the denoising loss; 0 removes it."""
    output_weight: float = 1.0
    """Weight of the output distillation loss."""
    feature_weight: float = 0.3
    """Weight of the feature loss, summed over layers, or the ratio that --feature_weighting keeps."""
    feature_weighting: FeatureWeighting = "gradient_ratio"
    """`constant`: --feature_weight is the weight. `gradient_ratio`: it is the ratio of the feature loss' gradient to
    that of the other terms, over the student's weights, and the weight follows."""
    feature_decay_start: float = 0.0
    """Share of the run after which the feature weight falls linearly; 1 keeps it."""
    feature_decay_end: float = 0.3
    """Share of the run at which it has fallen to 0; after that features cost nothing. 1 for the whole run."""
    layers: PairedLayers = "all"
    """Stages whose features are matched: all, the middle and the decoder, or the last decoder stage; or the
    self-attention layers of all stages."""
    layer_pairs: Rare[tuple[str, ...]] = ()
    """Pairs to use instead, each as STUDENT_LAYER:TEACHER_LAYER or, where the names agree, LAYER; LAYER/2 is its output
    average-pooled by 2."""
    projector: ProjectorChoice = "solved"
    """Map from the student's to the teacher's channels. solved (orthogonal) is found in closed form;
    cayley and matrix_exp (orthogonal) and linear (free) are trained; random is orthogonal and stays as it is."""
    projector_start: Rare[Literal["identity", "procrustes"]] = "identity"
    """Where cayley and matrix_exp start."""
    projector_refresh_steps: Rare[int] = 10
    """Steps between two solutions of a solved projector."""
    feature_normalization: Normalization = "none"
    """Normalisation of the teacher's features."""
    feature_loss: FeatureLoss = "mse"
    """Feature loss; `cka` compares relations between positions."""
    whitening_rank: Rare[int | None] = None
    """Directions that `whiten` keeps; by default as many as the student's layer has channels."""
    whitening_exponent: Rare[float] = 1.0
    """From 0, rotation only, to 1, full whitening."""
    whitening_shrinkage: Rare[float] = 1e-3
    """Share of the mean variance mixed into what is inverted."""
    diagnostics_every_steps: Rare[int] = 200
    """Steps between measurements of what the feature loss does: its gradient against the others', losses by timestep
    and their floors, ranks and gains, in metrics.jsonl under diagnostics/; gradient_ratio follows at these steps. Where
    features last for less than ten times as many steps, there are further ones. 0 measures never."""
    calibration_samples: Rare[int] = 2048
    """Draws of (image, noise, timestep) that the teacher's statistics are taken from."""
    num_timestep_bins: Rare[int] = 10
    """Bins that the teacher's features are centred in."""
    timestep_weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the timesteps in every term."""
    snr_gamma: Rare[float] = 5.0
    """Bound of min_snr."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        start, end = self.feature_decay_start, self.feature_decay_end
        for name, value in (("feature_decay_start", start), ("feature_decay_end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} must lie between 0 and 1, not {value}")
        check_at_least(self, {"denoising_weight": 0, "output_weight": 0, "feature_weight": 0})
        check_at_least(self, {"diagnostics_every_steps": 0, "num_timestep_bins": 1, "projector_refresh_steps": 1})
        if self.calibration_samples < self.num_timestep_bins:
            raise ValueError(
                f"too few samples to calibrate on: --num_timestep_bins {self.num_timestep_bins} need at least as many "
                f"--calibration_samples, not {self.calibration_samples}"
            )
        has_others = bool(self.denoising_weight + self.output_weight)
        if not self.feature_weight:
            if not has_others:
                raise ValueError("all weights are 0: nothing is left to train on")
            if self.layer_pairs:
                raise ValueError(
                    "the feature weight is 0: there is no feature loss for --layer_pairs to act on; choose another "
                    "--method, or set --feature_weight"
                )
            return
        if start > end or start == end < 1:
            raise ValueError(
                f"the feature weight falls from --feature_decay_start {start} to --feature_decay_end {end}: the end "
                "must come after the start (1 and 1 keep it)"
            )
        if end < 1 and not has_others:
            raise ValueError(
                f"nothing is left to train on after --feature_decay_end {end}; set it to 1, or --denoising_weight or "
                "--output_weight above 0"
            )
        if self.feature_weighting == "gradient_ratio" and not (has_others and self.diagnostics_every_steps):
            raise ValueError(
                "--feature_weighting gradient_ratio needs another term to be in proportion to and measurements to "
                "follow: set --denoising_weight or --output_weight, and --diagnostics_every_steps, above 0, or choose "
                "--feature_weighting constant"
            )

    @property
    def ends_early(self) -> bool:
        """Whether the run goes on without the feature loss that it began with."""
        return bool(self.feature_weight) and self.feature_decay_end < 1

    @property
    def weights(self) -> "vkd.LossWeights":
        """Of the terms at the start of the run."""
        return vkd.LossWeights(denoising=self.denoising_weight, output=self.output_weight, feature=self.feature_weight)


VKD = MatchingOptions()
DENOISING_TOO = replace(
    VKD, denoising_weight=1.0, feature_weighting="constant", feature_decay_start=1.0, feature_decay_end=1.0
)
METHODS = {
    "vkd": VKD,
    "vkd-paper": replace(
        DENOISING_TOO,
        method="vkd-paper",
        projector="matrix_exp",
        feature_normalization="batch_whiten",
        feature_loss="smooth_l1",
    ),
    "fitnet": replace(DENOISING_TOO, method="fitnet", projector="linear"),
    "output": replace(DENOISING_TOO, method="output", feature_weight=0.0),
    "none": replace(DENOISING_TOO, method="none", feature_weight=0.0, output_weight=0.0),
}
"""What each --method sets; every flag overrides a field of it."""


FREE_TO_CHANGE = frozenset(
    {"output_dir", "resume_from_checkpoint", "dry_run"}
    | {"dataloader_num_workers", "eval_batch_size", "log_every_steps", "preview_every_steps"}
    | {"checkpointing_steps", "checkpoints_total_limit", "checkpoints_keep_every_steps", "max_skipped_steps"}
    | {"report_to", "push_to_hub", "hub_model_id", "image_cache"}
    | {"score_every_steps", "extractor", "extractor_weights", "num_score_samples", "num_inference_steps"}
    | {"kid_subset_size", "score_teacher"}
)
"""Fields that may differ between a run and its resumption: they do not touch what is trained."""


def complete(config: Any) -> Any:
    """A recipe's configuration with all filled in that other flags decide: the warm-up and the extractor.

    Args:
        config: of a recipe, with `preset`, `data`, `scores` and `training`.

    Raises:
        ValueError: in one line, for options that contradict each other.
    """
    data, training = config.data, config.training
    if not data.dataset:
        raise ValueError(f"--preset {config.preset} needs --dataset")
    steps, warmup = training.max_train_steps, training.lr_warmup_steps
    if warmup is None:
        longest = 1000 if config.preset in ("cifar10", "custom") else 50
        training = replace(training, lr_warmup_steps=min(longest, steps // 10))
    elif warmup > steps and training.lr_scheduler != "constant":
        raise ValueError(
            f"--lr_warmup_steps {warmup} is more than --max_train_steps {steps}: the learning rate would never reach "
            "--learning_rate; leave it out for a tenth of the run"
        )
    matching = getattr(config, "matching", VKD)
    of_features = [getattr(matching, name) for name in ("projector", "feature_normalization", "feature_loss")]
    of_method = [
        getattr(METHODS[matching.method], name) for name in ("projector", "feature_normalization", "feature_loss")
    ]
    if not matching.feature_weight and of_features != of_method:
        raise ValueError(
            "the feature weight is 0: there is no feature loss for --projector, --feature_normalization or "
            "--feature_loss to act on; choose another --method, or set --feature_weight"
        )
    scores = choose_extractor(config.scores, data.dataset)
    if scores.extractor == "none" and training.score_every_steps:
        raise ValueError("--score_every_steps needs an --extractor, such as inception")
    return replace(config, scores=scores, training=training)


def flat_config(config: Any) -> dict[str, Any]:
    """A recipe's configuration as one flat dictionary of flags, as its command line shows them."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flat_config(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
