"""The methods that are compared (arms), and what their students start from, as flags of train_student_unet.py."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A method: its flags, a line that describes it, and its steps and learning rate as multiples of the others'."""

    flags: tuple[str, ...]
    what: str
    steps_factor: float = 1.0
    rate_factor: float = 1.0


def features(
    projector: str,
    normalization: str = "none",
    *more: str,
    method: str = "vkd",
    loss: str = "mse",
    weighting: str = "constant",
    weight: float = 0.3,
    decay_start: int = 1,
    decay_end: float = 1,
    denoising: int = 1,
) -> tuple[str, ...]:
    """Flags of an arm with a feature loss, in full, since what --method stands for may change."""
    flags = ["--method", method, "--projector", projector, "--feature_normalization", normalization]
    flags += ["--feature_loss", loss, "--feature_weighting", weighting, "--feature_weight", str(weight)]
    flags += ["--feature_decay_start", str(decay_start), "--feature_decay_end", str(decay_end)]
    return (*flags, "--output_weight", "1", "--denoising_weight", str(denoising), *more)


DENOISING = ("--method", "none", "--denoising_weight", "1")
POOLED = ("down_blocks.0/4", "down_blocks.1/4", "mid_block/4", "up_blocks.0/8", "up_blocks.1/8")
FREE: dict[str, Any] = {"projector": "linear", "method": "fitnet"}
CKA: dict[str, Any] = {"projector": "random", "loss": "cka"}
RATIO: dict[str, Any] = {"weighting": "gradient_ratio"}
FEATURES = features("solved", **RATIO, decay_start=0, decay_end=0.3, denoising=0)

BY_ADAMW: dict[str, Arm] = {
    # No feature loss.
    "denoising": Arm(DENOISING, "denoising alone"),
    "denoising-longer": Arm(DENOISING, "denoising alone for 2.5 times the steps", steps_factor=2.5),
    "denoising-same-time": Arm(
        DENOISING, "denoising alone for twice the steps: a little more time than features take", steps_factor=2.0
    ),
    "output": Arm(("--method", "output", "--denoising_weight", "1"), "denoising and the teacher's output"),
    "output-alone": Arm(("--method", "output", "--denoising_weight", "0"), "the teacher's output without denoising"),
    # Denoising, output and features through a free map, then an orthogonal one that is learned or fixed.
    "fitnet": Arm(features(**FREE), "features through a free 1x1 convolution"),
    "fitnet-layer-norm": Arm(features(**FREE, normalization="layer_norm"), "fitnet, layer-normalised features"),
    "learned-identity-layer-norm": Arm(
        features("cayley", "layer_norm", "--projector_start", "identity"),
        "a learned orthogonal map that starts at the identity, layer-normalised features",
    ),
    "fixed-random-layer-norm": Arm(
        features("random", "layer_norm"), "a fixed random orthogonal map, layer-normalised features"
    ),
    # The best orthogonal map, in closed form.
    "solved-raw": Arm(features("solved"), "the best orthogonal map, in closed form"),
    "solved-center": Arm(features("solved", "center"), "solved, features centred per timestep bin"),
    "solved-layer-norm": Arm(features("solved", "layer_norm"), "solved, layer-normalised features"),
    "solved-standardize": Arm(features("solved", "standardize"), "solved, standardised features"),
    "solved-whiten-0.5": Arm(
        features("solved", "whiten", "--whitening_exponent", "0.5"), "solved, leading directions half whitened"
    ),
    "solved-whiten-1": Arm(
        features("solved", "whiten", "--whitening_exponent", "1"), "solved, leading directions whitened"
    ),
    "vkd-paper": Arm(
        features("matrix_exp", "batch_whiten", method="vkd-paper", loss="smooth_l1"),
        "as published: learned orthogonal map, whitening by batch statistics, smooth L1",
    ),
    "solved-raw-pooled": Arm(features("solved", "none", "--layer_pairs", *POOLED), "solved, means over each image"),
    "cka": Arm(features(**CKA), "relations between positions, by linear CKA"),
    "bk": Arm(
        features("identity", "none", "--layers", "bk", method="bk", weight=1),
        "BK-SDM's recipe: its layers as they are, for students as wide as the teacher",
    ),
    # Output and features, without denoising.
    "solved-raw-no-denoising": Arm(features("solved", denoising=0), "solved, without denoising"),
    "solved-raw-ratio-0.3-no-denoising": Arm(
        features("solved", **RATIO, denoising=0), "solved, weight by gradient ratio 0.3, without denoising"
    ),
    "cka-no-denoising": Arm(features(**CKA, denoising=0), "linear CKA, without denoising"),
    "solved-raw-ratio-0.3-decayed-no-denoising": Arm(
        features("solved", **RATIO, decay_start=0, denoising=0),
        "solved, weight by gradient ratio 0.3 falling to 0 over the run, without denoising",
    ),
    "solved-raw-ratio-1-decayed-no-denoising": Arm(
        features("solved", **RATIO, weight=1, decay_start=0, denoising=0),
        "solved, weight by gradient ratio 1 falling to 0 over the run, without denoising",
    ),
    "solved-raw-ratio-0.3-early-no-denoising": Arm(
        FEATURES,
        "the default, --method vkd: solved, weight by gradient ratio 0.3 falling to 0 within the first 0.3 of the run, "
        "without denoising",
    ),
    "solved-raw-ratio-0.3-early-both-branches-no-denoising": Arm(
        features("solved", "none", "--guidance_branches", "both", **RATIO, decay_start=0, decay_end=0.3, denoising=0),
        "the default, each draw with its prompt and without: twice the work in a step",
    ),
    "solved-raw-ratio-0.3-early-twice-no-denoising": Arm(
        FEATURES,
        "the default for twice the steps",
        steps_factor=2,
    ),
}
MUON = (
    *("--optimizer", "muon", "--timestep_sampling", "stratified"),
    *("--lr_scheduler", "linear", "--inherit_samples", "1024"),
)
BY_MUON = {
    "muon-output-alone": Arm(
        ("--method", "output", "--denoising_weight", "0", *MUON), "the teacher's output alone, Muon"
    ),
    "muon": Arm(
        (*FEATURES, *MUON),
        "the presets digits and mnist: the default's losses, Muon, stratified times, a rate that falls linearly, and a "
        "start that is fitted on 1,024 draws",
    ),
    "muon-same-time": Arm(
        (*FEATURES, *MUON), "the same in 0.9 of the steps: no more time than AdamW takes for all", steps_factor=0.9
    ),
    "muon-half": Arm((*FEATURES, *MUON), "the same in half of the steps", steps_factor=1 / 2),
    "muon-third": Arm((*FEATURES, *MUON), "the same in a third of the steps", steps_factor=1 / 3),
}
ADAMW = (
    "--optimizer",
    "adamw",
    "--timestep_sampling",
    "random",
    "--lr_scheduler",
    "cosine",
    "--inherit_samples",
    "256",
)
ARMS = {name: replace(arm, flags=(*arm.flags, *ADAMW)) for name, arm in BY_ADAMW.items()} | BY_MUON
"""What can be compared. The flags name all that distinguishes an arm: defaults may change, records must not."""

STARTS = {"inherited": ("--inherit_weights",), "random": ("--no-inherit_weights",)}
"""Flags of what a student starts from."""
