"""What users choose about scores. Loads nothing heavy: flags are read before torch is loaded."""

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vkd_gen.choices import Precision, Sampler
from vkd_gen.cli import Rare, check_at_least

if TYPE_CHECKING:
    from vkd_gen.evaluation.prompts import Prompts

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
    guidance_scale: Rare[float | None] = None
    """Guidance of text and class-conditional pipelines; by default each pipeline's own."""
    clip_model: Rare[str] = ""
    """Model that scores how well samples fit their prompts: folder or hub id of a CLIP of transformers, such as
    openai/clip-vit-large-patch14; empty for no CLIP score."""
    kid_subset_size: Rare[int] = 1000
    """Images in each of KID's 100 subsets."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        check_at_least(self, {"num_score_samples": LEAST_IMAGES, "num_inference_steps": 1, "kid_subset_size": 2})
        check_at_least(self, {"guidance_scale": 1})
        if self.clip_model and self.extractor == "none":
            raise ValueError("--clip_model scores beside an --extractor, such as inception: name one")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a pipeline makes images. Image i comes from seed SEED + i, whatever the batch and the number of processes."""

    seed: int = 0
    """Seed of the first image."""
    sampler: Sampler | None = None
    """Sampler of UNet and text pipelines; by default each pipeline's own."""
    prompts: str | None = None
    """Of text pipelines: a file with a prompt on each line, a .jsonl, .csv or .parquet with a column of them, or a data
    set with captions (its test split where it has one; the first caption of an image). Image i is of prompt i; where
    there are fewer prompts than images, they begin anew."""
    caption_column: str | None = None
    """Column of the prompts; by default the only one of text, else the one called prompt, caption, text or the like."""
    negative_prompt: str | None = None
    """Of text pipelines: what images are guided away from."""
    resolution: int | None = None
    """Of text pipelines: side in pixels that images are made at; by default the pipeline's own."""
    resize: int | None = None
    """Side in pixels that images made at another are brought to, by PIL's antialiased bicubic filter, as clean-fid
    does."""
    mixed_precision: Precision = "no"
    """Precision of the sampled networks."""
    batch_size: int = 64
    """Images at a time, per process."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"--seed must be at least 0 and below 2^62, not {self.seed}")
        check_at_least(self, {"resolution": 1, "resize": 1, "batch_size": 1})
        if self.caption_column is not None and self.prompts is None:
            raise ValueError("--caption_column is the column of --prompts, which are missing")

    def read_prompts(self) -> "Prompts | None":
        """The prompts, if any are named; see `prompts.read_prompts`."""
        from vkd_gen.evaluation.prompts import read_prompts

        return None if self.prompts is None else read_prompts(self.prompts, self.caption_column)


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
