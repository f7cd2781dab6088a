"""What a run's diagnostics say, in one figure."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_gen.evaluation.labels import COLOURS, label_of
from vkd_gen.files import whole_file
from vkd_gen.provenance import read_metrics

PREFIX = "diagnostics/"
BIN = re.compile(r"t(\d+)-(\d+)")
GREYS = (("o", "0.1"), ("s", "0.4"), ("^", "0.65"))
"""Markers and colours of what belongs to no layer."""
LEAST_FLOOR = 1e-3
"""Of a layer's loss: a floor below that is none, as where a student's layer is as wide as its teacher's."""


def read_diagnostics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl that hold diagnostics, in order of steps, without `diagnostics/` in their names."""
    return pick_diagnostics(read_metrics(Path(path)))


def pick_diagnostics(metrics: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Those lines of metrics that hold diagnostics, without `diagnostics/` in their names.

    Args:
        metrics: lines of a metrics.jsonl, each with its step.
    """
    lines = []
    for line in metrics:
        figures = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
        if figures:
            lines.append({"step": line["step"], **figures})
    return lines


def save_diagnostics(metrics: Path, path: Path) -> None:
    """Draw the diagnostics of a metrics.jsonl into a file; none where no line holds a feature loss."""
    figure = draw_diagnostics(read_diagnostics(metrics))
    if figure is not None:
        with whole_file(path) as temporary:
            figure.savefig(temporary)


def draw_diagnostics(lines: Sequence[Mapping[str, float]]) -> Any | None:
    """Each layer's loss beside its floor, gradients, loss by timestep, effective ranks.

    Args:
        lines: from `read_diagnostics`.

    Returns:
        A matplotlib figure; None if no line holds a feature loss.
    """
    layers = [name.removeprefix("floor/") for name in (lines[-1] if lines else {}) if name.startswith("floor/")]
    if not layers:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    (losses, gradients), (timesteps, ranks) = figure.subplots(2, 2)
    steps = [line["step"] for line in lines]
    last = lines[-1]
    for layer, colour in zip(layers, COLOURS * len(layers), strict=False):
        means = [_mean(_by_timestep(line, layer).values()) for line in lines]
        losses.plot(steps, means, "o-", color=colour, markersize=4, label=layer)
        floors = [_visible(line.get(f"floor/{layer}"), mean) for line, mean in zip(lines, means, strict=True)]
        losses.plot(steps, floors, "--", color=colour, linewidth=1.2, marker="_", markersize=12)
        found = _by_timestep(last, layer)
        timesteps.plot(list(found), list(found.values()), "o-", color=colour, markersize=4)
    losses.set(xlabel="step", title="Feature loss (dashed: the least that the student's width allows)")
    timesteps.set(xlabel="timestep (0: hardly any noise)", title=f"Feature loss by timestep, step {last['step']}")
    for axis in (losses, timesteps):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="both", labelsize=9)
    figure.legend(loc="outside lower center", ncols=min(len(layers), 5), fontsize=9, frameon=False)

    wanted = {"gradient_ratio": "norm, in units of the other terms' gradient"}
    for term in ("output", "denoising"):
        wanted[f"gradient_cosine/feature-{term}"] = f"cosine with the gradient of the {label_of(f'loss/{term}')}"
    for (name, words), style in zip(wanted.items(), GREYS, strict=True):  # colours are the layers'
        values = [line.get(name, math.nan) for line in lines]
        if any(name in line for line in lines):
            gradients.plot(steps, values, style[0] + "-", color=style[1], markersize=5, label=words)
    gradients.axhline(0, color="0.2", linewidth=1)
    gradients.set(xlabel="step", title="The feature loss' gradient")
    if gradients.get_legend_handles_labels()[1]:  # not for a feature loss without other terms
        gradients.margins(y=0.3)  # room for the legend beside the points
        gradients.legend(fontsize=8)

    places = range(len(layers))
    for offset, side, colour in ((-0.2, "teacher", "#BBBBBB"), (0.2, "student", "#555555")):
        values = [last.get(f"rank/{side}/{layer}", math.nan) for layer in layers]
        ranks.bar([place + offset for place in places], values, width=0.38, color=colour, label=side)
    names = [f"{layer}\ngain {last[gain]:.2f}" if (gain := f"gain/{layer}") in last else layer for layer in layers]
    ranks.set_xticks(list(places), names, fontsize=8, rotation=0 if len(layers) <= 5 else 90)
    ranks.set(title=f"Effective number of directions, step {last['step']}")
    ranks.legend(fontsize=8)
    for axis in (losses, gradients):
        axis.xaxis.get_major_locator().set_params(integer=True)  # of steps there are no halves
    for axis in (losses, gradients, timesteps, ranks):
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _visible(floor: float | None, loss: float) -> float:
    """A floor that a logarithmic axis can show beside its loss."""
    return floor if floor is not None and floor > LEAST_FLOOR * loss else float("nan")


def _by_timestep(line: Mapping[str, float], layer: str) -> dict[float, float]:
    """Middle of a bin of timesteps -> the layer's loss in it."""
    start = f"feature/{layer}/"
    found = {name: BIN.fullmatch(name.removeprefix(start)) for name in line if name.startswith(start)}
    edges = {name: (int(match[1]), int(match[2])) for name, match in found.items() if match}
    return {(first + last) / 2: line[name] for name, (first, last) in sorted(edges.items(), key=lambda item: item[1])}


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
