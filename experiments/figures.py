"""Differences of several methods to a control over seeds, with their intervals, as a figure."""

from collections.abc import Sequence
from typing import Any

from paired import PairedDifference
from tables import Comparison
from vkd_gen.evaluation.figures import panels
from vkd_gen.evaluation.labels import label_of
from vkd_gen.text import figure_text

BETTER, WORSE, OPEN = "#0072B2", "#D55E00", "#8C8C8C"
"""Colours of an interval below 0, above it, and around it."""
CAPTION = "bars: 95 % t-intervals over seeds, blue (better) or orange (worse) where off zero; small marks: single seeds"


def draw_differences(comparison: Comparison) -> Any | None:
    """Each arm's difference to the control with its 95 % interval, and the seeds' own: a row of panels per start.

    Panels are as wide as the seeds' differences need; an interval that goes on beyond ends in an arrow.

    Returns:
        A matplotlib figure; None if there is nothing to compare.
    """
    scores = [name for name in ("teacher_distance", comparison.frechet_distance) if name in comparison.shown_scores]
    others = [arm for arm in comparison.arms if arm != comparison.control]
    found = {
        (start, arm, score): difference
        for start in comparison.starts
        for arm in others
        for score in scores
        if (difference := comparison.difference(start, arm, score)) is not None
    }
    starts = [start for start in comparison.starts if any(key[0] == start for key in found)]
    if not starts:
        return None
    size = (5.6, 0.3 * len(others) + 1.1)
    figure, axes = panels(len(starts), len(scores), size, sharey="row")
    for line, start in zip(axes, starts, strict=True):
        first = [(found[start, arm, scores[0]].mean, arm) for arm in others if (start, arm, scores[0]) in found]
        order = [arm for _, arm in sorted(first)]
        for axis, score in zip(line, scores, strict=True):
            _draw_panel(axis, [found.get((start, arm, score)) for arm in order])
            axis.set_title(figure_text(f"{label_of(score)}, {start} weights"), fontsize=10)
        line[0].set_yticks(range(len(order)), map(figure_text, order), fontsize=9)
        line[0].set_ylim(len(order) - 0.4, -0.6)
    for axis in axes[-1]:
        axis.set_xlabel(f"difference to {figure_text(comparison.control)} (less is better)", fontsize=9)
    figure.supxlabel(CAPTION, fontsize=8, color="0.35")
    return figure


def _draw_panel(axis: Any, differences: Sequence[PairedDifference | None]) -> None:
    values = [value for item in differences if item for value in item.differences.values()]
    low, high = min(0, *values), max(0, *values)
    margin = 0.35 * (high - low) or 1.0
    low, high = low - margin, high + margin
    for place, item in enumerate(differences):
        if item is None:
            continue
        colour = OPEN if not item.is_off_zero else BETTER if item.mean < 0 else WORSE
        if item.half_width is not None:
            left, right = item.mean - item.half_width, item.mean + item.half_width
            axis.plot([max(left, low), min(right, high)], [place, place], color=colour, linewidth=2, zorder=2)
            for end, edge, marker in ((left, low, "<"), (right, high, ">")):
                if not low <= end <= high:
                    axis.plot(edge, place, marker=marker, color=colour, markersize=6, clip_on=False, zorder=3)
        axis.plot(item.mean, place, "o", color=colour, markersize=7, zorder=4)
        seeds = list(item.differences.values())
        axis.plot(seeds, [place + 0.22] * len(seeds), "|", color="0.25", markersize=5, zorder=3)
    axis.axvline(0, color="0.2", linewidth=1, zorder=1)
    axis.set_xlim(low, high)
    axis.grid(axis="x", alpha=0.25)
    axis.grid(visible=False, axis="y")
