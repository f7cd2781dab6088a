"""Figures: losses and scores by step, and what they have in common with others."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_gen.evaluation.labels import Score, label_of
from vkd_gen.files import whole_file
from vkd_gen.text import figure_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe's and Ito's, which people tell apart however they see colours."""
FEW_POINTS = 20
"""Of a curve, each of which is marked then: a line of one point is not seen."""


def panels(num_rows: int, num_columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, `[num_rows, num_columns]`, each of `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * num_columns, size[1] * num_rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
    return figure, axes


def png(figure: Any) -> bytes:
    """A figure as the content of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(png(figure))


def plot(axis: Any, points: Sequence[tuple[float, float]], label: str, number: int, **style: Any) -> None:
    """A curve in the colour of its number; one of few points is marked."""
    marker = "o" if len(points) <= FEW_POINTS else None
    style = {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4, "linewidth": 1.4, **style}
    axis.plot(*zip(*points, strict=True), label=figure_text(label), **style)


def by_step(axis: Any) -> None:
    """A horizontal axis of steps, of which there are no halves."""
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step", fontsize=9)


def logarithmic(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic vertical axis with plain numbers, if that is possible."""
    if not values or min(values) <= 0:
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}" if max(values) < 20 * min(values) else "")


def legend_below(figure: Any, num_columns: int = 4) -> None:
    """One legend for all axes, if there is more than one thing to tell apart."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)} | handles
    if len(handles) > 1:
        style = {"loc": "outside lower center", "fontsize": 9, "frameon": False}
        figure.legend(handles.values(), handles.keys(), ncols=num_columns, **style)


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], teacher: Mapping[str, float]) -> Any | None:
    """Losses by step, and scores where they were taken during training, a colour per run.

    Args:
        runs: name -> lines of its metrics.jsonl.
        teacher: its row of results.json, for a dashed line where it has the score.

    Returns:
        A matplotlib figure; None without a curve.
    """
    kinds = _curve_kinds({name for lines in runs.values() for line in lines for name in line})
    if not kinds:
        return None
    num_columns = len(kinds) if len(kinds) < 4 else 2 + len(kinds) % 2
    figure, axes = panels(-(-len(kinds) // num_columns), num_columns, (4.2, 3))
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, kinds, strict=False):
        values: list[float] = []
        for number, (run, lines) in enumerate(runs.items()):
            points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
            if points:
                plot(axis, points, run, number, **({"marker": "o"} if name.startswith("score/") else {}))
                values += [value for _, value in points]
        target = teacher.get(name.removeprefix("score/"), math.nan)
        if math.isfinite(target):
            axis.axhline(target, color="0.4", linestyle="--", linewidth=1, label="teacher")
        logarithmic(axis, values)
        axis.set_xlim(left=0)
        by_step(axis)
        axis.set_title(figure_text(label_of(name)), fontsize=10)
    legend_below(figure)
    return figure


def _curve_kinds(logged: set[str]) -> list[str]:
    """The metrics that there are curves of: losses, without those of single layers, and Frechet distances."""
    kinds = ["loss/denoising", "loss/output", "loss/feature"]
    kinds += [] if "loss/denoising" in logged else ["loss/total"]
    scores = {name: Score.of(name.removeprefix("score/")) for name in logged if name.startswith("score/")}
    kinds += sorted(name for name, score in scores.items() if score and score.metric == "fid")
    return [name for name in kinds if name in logged]
