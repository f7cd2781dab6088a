"""One self-contained HTML page for a run, a comparison of runs or a set of scores: samples, curves, tables."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vkd_gen.evaluation.diagnostics_figure import draw_diagnostics, pick_diagnostics
from vkd_gen.evaluation.figures import draw_curves, png, save_figure
from vkd_gen.evaluation.image_files import save_images
from vkd_gen.evaluation.labels import describe, label_of
from vkd_gen.evaluation.prompt_grid import draw_prompt_grid
from vkd_gen.evaluation.tables import score_table
from vkd_gen.files import whole_file
from vkd_gen.pictures import sample_grid, save_sample_grid
from vkd_gen.provenance import is_number, only_warns, read_metrics, write_json
from vkd_gen.text import html_text, reason

Value = TypeVar("Value")

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
        results, samples = json.loads(path.read_text()), {}
        if (folder / "samples.npz").exists():
            with np.load(folder / "samples.npz", allow_pickle=False) as file:
                samples = {name: torch.from_numpy(file[name]).permute(0, 3, 1, 2) for name in file.files}
        outcome = Outcome(folder.resolve().name, results, samples, read_metrics(folder / "metrics.jsonl"))
        if not results["rows"] or not all(
            is_number(value) for row in results["rows"].values() for value in row.values()
        ):
            raise ValueError("it has no rows of numbers")
        for facts in (results["protocol"], *results.get("sources", {}).values()):
            _facts(facts)
        for images in samples.values():
            sample_grid({"": images[:1]})
        if not all(isinstance(prompt, str) for prompt in results.get("prompts", [])):
            raise ValueError("its prompts are no texts")
    except Exception as error:  # JSON's, numpy's and the zip file's errors, and whatever cannot be shown
        raise ValueError(f"cannot read the results in {folder}: {reason(error)}") from error
    return outcome


def save_results(folder: Path, results: dict[str, Any], samples: Mapping[str, Tensor]) -> None:
    """Write results.json, samples.npz, samples.png and report.html; all but the first may fail, which costs a line.

    For results and samples see `evaluate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    with only_warns(f"{folder / 'samples.npz'}", f"python eval/generate.py {folder} makes samples"):
        save_images(samples, folder / "samples.npz")
    with only_warns(f"{folder / 'samples.png'}", f"python eval/generate.py {folder} makes samples"):
        if results.get("prompts"):
            save_figure(draw_prompt_grid(samples, results["prompts"]), folder / "samples.png")
        else:
            save_sample_grid(samples, folder / "samples.png")
    report = folder / "report.html"
    with only_warns(f"the report {report}", f"python eval/report.py {folder} --output {report} makes it again"):
        write_report([folder], report)


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page; pictures, curves and style are inside it.

    Raises:
        ValueError: for a folder without results.
    """
    names = short_names(folders)
    outcomes = [replace(load_outcome(folder), name=name) for folder, name in names.items()]
    title = html_text(", ".join(outcome.name for outcome in outcomes))

    def heading(words: str, outcome: Outcome) -> str:
        return f"<h2>{words}{'' if len(outcomes) == 1 else ': ' + html_text(outcome.name)}</h2>"

    parts = [f"<h1>{title}</h1>"]
    for folder, outcome in zip(names, outcomes, strict=True):
        if asked := asked_for(folder):
            parts += [heading("Run", outcome), _facts(asked)]
    parts += ["<h2>Scores</h2>", score_table(merge_rows(outcomes)).html()]
    samples = _merge(outcomes, lambda outcome: outcome.samples, torch.equal)
    if samples:
        parts += ["<h2>Samples</h2>", *_samples(samples, [outcome.results.get("prompts", []) for outcome in outcomes])]
    runs = {outcome.name: outcome.metrics for outcome in outcomes if outcome.metrics}
    curves = draw_curves(runs, outcomes[0].results["rows"].get("teacher", {}))
    if curves is not None:
        parts += ["<h2>Curves</h2>", _image("losses and scores by step", png(curves))]
    for outcome in outcomes:
        if (diagnostics := draw_diagnostics(pick_diagnostics(outcome.metrics))) is not None:
            parts += [heading("What the feature loss does", outcome), _image("diagnostics", png(diagnostics))]
        parts += [heading("Protocol", outcome), _facts(outcome.results["protocol"])]
        for source, protocol in outcome.results.get("sources", {}).items():
            parts += [f"<h2>{html_text(source)}</h2>", _facts(protocol)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(_page(title, parts), encoding="utf-8")


def _samples(samples: Mapping[str, Tensor], prompts: Sequence[Sequence[str]]) -> list[str]:
    """The pictures: beneath their prompts, where all outcomes show the same ones."""
    if prompts[0] and all(other == prompts[0] for other in prompts):
        note = '<p class="dim">Each column is of the prompt above it, all from the same seed.</p>'
        return [note, _image("samples by prompt", png(draw_prompt_grid(samples, prompts[0])))]
    buffer = io.BytesIO()
    sample_grid({name: images[:32] for name, images in samples.items()}).save(buffer, "png")
    note = '<p class="dim">The same position in each band is the same seed.</p>'
    return [note, _image("samples", buffer.getvalue(), 'class="samples" ')]


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


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
        traits = [name for name, value in config.items() if name.startswith("student_") and value and name not in own]
        words = [f"{name.removeprefix('student_').replace('_', ' ')} {config[name]}" for name in traits]
        if not config.get("student") and not config.get("student_width"):
            words = ["width 0.5", *words]
        config["student"] = ", ".join(map(str, [*filter(None, [config.get("student")]), *words]))
    return {words: config[name] for name, words in ASKED.items() if config.get(name) not in (None, "")}


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The last parts of the paths, as few as tell them apart.

    >>> list(short_names([Path("/a/x/run"), Path("/a/y/run")]).values())
    ['x/run', 'y/run']
    """
    paths = {folder: folder.resolve() for folder in folders}
    for length in range(1, max(len(path.parts) for path in paths.values()) + 1):
        names = {folder: "/".join(path.parts[-length:]) for folder, path in paths.items()}
        if len(set(names.values())) == len(set(paths.values())):
            break
    return names


def merge_rows(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """The rows of all; one that two runs share, as the same teacher, stands there once (the times of the first run)."""

    def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name != "ms_per_image"}

    return _merge(
        outcomes, lambda outcome: outcome.results["rows"], lambda row, other: without_times(row) == without_times(other)
    )


def _merge(
    outcomes: Sequence[Outcome],
    part: Callable[[Outcome], Mapping[str, Value]],
    is_same: Callable[[Value, Value], bool],
) -> dict[str, Value]:
    """What all outcomes hold by name; what is there already is left out, what is another's gets the outcome's name."""
    merged: dict[str, Value] = {}
    for outcome in outcomes:
        for name, value in part(outcome).items():
            if name in merged and is_same(merged[name], value):
                continue
            is_free = name not in merged and (name != "student" or len(outcomes) == 1)
            merged[name if is_free else f"{outcome.name}: {name}"] = value
    return merged


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><td class="dim">{html_text(label_of(name))}</td><td>{html_text(describe(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def _image(words: str, content: bytes, style: str = "") -> str:
    return f'<img {style}alt="{words}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
