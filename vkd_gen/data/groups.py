"""Batches of one shape: images of one aspect bucket are drawn together."""

import numpy as np


def num_grouped(buckets: np.ndarray, group_size: int) -> int:
    """Draws of an epoch: of each bucket as many as fill its groups."""
    counts = np.unique(buckets, return_counts=True)[1]
    return int((-(-counts // group_size) * group_size).sum())


def grouped_order(buckets: np.ndarray, group_size: int, generator: np.random.Generator) -> np.ndarray:
    """The images of one epoch, in groups of one bucket.

    Each bucket's images are permuted and cut into groups; the last group of a bucket is filled up from the bucket's
    beginning, so that a few of its images come twice, or oftener where it has fewer than a group. Then the groups are
    permuted.

    Args:
        buckets: of each image, `[images]`.
        group_size: images of a group.
        generator: of the epoch.

    Returns:
        `[draws]`, see `num_grouped`: which image each is of.
    """
    order = generator.permutation(len(buckets))
    groups = []
    for bucket in np.unique(buckets):
        members = order[buckets[order] == bucket]
        num_groups = -(-len(members) // group_size)
        groups.append(np.resize(members, (num_groups, group_size)))  # which repeats them
    together = np.concatenate(groups)
    return together[generator.permutation(len(together))].reshape(-1)


def largest_bucket(buckets: np.ndarray) -> np.ndarray:
    """The images of the bucket that has most."""
    values, counts = np.unique(buckets, return_counts=True)
    return np.flatnonzero(buckets == values[counts.argmax()])
