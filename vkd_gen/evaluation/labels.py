"""What tables, pages and figures say for a raw key of results.json, metrics.jsonl or config.json."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vkd_gen.hub import split_revision


class Metric(NamedTuple):
    """How a metric is shown: its words; its number, None for results.json alone; whether a terminal has room for it."""

    words: str
    form: str | None
    is_narrow: bool = True


METRICS = {
    "parameters": Metric("parameters", "{:,}"),
    "macs": Metric("MACs", "{:,}"),
    "ms_per_image": Metric("ms per image", "{:.2f}"),
    "fid": Metric("FID", "{:.2f}"),
    "inception_score": Metric("inception score", "{:.2f}"),
    "inception_score_std": Metric("inception score, standard deviation", None),
    "kid": Metric("KID", "{:.5f}"),
    "kid_std": Metric("KID, standard deviation", None),
    "precision": Metric("precision", "{:.3f}"),
    "recall": Metric("recall", "{:.3f}"),
    "clip_score": Metric("CLIP score", "{:.2f}"),
    "fid_training": Metric("FID to training images", "{:.2f}", is_narrow=False),
    "fid_held_out": Metric("FID to held-out images", "{:.2f}", is_narrow=False),
    "nearest_training": Metric("distance to the nearest training image", "{:.3f}", is_narrow=False),
    "nearest_held_out": Metric("distance to the nearest held-out image", "{:.3f}", is_narrow=False),
    "nearer_to_training": Metric("nearer to training", "{:.3f}"),
    "denoising_error": Metric("denoising error", "{:.4f}"),
    "teacher_distance": Metric("distance to the teacher", "{:.4f}"),
    "wrong_prompt_error": Metric("error with a wrong prompt", "{:.4f}"),
    "guidance_gap_ratio": Metric("guidance gap to the teacher's", "{:.3f}"),
    "prompt_rank": Metric("rank of the right prompt", "{:.2f}"),
}
"""In the order of a table's columns."""

LABELS = {
    "loss/total": "total loss",
    "loss/denoising": "denoising loss",
    "loss/output": "output distillation loss",
    "loss/feature": "feature loss, summed over layers",
    "num_images": "number of images",
    "num_inference_steps": "sampling steps",
    "extractor_weights_sha256": "SHA-256 of the extractor's weights",
    "weights_sha256": "SHA-256 of the weights",
    "prompts_sha256": "SHA-256 of the prompts",
    "clip_model": "CLIP that scores",
    "clip_model_sha256": "SHA-256 of the CLIP's weights",
    "images_sha256": "SHA-256 of the images",
    "reference_hash": "SHA-256 of the reference",
}
"""Other raw keys -> words. Whatever is not here is shown with spaces for underscores."""


@dataclass(frozen=True)
class Score:
    """One number of a model.

    Attributes:
        metric: one of `METRICS`.
        network: whose features it is in; empty for Inception's, and for what needs no features.
        value: the number.
    """

    metric: str
    network: str
    value: float

    @classmethod
    def of(cls, key: str, value: float = float("nan")) -> "Score | None":
        """The score that results.json or metrics.jsonl holds under a key; None for what is no score.

        >>> Score.of("fid_training_digits", 2.5), Score.of("seconds")
        (Score(metric='fid_training', network='digits', value=2.5), None)
        """
        metric = max((name for name in METRICS if key == name or key.startswith(name + "_")), key=len, default=None)
        return None if metric is None else cls(metric, key.removeprefix(metric)[1:].replace("_", "-"), value)

    @property
    def key(self) -> str:
        """What it is called in results.json: no other network's score is taken for Inception's."""
        return self.metric + ("_" + self.network.replace("-", "_") if self.network else "")

    @property
    def label(self) -> str:
        """Its words, with the network in brackets."""
        return METRICS[self.metric].words + (f" ({self.network})" if self.network else "")

    def __str__(self) -> str:
        form = METRICS[self.metric].form
        return str(self.value) if form is None else form.format(self.value)


def row_of(scores: Iterable[Score]) -> dict[str, float]:
    """Scores as a row of results.json: key -> number."""
    return {score.key: score.value for score in scores}


def label_of(key: str) -> str:
    """The words for a raw key.

    >>> label_of("fid_training_digits"), label_of("loss/total"), label_of("learning_rate")
    ('FID to training images (digits)', 'total loss', 'learning rate')
    """
    key = key.removeprefix("score/")
    score = Score.of(key)
    return score.label if score else LABELS.get(key, key.replace("_", " "))


def data_label(source: str) -> str:
    """What titles and scores call a data set: the last part of its path, or of its id on the hub, in plain characters.

    >>> data_label("uoft-cs/cifar10@main"), data_label("photos/birds/")
    ('cifar10', 'birds')
    """
    name = source if Path(source).exists() else split_revision(source)[0]
    return re.sub(r"\W+", "-", Path(name).resolve().name).strip("-") or "images"


def describe(value: Any) -> str:
    """An entry of a protocol in words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{label_of(name)} {describe(part)}" for name, part in value.items())
    return str(value)
