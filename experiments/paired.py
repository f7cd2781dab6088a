"""Statistics of a comparison over seeds: means, spreads, and differences of runs that share their seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of a score over runs; no deviation for one run."""

    mean: float
    standard_deviation: float | None
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """A score minus the control's, over the seeds that both have; less is better.

    Attributes:
        mean: of the differences.
        half_width: of the t-interval around the mean; None for one seed.
        num_better: in how many seeds the score is below the control's.
        differences: seed -> difference.
    """

    mean: float
    half_width: float | None
    num_better: int
    differences: Mapping[int, float]

    @property
    def is_off_zero(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarize(values: Sequence[float]) -> Summary:
    """Mean and spread.

    >>> summarize([1.0, 2.0, 3.0])
    Summary(mean=2.0, standard_deviation=1.0, count=3)

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("no values to summarize")
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), deviation, len(values))


def student_t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t that |T| stays below with a probability, for Student's distribution.

    With t = sqrt(degrees) tan(angle) the probability is a finite sum of powers of cos(angle) (Abramowitz and Stegun,
    26.7.3 and 26.7.4); the angle is found by bisection.

    >>> round(student_t_quantile(4), 3)
    2.776

    Args:
        degrees: of freedom, at least 1.
        confidence: the probability, above 0 and below 1.

    Raises:
        ValueError: for values outside these.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"no quantile for {degrees} degrees of freedom and confidence {confidence}")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _probability(angle: float, degrees: int) -> float:
    """Of |T| <= sqrt(degrees) tan(angle)."""
    is_odd = degrees % 2
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if is_odd:
        term = cosine
    for power in range(1 + is_odd, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def paired_difference(
    values: Mapping[int, float], control: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference | None:
    """The difference to a control, seed by seed, with a t-interval: mean ± t_{n-1} s / sqrt(n).

    Args:
        values: seed -> score.
        control: seed -> the control's score.
        confidence: of the interval.

    Returns:
        None if they have no seed in common.
    """
    differences = {seed: values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())}
    if not differences:
        return None
    summary = summarize(list(differences.values()))
    half_width = None
    if summary.standard_deviation is not None:
        quantile = student_t_quantile(summary.count - 1, confidence)
        half_width = quantile * summary.standard_deviation / math.sqrt(summary.count)
    num_better = sum(difference < 0 for difference in differences.values())
    return PairedDifference(summary.mean, half_width, num_better, differences)


def share_of_gap(values: Mapping[int, float], baseline: Mapping[int, float], target: float) -> float | None:
    """How much of the way from a baseline's mean down to a target is made, over the seeds that both have; 1 is all.

    >>> share_of_gap({0: 4.0, 1: 6.0}, {0: 9.0, 1: 11.0}, target=0.0)
    0.5

    Args:
        values: seed -> score.
        baseline: seed -> the baseline's score.
        target: the score to reach, as the teacher's.

    Returns:
        None if they have no seed in common, or the baseline is at the target already.
    """
    seeds = values.keys() & baseline.keys()
    if not seeds:
        return None
    start = statistics.fmean(baseline[seed] for seed in sorted(seeds))
    gap = start - target
    return (start - statistics.fmean(values[seed] for seed in sorted(seeds))) / gap if gap > 0 else None
