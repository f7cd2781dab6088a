"""Runs of several methods over seeds, as figures: differences with intervals, curves, samples from equal seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tables import Comparison
from vkd_gen.evaluation.labels import COLOURS, label_of
from vkd_gen.evaluation.report import load_outcome
from vkd_gen.pictures import sample_grid
from vkd_gen.text import figure_text

BETTER, WORSE, OPEN = "#0072B2", "#D55E00", "#8C8C8C"
DASHES = ("-", "--", ":")


def draw_differences(comparison: Comparison) -> Any | None:
    """Each arm's difference to the control with its 95 % interval, and the seeds' own: a row of panels per start.

    Panels are as wide as the seeds' differences ask for; an interval that goes on beyond ends in an arrow.

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
    height = 0.3 * len(others) + 1.1
    figure, axes = _panels(len(starts), len(scores), size=(5.6, height), sharey="row")
    for line, start in zip(axes, starts, strict=True):
        first = [(found[start, arm, scores[0]].mean, arm) for arm in others if (start, arm, scores[0]) in found]
        order = [arm for _, arm in sorted(first)]
        for axis, score in zip(line, scores, strict=True):
            _draw_forest(axis, [found.get((start, arm, score)) for arm in order])
            axis.set_title(figure_text(f"{label_of(score)}, {start} weights"), fontsize=10)
        line[0].set_yticks(range(len(order)), map(figure_text, order), fontsize=9)
        line[0].set_ylim(len(order) - 0.4, -0.6)
    for axis in axes[-1]:
        axis.set_xlabel(f"difference to {figure_text(comparison.control)} (less is better)", fontsize=9)
    words = (
        "bars: 95 % t-intervals over seeds, blue (better) or orange (worse) where off zero; small marks: single seeds"
    )
    figure.supxlabel(words, fontsize=8, color="0.35")
    return figure


def _draw_forest(axis: Any, differences: Sequence[Any]) -> None:
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


def draw_curves(comparison: Comparison) -> Any | None:
    """Losses, and scores taken during training, by step: the mean over seeds in a band of one standard deviation.

    Returns:
        A matplotlib figure; None if no run has a curve.
    """
    from matplotlib.ticker import LogLocator

    names = {name for record in comparison.records for point in record["curve"] for name in point}
    shown = [name for name in ("loss/denoising", "loss/output") if name in names]
    shown += sorted(f"score/{score}" for score in comparison.shown_scores if f"score/{score}" in names)
    starts = [start for start in comparison.starts if any(record["start"] == start for record in comparison.records)]
    if not shown or not starts:
        return None
    figure, axes = _panels(len(starts), len(shown), size=(5.0, 3.6))
    for line, start in zip(axes, starts, strict=True):
        for axis, name in zip(line, shown, strict=True):
            for number, arm in enumerate(comparison.arms):
                points = mean_curve(comparison.runs(start, arm), name)
                if points:
                    _draw_curve(axis, points, arm, number)
            axis.set_title(figure_text(f"{label_of(name)}, {start} weights"), fontsize=10)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            low, high = axis.get_ylim()
            if high > 4 * low:  # else every minor tick is needed
                axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(which="both", labelsize=8)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    ordered = [label for arm in comparison.arms if (label := figure_text(arm)) in handles]
    lines = [handles[arm] for arm in ordered]
    num_columns = max(2, min(4, 2 * len(shown)))
    figure.legend(lines, ordered, loc="outside lower center", ncols=num_columns, fontsize=9, frameon=False)
    return figure


def mean_curve(runs: Mapping[int, Mapping[str, Any]], name: str) -> list[tuple[int, float, float]]:
    """Steps at which all runs have a value, with its mean and standard deviation over them."""
    curves = [{point["step"]: point[name] for point in record["curve"] if name in point} for record in runs.values()]
    if not curves:
        return []
    points = []
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [curve[step] for curve in curves]
        points.append((step, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return points


def _draw_curve(axis: Any, points: Sequence[tuple[int, float, float]], label: str, number: int) -> None:
    steps, means, spreads = zip(*points, strict=True)
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    axis.plot(steps, means, color=colour, linestyle=dash, linewidth=1.5, label=figure_text(label))
    low = [max(mean - spread, mean / 10) for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    if all(math.isfinite(value) for value in (*low, *high)):
        axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)


def samples_of(folders: Mapping[str, Path], count: int = 16) -> dict[str, Tensor]:
    """Samples from equal seeds: the teacher's, if a run has them, and each run's student's.

    Args:
        folders: title -> folder of a run; one that is not there, or without samples, is left out.
        count: samples of each.
    """
    rows: dict[str, Tensor] = {}
    for title, folder in folders.items():
        if not (folder / "samples.npz").exists() or not (folder / "results.json").exists():
            continue
        samples = load_outcome(folder).samples
        if "teacher" in samples and "teacher" not in rows:
            rows = {"teacher": samples["teacher"][:count], **rows}
        if "student" in samples:
            rows[title] = samples["student"][:count]
    return rows


def draw_samples(folders: Mapping[str, Path], count: int = 16) -> Image.Image | None:
    """`samples_of` on one sheet; None if there are none."""
    rows = samples_of(folders, count)
    return sample_grid(rows, columns=count) if rows else None


def _panels(num_rows: int, num_columns: int, *, size: tuple[float, float], sharey: Any = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * num_columns, size[1] * num_rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
    return figure, axes
