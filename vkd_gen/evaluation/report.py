"""One self-contained HTML page for a run, a comparison of runs or a set of scores: samples, curves, tables."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vkd_gen.evaluation.compare import column_formats, describe
from vkd_gen.evaluation.diagnostics_figure import draw_diagnostics, pick_diagnostics
from vkd_gen.evaluation.labels import label_of
from vkd_gen.evaluation.sources import save_images
from vkd_gen.files import whole_file
from vkd_gen.pictures import sample_grid, save_sample_grid
from vkd_gen.provenance import is_number, only_warns, read_metrics, write_json
from vkd_gen.text import figure_text, html_text

NOT_DRAWN = re.compile("score/fid_(training|held_out)")
FEW_POINTS = 20
"""Of a curve, each of which is marked then: a line of one point is not seen."""

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --ink: #1f2328; --dim: #59636e; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #151b23; --ink: #f0f6fc; --dim: #9198a1; --page: #0d1117; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 80rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.dim, td.dim, caption { color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { background: var(--soft); font-weight: 600; }
table.facts td { text-align: left; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
img.samples { image-rendering: pixelated; }
"""


@dataclass(frozen=True)
class Outcome:
    """What a folder of a run, or of scores, holds.

    Attributes:
        name: the folder's.
        results: results.json.
        samples: name -> first samples, uint8, from equal seeds.
        metrics: lines of metrics.jsonl.
    """

    name: str
    results: dict[str, Any]
    samples: dict[str, Tensor]
    metrics: list[dict[str, Any]]


def load_outcome(folder: Path) -> Outcome:
    """Read a folder of a run of a recipe, or of scores.

    Raises:
        ValueError: if it holds no results, or damaged ones.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results.json: it is neither a finished run nor a folder of scores")
    try:
        results = json.loads(path.read_text())
        samples = {}
        if (folder / "samples.npz").exists():
            with np.load(folder / "samples.npz", allow_pickle=False) as file:
                samples = {name: torch.from_numpy(file[name]).permute(0, 3, 1, 2) for name in file.files}
        metrics = read_metrics(folder / "metrics.jsonl")
    except Exception as error:  # JSON's, numpy's and the zip file's errors
        raise ValueError(f"cannot read the results in {folder}: {' '.join(str(error).split())[:200]}") from error
    parts = [results.get("rows"), results.get("protocol")] if isinstance(results, dict) else [None]
    rows = parts[0].values() if all(isinstance(part, dict) for part in parts) and parts[0] else [None]
    if not all(isinstance(row, dict) and all(map(is_number, row.values())) for row in rows):
        raise ValueError(f"{path} is not a results file: it has no rows of numbers and no protocol")
    sources = results.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(source, dict) for source in sources.values()):
        raise ValueError(f"{path} is not a results file: its sources are no facts by name")
    for name, images in samples.items():
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or not images.numel():
            raise ValueError(f"{folder / 'samples.npz'} holds no images under {name!r}")
    return Outcome(folder.resolve().name, results, samples, metrics)


def save_results(folder: Path, results: dict[str, Any], samples: Mapping[str, Tensor]) -> None:
    """Write results.json, samples.npz, samples.png and report.html into the folder of a run or of scores.

    Args:
        folder: existing or not.
        results: `rows` and `protocol`, as `compare_to_teacher` gives them; `sources` where each row has its own.
        samples: name -> first samples, uint8, from equal seeds.

    All but results.json may fail, which costs a line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    with only_warns(f"{folder / 'samples.npz'}", f"python eval/generate.py {folder} makes samples"):
        save_images(samples, folder / "samples.npz")
    with only_warns(f"{folder / 'samples.png'}", f"python eval/generate.py {folder} makes samples"):
        save_sample_grid(samples, folder / "samples.png")
    report = folder / "report.html"
    with only_warns(f"the report {report}", f"python eval/report.py {folder} --output {report} makes it again"):
        write_report([folder], report)


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page; pictures, curves and style are inside it.

    Args:
        folders: of runs or scores; several make a comparison.
        path: of the HTML file.

    Raises:
        ValueError: for a folder without results.
    """
    outcomes = [load_outcome(folder) for folder in folders]
    outcomes = [replace(outcome, name=name) for outcome, name in zip(outcomes, short_names(folders), strict=True)]
    title = ", ".join(outcome.name for outcome in outcomes)
    rows = merge_rows(outcomes)
    parts = [f"<h1>{html_text(title)}</h1>"]
    asked = {outcome.name: asked_for(folder) for outcome, folder in zip(outcomes, folders, strict=True)}
    for name, facts in asked.items():
        if facts:
            parts += [f"<h2>Run{'' if len(outcomes) == 1 else ': ' + html_text(name)}</h2>", _facts(facts)]
    parts += ["<h2>Scores</h2>", _table(rows)]
    samples = _merge_samples(outcomes)
    if samples:
        few = {name: images[:32] for name, images in samples.items()}
        parts += [
            "<h2>Samples</h2>",
            '<p class="dim">The same position in each band is the same seed.</p>',
            f'<img class="samples" alt="samples" src="{_data_uri(sample_grid(few))}">',
        ]
    curves = [outcome for outcome in outcomes if curve_kinds([outcome])]
    if curves:
        parts += ["<h2>Curves</h2>", f'<img alt="losses and scores by step" src="{_data_uri(draw_curves(curves))}">']
    for outcome in outcomes:
        of_run = "" if len(outcomes) == 1 else ": " + html_text(outcome.name)
        if (diagnostics := draw_diagnostics(pick_diagnostics(outcome.metrics))) is not None:
            parts += [
                f"<h2>What the feature loss does{of_run}</h2>",
                f'<img alt="diagnostics" src="{_png(diagnostics)}">',
            ]
        parts += [f"<h2>Protocol{'' if len(outcomes) == 1 else ': ' + html_text(outcome.name)}</h2>"]
        parts += [_facts(outcome.results["protocol"])]
        for source, protocol in outcome.results.get("sources", {}).items():
            parts += [f"<h2>{html_text(source)}</h2>", _facts(protocol)]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


ASKED = {
    "dataset": "data",
    "num_training_images": "training images",
    "num_classes": "classes",
    "teacher": "teacher",
    "student": "student",
    "block_out_channels": "channels of the stages",
    "method": "method",
    "max_train_steps": "steps",
    "train_batch_size": "batch size per process",
    "learning_rate": "peak learning rate",
    "seed": "seed",
}
"""Entries of a run's config.json that its page begins with, and what they are called there."""


def asked_for(folder: Path) -> dict[str, Any]:
    """What a run was asked for, in words, from its config.json; empty for a folder that has none, as of scores."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    if "teacher" in config:  # of a run that distils
        own = ("student_sha256", "student_revision")  # facts of its weights, no traits
        traits = {name: value for name, value in config.items() if name.startswith("student_") and value}
        traits = {name: value for name, value in traits.items() if name not in own}
        words = [f"{name.removeprefix('student_').replace('_', ' ')} {value}" for name, value in traits.items()]
        if not config.get("student") and not config.get("student_width"):
            words = ["width 0.5", *words]
        config["student"] = ", ".join(map(str, [*filter(None, [config.get("student")]), *words]))
    return {words: config[name] for name, words in ASKED.items() if config.get(name) not in (None, "")}


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart.

    >>> short_names([Path("/a/x/run"), Path("/a/y/run")])
    ['x/run', 'y/run']
    """
    paths = [folder.resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def merge_rows(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """The rows of all; one that two runs share, as the same teacher, stands there once (the times of the first run)."""
    if len(outcomes) == 1:
        return outcomes[0].results["rows"]
    merged: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        for name, row in outcome.results["rows"].items():
            if name in merged and _without_times(merged[name]) == _without_times(row):
                continue
            merged[name if name not in merged and name != "student" else f"{outcome.name}: {name}"] = row
    return merged


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "ms_per_image"}


def _merge_samples(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    if len(outcomes) == 1:
        return outcomes[0].samples
    merged: dict[str, Tensor] = {}
    for outcome in outcomes:
        for name, images in outcome.samples.items():
            if name in merged and torch.equal(merged[name], images):
                continue
            merged[name if name not in merged and name != "student" else f"{outcome.name}: {name}"] = images
    return merged


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A column per model, as long as there are fewer models than scores; else a row for each."""
    columns = column_formats({"rows": rows})
    cells = [[form.format(row[column]) if column in row else "-" for column, form in columns] for row in rows.values()]
    across, down = [label_of(column) for column, _ in columns], list(rows)
    if len(down) < len(across):
        cells, across, down = [list(line) for line in zip(*cells, strict=True)], down, across
    head = "".join(f"<th>{html_text(title)}</th>" for title in across)
    lines = [
        f"<tr><td>{html_text(title)}</td>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
        for title, line in zip(down, cells, strict=True)
    ]
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><td class="dim">{html_text(label_of(name))}</td><td>{html_text(describe(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def curve_kinds(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """The metrics that there are curves of, each with its title."""
    logged = {name for outcome in outcomes for line in outcome.metrics for name in line}
    kinds = ["loss/denoising", "loss/output", "loss/feature"]
    kinds += [] if "loss/denoising" in logged else ["loss/total"]
    kinds += sorted(name for name in logged if name.startswith("score/fid") and not NOT_DRAWN.match(name))
    return [(name, label_of(name)) for name in kinds if name in logged]


def draw_curves(outcomes: Sequence[Outcome]) -> Image.Image:
    """Losses by step, and scores where they were taken during training, a colour per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = curve_kinds(outcomes)
    num_columns = len(kinds) if len(kinds) < 4 else 2 + len(kinds) % 2
    num_lines = -(-len(kinds) // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 3 * num_lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(num_lines, num_columns)).flatten()
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    for axis, (name, label) in zip(axes, kinds, strict=False):
        for number, outcome in enumerate(outcomes):
            points = [(line["step"], line[name]) for line in outcome.metrics if math.isfinite(line.get(name, math.nan))]
            if points:
                marker = "o" if name.startswith("score/") or len(points) <= FEW_POINTS else None
                axis.plot(
                    *zip(*points, strict=True),
                    label=figure_text(outcome.name),
                    color=f"C{number}",
                    marker=marker,
                    markersize=4,
                    linewidth=1.4,
                )
        teacher = outcomes[0].results["rows"].get("teacher", {}).get(name.removeprefix("score/"))
        if teacher is not None and math.isfinite(teacher):
            axis.axhline(teacher, color="0.4", linestyle="--", linewidth=1, label="teacher")
        values = [line[name] for outcome in outcomes for line in outcome.metrics if name in line]
        values = [value for value in values if math.isfinite(value)]
        if values and min(values) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if max(values) < 20 * min(values) else "")
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)  # of steps there are no halves
        axis.set_title(figure_text(label), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _data_uri(Image.open(buffer))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
