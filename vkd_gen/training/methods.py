"""How a student learns from its teacher, as flags: the methods. Loads nothing heavy."""

from dataclasses import dataclass, replace
from typing import Literal

import vkd_gen as vkd
from vkd_gen.choices import FeatureLoss, GuidanceBranches, Normalization, PairedLayers
from vkd_gen.cli import Rare, check_at_least

FeatureWeighting = Literal["constant", "gradient_ratio"]
ProjectorChoice = Literal["solved", "cayley", "matrix_exp", "random", "linear", "identity"]


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """How the student learns from the teacher. --method sets the defaults of the others."""

    method: Literal["vkd", "vkd-paper", "output", "fitnet", "bk", "none"] = "vkd"
    """vkd: the output, and features early on. vkd-paper: denoising, output and features, as published. fitnet: features
    by free maps. bk: BK-SDM's, for students as wide as the teacher. output: no features. none: denoising alone. See
    recipes/README.md."""
    denoising_weight: Rare[float] = 0.0
    """Weight of the denoising loss; 0 removes it."""
    output_weight: Rare[float] = 1.0
    """Weight of the output distillation loss."""
    feature_weight: Rare[float] = 0.3
    """Weight of the feature loss, summed over layers, or the ratio that --feature_weighting keeps."""
    feature_weighting: Rare[FeatureWeighting] = "gradient_ratio"
    """`constant`: --feature_weight is the weight. `gradient_ratio`: it is the ratio of the feature loss' gradient to
    that of the other terms, over the student's weights, and the weight follows."""
    feature_decay_start: Rare[float] = 0.0
    """Share of the run after which the feature weight falls linearly; 1 keeps it."""
    feature_decay_end: Rare[float] = 0.3
    """Share of the run at which it has fallen to 0; after that features cost nothing. 1 for the whole run."""
    layers: Rare[PairedLayers] = "all"
    """Stages whose features are matched: all, the middle and the decoder, or the last decoder stage; or the
    self-attention layers of all stages; or BK-SDM's list: encoder and decoder, at their last attention where only the
    teacher's stage resamples."""
    layer_pairs: Rare[tuple[str, ...]] = ()
    """Pairs to use instead, each as STUDENT_LAYER:TEACHER_LAYER or, where the names agree, LAYER; LAYER/2 is its output
    average-pooled by 2."""
    projector: Rare[ProjectorChoice] = "solved"
    """Map from the student's to the teacher's channels. solved (orthogonal) is found in closed form;
    cayley and matrix_exp (orthogonal) and linear (free) are trained; random is orthogonal and stays as it is."""
    projector_start: Rare[Literal["identity", "procrustes"]] = "identity"
    """Where cayley and matrix_exp start."""
    projector_refresh_steps: Rare[int] = 10
    """Steps between two solutions of a solved projector."""
    feature_normalization: Rare[Normalization] = "none"
    """Normalisation of the teacher's features."""
    feature_loss: Rare[FeatureLoss] = "mse"
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
    guidance_branches: Rare[GuidanceBranches] = "drawn"
    """Of models that take prompts or classes. `drawn`: each draw is told its own, and a --guidance_dropout of them
    nothing. `both`: teacher and student are asked each draw with it and without, whatever --guidance_dropout says; a
    step then takes twice as many rows, and twice as long."""
    timestep_weighting: Rare[Literal["uniform", "min_snr"]] = "uniform"
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
        check_at_least(self, {"whitening_rank": 1, "whitening_exponent": 0, "whitening_shrinkage": 0})
        if self.whitening_exponent > 1 or self.whitening_shrinkage > 1:
            raise ValueError("--whitening_exponent and --whitening_shrinkage must lie between 0 and 1")
        if not self.snr_gamma > 0:
            raise ValueError(f"--snr_gamma must be above 0, not {self.snr_gamma}")
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
    "bk": replace(DENOISING_TOO, method="bk", feature_weight=1.0, layers="bk", projector="identity"),
    "output": replace(DENOISING_TOO, method="output", feature_weight=0.0),
    "none": replace(DENOISING_TOO, method="none", feature_weight=0.0, output_weight=0.0),
}
"""What each --method sets; every flag overrides a field of it."""


def check_effects(options: MatchingOptions) -> None:
    """Refuse flags of features where the feature loss has no weight.

    Raises:
        ValueError: in one line.
    """
    names = ("projector", "feature_normalization", "feature_loss")
    method = METHODS[options.method]
    if not options.feature_weight and any(getattr(options, name) != getattr(method, name) for name in names):
        raise ValueError(
            "the feature weight is 0: there is no feature loss for --projector, --feature_normalization or "
            "--feature_loss to act on; choose another --method, or set --feature_weight"
        )
