"""Scores of whole runs by their budget: when a bar is reached, as tables and a figure."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tables import Comparison, decimals_for
from vkd_gen.evaluation.figures import COLOURS, legend_below, logarithmic, panels, plot
from vkd_gen.evaluation.labels import label_of
from vkd_gen.evaluation.tables import Table
from vkd_gen.text import figure_text

Bounds = tuple[float, float]
"""The least and the most that a value can be; equal where it is known."""
NOTE = (
    "Medians over seeds (lowest to highest). The bar is the control's score after all of its steps, seed by seed. "
    "≤ and ≥: reached by the smallest budget; > and <: not by the largest. Seconds are steps times the arm's median "
    "seconds per step."
)


@dataclass(frozen=True)
class Curves:
    """Scores of runs by budget.

    Attributes:
        records: arm -> seed -> steps -> finished run.
        control: the arm that sets the bar.
        num_steps: N, the control's steps at the bar.
        num_runs: that every arm should have.
    """

    records: Mapping[str, Mapping[int, Mapping[int, Mapping[str, Any]]]]
    control: str
    num_steps: int
    num_runs: int

    @property
    def shown_scores(self) -> list[str]:
        """The distance to the teacher and the Frechet distance, where there are."""
        found = [run for seeds in self.records.values() for runs in seeds.values() for run in runs.values()]
        known = Comparison(found, (), (), self.control, self.num_runs, {})
        return [name for name in ("teacher_distance", known.frechet_distance) if name in known.shown_scores]

    def scores(self, arm: str, score: str) -> dict[int, dict[int, float]]:
        """Seed -> steps -> score, infinite for a run that ended in no number, for the runs that have it."""
        return {
            seed: {
                steps: value if math.isfinite(value := run["student"][score]) else math.inf
                for steps, run in runs.items()
                if score in run["student"]
            }
            for seed, runs in self.records[arm].items()
        }

    def bars(self, score: str) -> dict[int, float]:
        """Seed -> the control's score after N steps."""
        found = {seed: curve.get(self.num_steps, math.inf) for seed, curve in self.scores(self.control, score).items()}
        return {seed: value for seed, value in found.items() if 0 < value < math.inf}

    def seconds_per_step(self, arm: str) -> float:
        """Median over an arm's runs; 0 if none has measured it."""
        runs = [run for by_steps in self.records[arm].values() for run in by_steps.values()]
        return statistics.median([run["training_seconds"] / run["steps"] for run in runs] or [0.0])

    def steps_to_bar(self, arm: str, score: str) -> dict[int, Bounds]:
        """Seed -> steps, for the seeds that have a bar and a run."""
        bars = self.bars(score)
        return {
            seed: steps_to(curve, bars[seed])
            for seed, curve in self.scores(arm, score).items()
            if curve and seed in bars
        }


def steps_to(curve: Mapping[int, float], bar: float) -> Bounds:
    """Steps from which on a curve is at a score or below it.

    >>> steps_to({100: 4.0, 400: 1.0}, bar=2.0)
    (200.0, 200.0)
    >>> steps_to({100: 4.0, 400: 1.0}, bar=4.0), steps_to({100: 4.0, 400: 1.0}, bar=0.5)
    ((0.0, 100.0), (400.0, inf))

    Args:
        curve: steps -> score of a whole run of so many; not empty. Infinite for a run that failed.
        bar: the score to reach, above 0.
    """
    budgets = sorted(curve)
    above = max((steps for steps in budgets if curve[steps] > bar), default=0)
    if above == budgets[-1]:
        return float(above), math.inf
    below = next(steps for steps in budgets if steps > above)
    if not above:
        return 0.0, float(below)
    if math.isinf(curve[above]) or curve[below] <= 0:
        return float(above), float(below)
    share = math.log(curve[above] / bar) / math.log(curve[above] / curve[below])
    steps = above * (below / above) ** share
    return steps, steps


def in_words(values: Sequence[Bounds], form: str, *, is_gain: bool) -> str:
    """Median, and in brackets lowest to highest, of what is known within bounds; its worse end where they differ.

    >>> in_words([(3.0, 3.0), (2.0, math.inf), (0.0, 1.0)], ".1f", is_gain=True)
    '≥ 2.0 (< 1.0 to ≥ 3.0)'
    >>> in_words([(0.0, 100.0)], ".0f", is_gain=False)
    '≤ 100'

    Args:
        values: over seeds; may be empty.
        form: of a number, as in `format`.
        is_gain: more of it is better.
    """

    def word(of: Callable[[Sequence[float]], float]) -> str:
        low, high = of([low for low, _ in values]), of([high for _, high in values])
        if low == high:
            return f"{low:{form}}"
        if is_gain:
            return f"≥ {low:{form}}" if low else f"< {high:{form}}"
        return f"> {low:{form}}" if math.isinf(high) else f"≤ {high:{form}}"

    if not values:
        return "-"
    lowest, middle, highest = word(min), word(statistics.median), word(max)
    return middle if lowest == highest else f"{middle} ({lowest} to {highest})"


def curve_tables(curves: Curves) -> dict[str, Table]:
    """Title -> table, one for each score: medians over seeds, and lowest to highest."""
    return {
        f"Time to the {label_of(score)} of {curves.control} after {curves.num_steps:,} steps": _table(curves, score)
        for score in curves.shown_scores
    }


def _table(curves: Curves, score: str) -> Table:
    arms, num_steps = list(curves.records), curves.num_steps
    num_done = [sum(map(len, curves.records[arm].values())) for arm in arms]
    ends = {
        arm: [curve[num_steps] for curve in curves.scores(arm, score).values() if num_steps in curve] for arm in arms
    }
    form = f".{decimals_for([value for values in ends.values() for value in values])}f"
    cost = {arm: curves.seconds_per_step(arm) for arm in arms}
    columns = {
        "runs": [f"{count} of {curves.num_runs}" for count in num_done],
        "seconds per step": [f"{seconds:.3g}" if seconds else "-" for seconds in cost.values()],
        "after all steps": [in_words([(value, value) for value in ends[arm]], form, is_gain=False) for arm in arms],
    }
    steps = {arm: list(curves.steps_to_bar(arm, score).values()) for arm in arms}
    timed = [arm for arm in arms if cost[arm] and cost[curves.control]]
    seconds = {arm: [(low * cost[arm], high * cost[arm]) for low, high in steps[arm] if arm in timed] for arm in arms}
    bar_seconds = num_steps * cost[curves.control]
    for what, taken, bar, form in (("steps", steps, num_steps, ".0f"), ("seconds", seconds, bar_seconds, ".1f")):
        columns[f"{what} to the bar"] = [in_words(taken[arm], form, is_gain=False) for arm in arms]
        gains = [[(bar / high, bar / low if low else math.inf) for low, high in taken[arm]] for arm in arms]
        columns[f"times fewer {what}"] = [in_words(values, ".2f", is_gain=True) for values in gains]
    return Table(arms, list(columns.items()))


def draw_curves(curves: Curves) -> Any:
    """A panel for each score against seconds: an arm's median over seeds, a band from lowest to highest, and the bar.

    Returns:
        A matplotlib figure.
    """
    figure, axes = panels(1, len(curves.shown_scores), (5.2, 3.6))
    for axis, score in zip(axes[0], curves.shown_scores, strict=True):
        shown: list[float] = []
        for number, arm in enumerate(curves.records):
            by_steps: dict[int, list[float]] = {}
            for curve in curves.scores(arm, score).values():
                for steps, value in curve.items():
                    by_steps.setdefault(steps, []).extend([value] if math.isfinite(value) else [])
            budgets = [(steps * curves.seconds_per_step(arm), by_steps[steps]) for steps in sorted(by_steps)]
            budgets = [(seconds, values) for seconds, values in budgets if seconds and values]
            if not budgets:
                continue
            plot(axis, [(seconds, statistics.median(values)) for seconds, values in budgets], arm, number)
            lows, highs = [min(values) for _, values in budgets], [max(values) for _, values in budgets]
            seconds = [seconds for seconds, _ in budgets]
            axis.fill_between(seconds, lows, highs, color=COLOURS[number % len(COLOURS)], alpha=0.15, linewidth=0)
            shown += lows + highs
        if bars := curves.bars(score):
            label = f"{curves.control} after {curves.num_steps:,} steps"
            axis.axhline(statistics.median(bars.values()), color="0.4", linestyle="--", linewidth=1, label=label)
        logarithmic(axis, shown)
        axis.set_xscale("log")
        axis.tick_params(which="both", length=3)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.set_xlabel("seconds of training", fontsize=9)
        axis.set_title(figure_text(label_of(score)), fontsize=10)
    legend_below(figure, num_columns=3)
    return figure
