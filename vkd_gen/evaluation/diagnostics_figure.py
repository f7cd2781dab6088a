"""What a run's diagnostics say, in one figure."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_gen.evaluation.figures import COLOURS, by_step, panels, save_figure
from vkd_gen.evaluation.labels import label_of
from vkd_gen.provenance import read_metrics

PREFIX = "diagnostics/"
BIN = re.compile(r"t(\d+)-(\d+)")
TERMS = {
    "gradient_ratio": ("o", "0.1", "norm, in units of the other terms' gradient"),
    "gradient_cosine/feature-output": ("s", "0.4", f"cosine with the gradient of the {label_of('loss/output')}"),
    "gradient_cosine/feature-denoising": ("^", "0.65", f"cosine with the gradient of the {label_of('loss/denoising')}"),
}
"""What belongs to no layer -> marker, grey (colours are the layers'), and words."""
LEAST_FLOOR = 1e-3
"""Of a layer's loss: a floor below that is none, as where a student's layer is as wide as its teacher's."""


def pick_diagnostics(metrics: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Those lines of a metrics.jsonl that hold diagnostics, without `diagnostics/` in their names."""
    lines = []
    for line in metrics:
        found = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
        if found:
            lines.append({"step": line["step"], **found})
    return lines


def save_diagnostics(metrics: Path, path: Path) -> None:
    """Draw the diagnostics of a metrics.jsonl into a file; none where no line holds a feature loss."""
    figure = draw_diagnostics(pick_diagnostics(read_metrics(metrics)))
    if figure is not None:
        save_figure(figure, path)


def draw_diagnostics(lines: Sequence[Mapping[str, float]]) -> Any | None:
    """Each layer's loss beside its floor, gradients, loss by timestep, effective ranks, of `pick_diagnostics`.

    Returns:
        A matplotlib figure; None if no line holds a feature loss.
    """
    lines = [line for line in lines if any(name.startswith("floor/") for name in line)]
    layers = [name.removeprefix("floor/") for name in (lines[-1] if lines else {}) if name.startswith("floor/")]
    if not layers:
        return None
    figure, ((losses, gradients), (timesteps, ranks)) = panels(2, 2, (5.5, 4))
    _draw_losses(losses, timesteps, lines, layers)
    _draw_gradients(gradients, lines)
    _draw_ranks(ranks, lines[-1], layers)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(layers), 5), fontsize=9, frameon=False)
    return figure


def _draw_losses(losses: Any, timesteps: Any, lines: Sequence[Mapping[str, float]], layers: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator

    steps, last = [line["step"] for line in lines], lines[-1]
    for layer, colour in zip(layers, COLOURS * len(layers), strict=False):
        means = [_mean(_by_timestep(line, layer).values()) for line in lines]
        losses.plot(steps, means, "o-", color=colour, markersize=4, label=layer)
        floors = [_visible(line.get(f"floor/{layer}"), mean) for line, mean in zip(lines, means, strict=True)]
        losses.plot(steps, floors, "--", color=colour, linewidth=1.2, marker="_", markersize=12)
        found = _by_timestep(last, layer)
        timesteps.plot(list(found), list(found.values()), "o-", color=colour, markersize=4)
    by_step(losses)
    losses.set_title("Feature loss (dashed: the least that the student's width allows)")
    timesteps.set(xlabel="timestep (0: hardly any noise)", title=f"Feature loss by timestep, step {last['step']}")
    for axis in (losses, timesteps):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")


def _draw_gradients(axis: Any, lines: Sequence[Mapping[str, float]]) -> None:
    steps = [line["step"] for line in lines]
    for name, (marker, colour, words) in TERMS.items():
        if any(name in line for line in lines):
            values = [line.get(name, math.nan) for line in lines]
            axis.plot(steps, values, f"{marker}-", color=colour, markersize=5, label=words)
    axis.axhline(0, color="0.2", linewidth=1)
    by_step(axis)
    axis.set_title("The feature loss' gradient")
    if axis.get_legend_handles_labels()[1]:  # not for a feature loss without other terms
        axis.margins(y=0.3)  # room for the legend beside the points
        axis.legend(fontsize=8)


def _draw_ranks(axis: Any, last: Mapping[str, float], layers: Sequence[str]) -> None:
    places = range(len(layers))
    for offset, side, colour in ((-0.2, "teacher", "#BBBBBB"), (0.2, "student", "#555555")):
        values = [last.get(f"rank/{side}/{layer}", math.nan) for layer in layers]
        axis.bar([place + offset for place in places], values, width=0.38, color=colour, label=side)
    names = [f"{layer}\ngain {last[gain]:.2f}" if (gain := f"gain/{layer}") in last else layer for layer in layers]
    axis.set_xticks(list(places), names, fontsize=8, rotation=0 if len(layers) <= 5 else 90)
    axis.set_title(f"Effective number of directions, step {last['step']}")
    axis.legend(fontsize=8)


def _visible(floor: float | None, loss: float) -> float:
    """A floor that a logarithmic axis can show beside its loss."""
    return floor if floor is not None and floor > LEAST_FLOOR * loss else math.nan


def _by_timestep(line: Mapping[str, float], layer: str) -> dict[float, float]:
    """Middle of a bin of timesteps -> the layer's loss in it."""
    start = f"feature/{layer}/"
    found = {name: BIN.fullmatch(name.removeprefix(start)) for name in line if name.startswith(start)}
    edges = {name: (int(match[1]), int(match[2])) for name, match in found.items() if match}
    return {(first + last) / 2: line[name] for name, (first, last) in sorted(edges.items(), key=lambda item: item[1])}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan
