"""Scores from features: torch-fidelity's, and how close samples lie to what was trained on."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vkd_gen.evaluation.extractors import Extractor, import_torch_fidelity
from vkd_gen.evaluation.labels import Score
from vkd_gen.evaluation.options import LEAST_IMAGES

ISC_SPLITS = LEAST_IMAGES
PRC_NEIGHBOURS = 3


class Statistics(NamedTuple):
    """Mean `[features]` and covariance `[features, features]` of features."""

    mean: Tensor
    covariance: Tensor


def sample_scores(
    samples: Mapping[str, Float[Tensor, "samples features"]],
    reference: Mapping[str, Float[Tensor, "references features"]],
    extractor: Extractor,
    *,
    kid_subset_size: int = 1000,
) -> list[Score]:
    """All that torch-fidelity computes from one set of features.

    Its own command line does the same with `--feature-extractor`; without, its precision and recall are of VGG16.

    FID (Heusel et al., 2017, arXiv 1706.08500), Inception score (Salimans et al., 2016, arXiv 1606.03498), KID
    (Binkowski et al., 2018, arXiv 1801.01401; 100 subsets), precision and recall (Kynkaanniemi et al., 2019, arXiv
    1904.06991; 3 neighbours).

    Args:
        samples: layer -> features.
        reference: layer -> features of the images to compare to.
        extractor: that both come from.
        kid_subset_size: rows of each of KID's subsets.

    Returns:
        `fid`, `inception_score`, `kid`, `precision`, `recall`, and `inception_score_std` and `kid_std`.
    """
    import_torch_fidelity()
    from torch_fidelity import metric_kid, metric_prc

    scores: dict[str, float] = {}
    layer = extractor.layers["fid"]
    scores["fid"] = frechet_distance(samples[layer], reference[layer])
    layer = extractor.layers["kid"]
    found = metric_kid.kid_features_to_metric(
        samples[layer], reference[layer], kid_subset_size=kid_subset_size, verbose=False
    )
    scores["kid"], scores["kid_std"] = found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]
    layer = extractor.layers["prc"]
    is_large = max(len(samples[layer]), len(reference[layer])) > 10_000  # all distances at once would fill the memory
    found = metric_prc.prc_features_to_metric(
        samples[layer], reference[layer], prc_neighborhood=PRC_NEIGHBOURS, save_cpu_ram=is_large, verbose=False
    )
    scores["precision"], scores["recall"] = found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]
    others = [Score(name, extractor.network_of_scores, value) for name, value in scores.items()]
    return [*others, *inception_scores(samples, extractor)]


def inception_scores(samples: Mapping[str, Float[Tensor, "samples features"]], extractor: Extractor) -> list[Score]:
    """`inception_score` and `inception_score_std`, of samples alone; none by a network without class probabilities."""
    from torch_fidelity import metric_isc

    if "isc" not in extractor.layers:
        return []
    found = metric_isc.isc_features_to_metric(samples[extractor.layers["isc"]], splits=ISC_SPLITS)
    keys = {"inception_score": metric_isc.KEY_METRIC_ISC_MEAN, "inception_score_std": metric_isc.KEY_METRIC_ISC_STD}
    return [Score(name, extractor.network_of_scores, found[key]) for name, key in keys.items()]


def frechet_distance(features: Float[Tensor, "samples features"], reference: Tensor | Statistics) -> float:
    """FID, to the features of other images or to their saved statistics."""
    import_torch_fidelity()
    from torch_fidelity import metric_fid

    found = metric_fid.fid_features_to_statistics(features)
    if isinstance(reference, Statistics):
        parts = {"mu": reference.mean, "sigma": reference.covariance}
        other = {name: value.numpy().astype(found[name].dtype) for name, value in parts.items()}
    else:
        other = metric_fid.fid_features_to_statistics(reference)
    return metric_fid.fid_statistics_to_metric(found, other, verbose=False)[metric_fid.KEY_METRIC_FID]


def memorization_scores(
    samples: Float[Tensor, "samples features"],
    training: Float[Tensor, "training features"],
    held_out: Float[Tensor, "held_out features"],
) -> dict[str, float]:
    """How much closer samples lie to training images than to images that the model never saw.

    Of the training images as many are taken, evenly spaced, as are held out, so that neither side has the better
    chance of a close neighbour. A model that has learnt the distribution puts half of its samples nearer to either;
    one that copies puts all of them nearer to its training images. After Meehan, Chaudhuri and Dasgupta, 2020, arXiv
    2004.05675.

    Returns:
        `nearest_training` and `nearest_held_out`, the median Euclidean distance of a sample to its nearest neighbour
        among them; `nearer_to_training`, the share of samples whose nearest neighbour is a training image.

    >>> held_out, samples = torch.zeros(2, 3), torch.ones(4, 3)
    >>> memorization_scores(samples, training=samples, held_out=held_out)["nearer_to_training"]
    1.0
    """
    count = min(len(training), len(held_out))
    to_training, to_held_out = (
        nearest_distances(samples, rows[torch.arange(count) * len(rows) // count]) for rows in (training, held_out)
    )
    nearer = (to_training < to_held_out).double() + (to_training == to_held_out).double() / 2
    return {
        "nearest_training": float(to_training.median()),
        "nearest_held_out": float(to_held_out.median()),
        "nearer_to_training": float(nearer.mean()),
    }


def nearest_distances(
    features: Float[Tensor, "samples features"], others: Float[Tensor, "others features"], batch_size: int = 2000
) -> Float[Tensor, " samples"]:
    """Euclidean distance of each row to the nearest of the others, without the cancellation of matrix products."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(rows, others, compute_mode=mode).amin(1) for rows in features.split(batch_size)])
