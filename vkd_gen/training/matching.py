"""What a recipe's user says about the distillation, and the projected student that comes of it."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from diffusers import ModelMixin

import vkd_gen as vkd
from vkd_gen.diagnostics import Diagnostics
from vkd_gen.losses import FeatureLoss
from vkd_gen.normalization import Normalization
from vkd_gen.pairing import PairedLayers
from vkd_gen.projectors import Projector, principal_directions, random_orthonormal
from vkd_gen.schedule import Schedule
from vkd_gen.training.balance import FeatureBalance, FeatureWeighting

ProjectorChoice = Literal["solved", "cayley", "matrix_exp", "random", "pca", "least_squares", "linear", "identity"]

NUM_DIAGNOSTIC_DRAWS = 64
"""Draws of training images, with noise that no step sees, that the diagnostics look at."""

METHODS: dict[str, dict[str, Any]] = {
    "vkd": {
        "denoising_weight": 0.0,
        "feature_weighting": "gradient_ratio",
        "feature_weight": 0.3,
        "feature_decay_start": 0.0,
        "feature_decay_end": 0.3,
        "projector": "solved",
        "feature_normalization": "none",
        "feature_loss": "mse",
    },
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
"""What each --method stands for. Where they are not named, the weights of denoising and output are 1, and the feature
weight is constant and stays."""


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """How the student learns from the teacher. What --method decides is left empty here and can be overridden."""

    method: Literal["vkd", "vkd-paper", "output", "fitnet", "none"] = "vkd"
    """vkd: the teacher's output, and features by a solved orthogonal projector, their gradient at first 0.3 of the
    output's and falling to 0 within the first 0.3 of the run; no denoising loss. vkd-paper: denoising, output, and
    features by a learned orthogonal projector, full whitening by batch statistics, smooth-L1, as published. fitnet:
    denoising, output, and features by a free 1x1 convolution. output: denoising and output. none: denoising alone."""
    layers: PairedLayers = "all"
    """Stages whose features are matched: all, the middle and the decoder, or the last decoder stage; or the
    self-attention layers of all stages."""
    layer_pairs: tuple[str, ...] = ()
    """Pairs to use instead, each as STUDENT_LAYER:TEACHER_LAYER or, where the names agree, LAYER; LAYER/2 is its output
    average-pooled by 2."""
    denoising_weight: float | None = None
    """Weight of the denoising loss; 0 removes it. By default 1, or 0 for --method vkd."""
    output_weight: float | None = None
    """Weight of the output distillation loss; by default 1, or 0 for --method none."""
    feature_weight: float | None = None
    """Weight of the feature loss, summed over layers; by default what --method uses, see METHODS."""
    feature_decay_start: float | None = None
    """Share of the run after which the feature weight falls linearly; 1 keeps it. By default 1, or 0 for --method
    vkd."""
    feature_decay_end: float | None = None
    """Share of the run at which it has fallen to 0; from there on features cost nothing. By default 1, or 0.3 for
    --method vkd with its own start."""
    feature_weighting: FeatureWeighting | None = None
    """`constant`: --feature_weight is the weight. `gradient_ratio`: it is the ratio of the feature loss' gradient to
    that of the other terms, over the student's weights, and the weight follows. By default what --method uses."""
    diagnostics_every_steps: int = 200
    """Steps between looks at what the feature loss does: its gradient against the others', losses by timestep and their
    floors, ranks and gains, in metrics.jsonl under diagnostics/; --feature_weighting gradient_ratio follows at these
    steps. 0 looks never."""
    feature_loss: FeatureLoss | None = None
    """Feature loss; `cka` compares relations between positions. By default what --method uses."""
    projector: ProjectorChoice | None = None
    """Map from the student's to the teacher's channels; by default what --method uses. solved and least_squares are
    found in closed form, orthogonal and free; cayley and matrix_exp (orthogonal) and linear (free) are trained."""
    projector_start: Literal["identity", "procrustes"] = "identity"
    """Where cayley and matrix_exp start."""
    projector_refresh_steps: int = 10
    """Steps between two solutions of a solved or least-squares projector."""
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

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name in ("feature_decay_start", "feature_decay_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name} must lie between 0 and 1, not {value}")
        least = {
            "diagnostics_every_steps": 0,
            "calibration_samples": 1,
            "num_timestep_bins": 1,
            "projector_refresh_steps": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} must be at least {value}, not {getattr(self, name)}")
        if self.calibration_samples < self.num_timestep_bins:
            raise ValueError(
                f"too few samples to calibrate on: --num_timestep_bins {self.num_timestep_bins} need at least as many "
                f"--calibration_samples, not {self.calibration_samples}"
            )

    @property
    def weights(self) -> vkd.LossWeights:
        """Of the terms at the start of the run; of resolved options."""
        assert self.denoising_weight is not None
        assert self.output_weight is not None
        assert self.feature_weight is not None
        return vkd.LossWeights(denoising=self.denoising_weight, output=self.output_weight, feature=self.feature_weight)


SharedMatchingOptions = Annotated[MatchingOptions, tyro.conf.OmitArgPrefixes]
"""The type of a recipe's field `matching`: its flags carry no prefix."""


def resolve_matching(options: MatchingOptions) -> MatchingOptions:
    """Fill in what --method decides.

    Raises:
        ValueError: for options that contradict each other.
    """
    asked = bool(options.layer_pairs or options.projector or options.feature_normalization)
    defaults: dict[str, Any] = {"denoising_weight": 1.0, "output_weight": 1.0}
    defaults |= {"feature_weighting": "constant", "feature_decay_start": 1.0, "feature_decay_end": 1.0}
    defaults |= METHODS[options.method]
    if options.feature_decay_start is not None or (options.denoising_weight == options.output_weight == 0):
        defaults["feature_decay_end"] = 1.0  # the method's end belongs to its start, and to what is left behind it
    options = replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})
    if options.feature_weight and None in (options.projector, options.feature_normalization, options.feature_loss):
        raise ValueError(
            f"--method {options.method} has no feature loss; for one of your own set --projector, "
            "--feature_normalization and --feature_loss too, or choose --method vkd"
        )
    weights = options.weights
    start, end = options.feature_decay_start, options.feature_decay_end
    assert start is not None
    assert end is not None
    if start > end or (start == end < 1):
        raise ValueError(
            f"the feature weight falls from --feature_decay_start {start} to --feature_decay_end {end}: "
            "the end must lie behind the start"
        )
    if weights.feature and end < 1 and not weights.denoising + weights.output:
        raise ValueError(
            f"nothing is left to train on behind --feature_decay_end {end}; set it to 1, or --denoising_weight or "
            "--output_weight above 0"
        )
    if asked and not weights.feature:
        raise ValueError(
            "the feature weight is 0: there is no feature loss for --layer_pairs, --projector or "
            "--feature_normalization to act on; choose another --method, or set --feature_weight"
        )
    if options.feature_weighting == "gradient_ratio" and weights.feature:
        if not options.diagnostics_every_steps:
            raise ValueError(
                "--feature_weighting gradient_ratio follows the diagnostics; set --diagnostics_every_steps above 0"
            )
        if not weights.denoising + weights.output:
            raise ValueError(
                "--feature_weighting gradient_ratio needs another term to be in proportion to; set "
                "--denoising_weight or --output_weight above 0, or --feature_weighting constant"
            )
    return options


def ends_early(options: MatchingOptions) -> bool:
    """Whether the run, of resolved options, goes on without a feature loss that it began with."""
    return bool(options.feature_weight) and options.feature_decay_end != 1


def pair_named_or_all(options: MatchingOptions, student: ModelMixin, teacher: ModelMixin) -> list[vkd.LayerPair]:
    """The pairs that the user names, or those of --layers; none without a feature loss.

    Raises:
        ValueError: for layers that cannot be paired, or that the feature loss says nothing about.
    """
    if not options.feature_weight:
        return []
    named = [(text.split(":")[0], text.split(":")[-1]) for text in options.layer_pairs]
    pairs = vkd.pair_layers(student, teacher, layers=options.layers, pairs=named or None)
    if options.feature_loss == "cka":
        for pair in pairs:
            if math.prod(pair.student_shape) == pair.student_channels:
                raise ValueError(
                    f"layer {pair.student} has a single position, and --feature_loss cka compares positions with one "
                    "another; leave the layer out by --layers or --layer_pairs, or choose --feature_loss mse"
                )
    return pairs


def target_channels(options: MatchingOptions, pair: vkd.LayerPair) -> int:
    """Channels of a pair's normalised targets."""
    if options.feature_normalization != "whiten":
        return pair.teacher_channels
    reachable = min(pair.student_channels, pair.teacher_channels)
    return reachable if options.whitening_rank is None else options.whitening_rank


def build_matching(
    options: MatchingOptions, pair: vkd.LayerPair, statistics: vkd.FeatureStatistics
) -> tuple[Projector, vkd.FeatureNormalizer]:
    """Projector and normaliser of one layer pair."""
    assert options.feature_normalization is not None
    try:
        normalizer = vkd.FeatureNormalizer(
            options.feature_normalization,
            statistics,
            rank=target_channels(options, pair),
            exponent=options.whitening_exponent,
            shrinkage=options.whitening_shrinkage,
        )
    except ValueError as error:
        raise ValueError(f"layer {pair.teacher}: {error}") from error
    widths = pair.student_channels, normalizer.target_channels
    refresh = options.projector_refresh_steps
    match options.projector:
        case "linear":
            return vkd.LinearProjector(*widths), normalizer
        case "least_squares":
            return vkd.LeastSquaresProjector(*widths, refresh_every_steps=refresh), normalizer
        case "identity":
            return vkd.IdentityProjector(*widths), normalizer
        case "random":
            start = random_orthonormal(*sorted(widths))
            return vkd.OrthogonalProjector(*widths, method="fixed", start=start), normalizer
        case "pca":
            # In the wider one's space; a student that is wider keeps its own axes.
            directions = principal_directions(normalizer.target_covariance(), min(widths))
            is_wider = widths[0] > widths[1]
            return (
                vkd.OrthogonalProjector(*widths, method="fixed", start="identity" if is_wider else directions),
                normalizer,
            )
        case "solved" | "cayley" | "matrix_exp" as method:
            projector = vkd.OrthogonalProjector(
                *widths, method=method, start=options.projector_start, refresh_every_steps=refresh
            )
            return projector, normalizer
    raise ValueError(f"unknown projector {options.projector!r}")


def build_projected_student(
    options: MatchingOptions,
    student: ModelMixin,
    teacher: vkd.FrozenTeacher,
    pairs: list[vkd.LayerPair],
    draws: Callable[[int], Iterable[Mapping[str, Any]]],
    schedule: Schedule,
    *,
    num_steps: int,
    calibration: Path,
    resumes: bool,
    device: torch.device,
) -> tuple[vkd.ProjectedStudent, FeatureBalance]:
    """Calibrate on the frozen teacher, start the projectors and find the weight of the feature loss.

    Args:
        options: resolved.
        student: the student.
        teacher: with the features that the pairs name.
        pairs: of layers; none for a student that learns from no features.
        draws: number -> batches of so many draws, the same on every process.
        schedule: the student's.
        num_steps: of the run.
        calibration: file of the teacher's statistics, which a resumed run starts from.
        resumes: whether the run goes on from a checkpoint, which holds projectors and weight.
        device: of the result.
    """
    if not pairs:
        projected = vkd.ProjectedStudent(student)
        return projected, FeatureBalance(projected, None, weights=options.weights, num_steps=num_steps)
    if calibration.exists() and resumes:
        statistics = vkd.load_statistics(calibration)
    else:
        batches = draws(options.calibration_samples)
        statistics = vkd.calibrate(teacher, batches, schedule, num_timestep_bins=options.num_timestep_bins)
    matchings = [build_matching(options, pair, statistics[pair.teacher]) for pair in pairs]
    projected = vkd.ProjectedStudent(student, pairs, *zip(*matchings, strict=True)).to(device)
    projected.initialize_projectors(teacher, draws(min(512, options.calibration_samples)), schedule)
    diagnostics = Diagnostics(
        projected,
        teacher,
        draws(NUM_DIAGNOSTIC_DRAWS),
        schedule=schedule,
        feature_loss_kind=options.feature_loss or "mse",
        timestep_weighting=options.timestep_weighting,
        snr_gamma=options.snr_gamma,
    )
    balance = FeatureBalance(
        projected,
        diagnostics,
        weighting=options.feature_weighting or "constant",
        weights=options.weights,
        decay_start=1.0 if options.feature_decay_start is None else options.feature_decay_start,
        decay_end=1.0 if options.feature_decay_end is None else options.feature_decay_end,
        num_steps=num_steps,
        every_steps=options.diagnostics_every_steps,
    )
    if not resumes:
        balance.start()
    return projected, balance
