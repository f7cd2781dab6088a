"""Statistics over seeds: means, spreads, and differences of runs that share their seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of a score over runs; no deviation for one run."""

    mean: float
    standard_deviation: float | None


@dataclass(frozen=True)
class PairedDifference:
    """A score minus the control's, over the seeds that both have; less is better.

    Attributes:
        mean: mean difference.
        half_width: half width of the 95 % t-interval around the mean; None for one seed.
        differences: seed -> difference.
    """

    mean: float
    half_width: float | None
    differences: Mapping[int, float]

    @property
    def num_better(self) -> int:
        """In how many seeds the score is below the control's."""
        return sum(difference < 0 for difference in self.differences.values())

    @property
    def is_off_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarize(values: Sequence[float]) -> Summary:
    """Mean and spread of at least one value.

    >>> summarize([1.0, 2.0, 3.0])
    Summary(mean=2.0, standard_deviation=1.0)
    """
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(values: Mapping[int, float], control: Mapping[int, float]) -> PairedDifference | None:
    """The difference to a control, seed by seed, with a t-interval: mean ± t_{n-1} s / sqrt(n).

    Args:
        values: seed -> score.
        control: seed -> the control's score.

    Returns:
        None if they have no seed in common.
    """
    from scipy.special import stdtrit  # here, since it takes a while to load

    differences = {seed: values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())}
    if not differences:
        return None
    summary, count = summarize(list(differences.values())), len(differences)
    half_width = None
    if summary.standard_deviation is not None:
        half_width = float(stdtrit(count - 1, 0.975)) * summary.standard_deviation / math.sqrt(count)
    return PairedDifference(summary.mean, half_width, differences)


def share_of_gap(values: Mapping[int, float], baseline: Mapping[int, float], target: float) -> float | None:
    """The share of the way from a baseline's mean down to a target, over the seeds that both have; 1 is all of it.

    >>> share_of_gap({0: 4.0, 1: 6.0}, {0: 9.0, 1: 11.0}, target=0.0)
    0.5

    Args:
        values: seed -> score.
        baseline: seed -> the baseline's score.
        target: the score to reach, such as the teacher's.

    Returns:
        None if they have no seed in common, or the baseline has reached the target.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    start = statistics.fmean(baseline[seed] for seed in seeds)
    gap = start - target
    return (start - statistics.fmean(values[seed] for seed in seeds)) / gap if gap > 0 else None
