"""What users choose about scores. Loads nothing heavy: flags are read before torch is loaded."""

import logging
import os
from dataclasses import dataclass, replace

from vkd_gen.choices import Precision, Sampler
from vkd_gen.cli import Rare, check_at_least

logger = logging.getLogger(__name__)

LEAST_IMAGES = 10
"""Images that the scores need at least: one for each split of the Inception score, more than a neighbourhood."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What samples are scored by."""

    extractor: str = "inception"
    """Network that scores: `inception`, `efficientnet-lite0`, another of torch-fidelity's, a .safetensors of
    train_feature_network.py; in recipes also `none`, and `auto`: the committed one of digits or mnist, else none."""
    extractor_weights: Rare[str | None] = None
    """Local file of the weights of `inception` (or `vgg16`), where they cannot be downloaded."""
    num_score_samples: int = 1000
    """Samples that a model is scored by; papers use 50,000."""
    num_inference_steps: Rare[int] = 50
    """Network evaluations per sample."""
    kid_subset_size: Rare[int] = 1000
    """Images in each of KID's 100 subsets."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, {"num_score_samples": LEAST_IMAGES, "num_inference_steps": 1, "kid_subset_size": 2})


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a pipeline makes images. Image i comes from seed SEED + i, whatever the batch and the number of processes."""

    seed: int = 0
    """Seed of the first image."""
    sampler: Sampler | None = None
    """Sampler of UNet and of text pipelines; by default each pipeline's own."""
    guidance_scale: float | None = None
    """Guidance of class-conditional pipelines, whose images are of the class seed modulo classes."""
    mixed_precision: Precision = "no"
    """Precision of the sampled networks."""
    batch_size: int = 64
    """Images at a time, per process."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"--seed must be at least 0 and below 2^62, not {self.seed}")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"--guidance_scale must be at least 1 and finite, not {self.guidance_scale}")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, not {self.batch_size}")


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
