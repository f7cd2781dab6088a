"""What tables, pages and figures say for a raw key of results.json, metrics.jsonl or config.json; and their colours."""

import re
from pathlib import Path

from vkd_gen.provenance import split_revision

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe's and Ito's, which people tell apart however they see colours."""

SCORES = {
    "parameters": "parameters",
    "macs": "MACs",
    "ms_per_image": "ms per image",
    "fid": "FID",
    "inception_score": "inception score",
    "inception_score_std": "inception score, standard deviation",
    "kid": "KID",
    "kid_std": "KID, standard deviation",
    "precision": "precision",
    "recall": "recall",
    "fid_training": "FID to training images",
    "fid_held_out": "FID to held-out images",
    "nearest_training": "distance to the nearest training image",
    "nearest_held_out": "distance to the nearest held-out image",
    "nearer_to_training": "nearer to training",
    "denoising_error": "denoising error",
    "teacher_distance": "distance to the teacher",
}
"""Columns of a table of results; the name of an extractor may follow, as in `fid_digits`."""

LABELS = SCORES | {
    "loss/total": "total loss",
    "loss/denoising": "denoising loss",
    "loss/output": "output distillation loss",
    "loss/feature": "feature loss, summed over layers",
    "num_images": "number of images",
    "num_inference_steps": "sampling steps",
    "extractor_weights_sha256": "SHA-256 of the extractor's weights",
    "weights_sha256": "SHA-256 of the weights",
    "images_sha256": "SHA-256 of the images",
    "reference_hash": "SHA-256 of the reference",
}
"""Raw key -> words. Whatever is not here is shown with spaces for underscores."""


def score_kind(column: str) -> str | None:
    """The score that a column is of, in whatever network's features: the longest key of `SCORES` that it begins with.

    >>> score_kind("fid_training_digits"), score_kind("seconds")
    ('fid_training', None)
    """
    return max((name for name in SCORES if column == name or column.startswith(name + "_")), key=len, default=None)


def label_of(key: str) -> str:
    """The words for a raw key; the name of an extractor stands in brackets behind its score.

    >>> label_of("fid_training_digits"), label_of("loss/total"), label_of("learning_rate")
    ('FID to training images (digits)', 'total loss', 'learning rate')
    """
    key = key.removeprefix("score/")
    kind = score_kind(key)
    if key in LABELS or kind is None:
        return LABELS.get(key, key.replace("_", " "))
    extractor = key.removeprefix(kind + "_").replace("_", "-")
    return f"{SCORES[kind]} ({extractor})"


def data_label(source: str) -> str:
    """What titles and scores call a data set: the last part of its path, or of its id on the hub, in plain characters.

    >>> data_label("uoft-cs/cifar10@main"), data_label("photos/birds/")
    ('cifar10', 'birds')
    """
    name = source if Path(source).exists() else split_revision(source)[0]
    return re.sub(r"\W+", "-", Path(name).resolve().name).strip("-") or "images"
