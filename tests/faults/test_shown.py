"""What a run shows: its page, its figures and captions, its progress line, the words of tables and of --help."""

import importlib.util
import json
import re
import sys
from functools import partial

import numpy as np
import pytest
from matplotlib.axes import Axes

import figures
from tables import markdown_page as comparison_table
from tests.experiments.test_tables import comparison
from tests.faults.small_run import options_of, train
from tests.recipes.conftest import RECIPES
from tests.test_diagnostics_figure import look
from tests.test_feature_weight import Ratios
from tests.test_report import make_run
from vkd_gen import LossWeights
from vkd_gen.evaluation.diagnostics_figure import draw_diagnostics
from vkd_gen.evaluation.figures import draw_curves
from vkd_gen.evaluation.labels import METRICS, label_of
from vkd_gen.evaluation.report import asked_for, write_report
from vkd_gen.evaluation.tables import markdown_table, print_table
from vkd_gen.training.feature_weight import FeatureWeight

EVAL = RECIPES.parent / "eval"

CONFIG = {
    "teacher": "a/teacher",
    "dataset": "b/birds",
    "method": "vkd",
    "max_train_steps": 321,
    "seed": 17,
    "student": "",
    "student_width": None,
    "num_training_images": 99,
    "train_batch_size": 8,
    "learning_rate": 0.002,
}


# ---- the page


def page_of(folder):
    write_report([folder], folder / "report.html")
    return (folder / "report.html").read_text()


def test_a_page_of_a_teachers_and_a_students_run(tmp_path):
    runs = [make_run(tmp_path / name, seed=number) for number, name in enumerate(("first", "second"))]
    (runs[0] / "config.json").write_text(json.dumps({"dataset": "x", "seed": 0, "block_out_channels": "<b>"}))
    (runs[1] / "config.json").write_text(json.dumps(CONFIG))
    with (runs[1] / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            line = {name if name == "step" else f"diagnostics/{name}": value for name, value in look(step).items()}
            file.write(json.dumps(line) + "\n")
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    first, second = (page.split(f"<h2>Run: {name}</h2>")[1].split("</table>")[0] for name in ("first", "second"))
    facts = [dict(re.findall(r'<td class="dim">([^<]*)</td><td>([^<]*)</td>', part)) for part in (first, second)]
    assert facts[0] == {"data": "x", "channels of the stages": "&lt;b&gt;", "seed": "0"}
    expected = {"data": "b/birds", "teacher": "a/teacher", "student": "width 0.5", "method": "vkd"}
    assert (expected | {"steps": "321", "seed": "17"}).items() <= facts[1].items()
    assert "<h2>What the feature loss does: second</h2>" in page
    assert "What the feature loss does: first" not in page
    assert page.count("data:image/png") == 3  # samples, curves, diagnostics


@pytest.mark.parametrize(
    ("changes", "student"),
    [
        ({"student": "bk-base"}, "bk-base"),
        ({"student": "a/b@main", "student_sha256": "77af", "student_revision": "c0ffee"}, "a/b@main"),
        ({"student": "bk-base", "student_width": 0.25}, "bk-base, width 0.25"),
        ({"student_width": 1, "student_layers_per_block": 1}, "width 1, layers per block 1"),
        ({"student_drop_mid_block": True}, "width 0.5, drop mid block True"),
    ],
)
def test_the_student_in_words(changes, student, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    assert asked_for(tmp_path)["student"] == student


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_a_configuration_that_is_none_costs_no_page(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert asked_for(tmp_path) == {}


# ---- looks at the feature loss


def steps_looked_at(num_steps, decay_end, every_steps=200, weighting="constant"):
    diagnostics = Ratios(*[2.0] * 2000)
    features = FeatureWeight(
        diagnostics,
        weighting=weighting,
        weights=LossWeights(denoising=1.0, output=1.0, feature=0.3),
        decay_start=0.0,
        decay_end=decay_end,
        num_steps=num_steps,
        every_steps=every_steps,
    )
    features.start()
    steps, scales = [], []
    for step in range(1, num_steps + 1):
        steps += [step] if features.measure(step) else []
        scales.append(features.state_dict())
    return steps, scales


@pytest.mark.parametrize(("num_steps", "decay_end"), [(300, 0.3), (100, 0.3), (1000, 0.3), (60, 1.0), (50_000, 0.3)])
def test_features_are_looked_at_early_and_often(num_steps, decay_end):
    steps, _ = steps_looked_at(num_steps, decay_end)
    last = round(decay_end * num_steps)
    assert len(steps) >= 6
    assert steps[0] <= max(5, last / 8)
    assert steps[-1] == last
    assert min(np.diff(steps)) >= 3 or last < 30


@pytest.mark.parametrize(("num_steps", "decay_end"), [(300, 0.3), (450, 1.0), (700, 0.9)])
def test_further_looks_move_no_weight(num_steps, decay_end):
    """The weight moves at every 200th step and the last one with features, as it would without them."""
    _, scales = steps_looked_at(num_steps, decay_end, weighting="gradient_ratio")
    moved = [step for step in range(2, num_steps + 1) if scales[step - 1] != scales[step - 2]]
    last = round(decay_end * num_steps)
    assert set(moved) <= {*range(200, last + 1, 200), last}


def test_a_few_steps_are_looked_at_as_they_were():
    assert steps_looked_at(5, 1.0, every_steps=2)[0] == [2, 4, 5]
    assert steps_looked_at(300, 0.3, every_steps=0)[0] == []
    assert steps_looked_at(300, 1.0, every_steps=1)[0] == list(range(1, 301))


# ---- figures


@pytest.mark.parametrize(("num_points", "is_marked"), [(1, True), (2, True), (200, False)])
def test_a_curve_of_few_points_is_seen(num_points, is_marked, monkeypatch):
    plotted = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *given, **style: plotted.append(style) or plot(*given, **style))
    metrics = [{"step": step, "loss/output": 1 / step} for step in range(1, num_points + 1)]
    draw_curves({"run": metrics}, {})
    assert [style["marker"] == "o" for style in plotted] == [is_marked]


def test_every_line_of_the_diagnostics_has_markers_and_floors_are_seen():
    losses, gradients, timesteps, _ = draw_diagnostics([look(100)]).axes  # one look alone
    lines = [*losses.get_lines(), *timesteps.get_lines(), *gradients.get_lines()[:-1]]
    assert all(line.get_marker() not in ("", "None", None) for line in lines)
    low, high = losses.get_ylim()
    floors = [line.get_ydata()[0] for line in losses.get_lines() if line.get_linestyle() == "--"]
    assert len(floors) == 2
    assert all(low < floor < high for floor in floors)


@pytest.mark.parametrize("floor", [0.0, 1e-17, None])
def test_a_floor_of_nothing_does_not_stretch_the_axis(floor):
    lines = [look(100), look(200)]
    for line in lines:
        line["floor/mid_block"] = floor
    losses = draw_diagnostics(lines).axes[0]
    assert losses.get_ylim()[0] > 1e-3


# ---- words


@pytest.mark.parametrize("extractor", ["", "_digits", "_efficientnet_lite0"])
def test_every_score_has_words(extractor):
    for name in METRICS:
        label = label_of(name + extractor)
        assert "_" not in label
        assert label.endswith(f"({extractor[1:].replace('_', '-')})") == bool(extractor)
        assert not re.search(r"\b(fid|kid|macs)\b", label)


def test_no_table_or_figure_shows_raw_keys(tmp_path, capsys):
    row = {name + "_digits": 1.0 for name in METRICS if name not in ("parameters", "macs")} | {
        "macs": 1,
        "parameters": 2,
    }
    protocol = {"num_inference_steps": 2, "extractor_weights_sha256": "x", "reference_hash": "y"}
    results = {"rows": {"teacher": row, "student": row}, "protocol": protocol}
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text(json.dumps(results))
    print_table(results)
    shown = [page_of(run), markdown_table(results), capsys.readouterr().out, comparison_table(comparison())]
    shown += [axis.get_title() for axis in figures.draw_differences(comparison()).axes]
    for text in shown:
        assert not re.search(r"\b(fid|kid) (digits|training)|teacher distance|\bmacs\b|num inference|\w+_digits", text)


COMMANDS = [*RECIPES.glob("*.py"), *EVAL.glob("*.py")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_example_commands_stand_on_lines_of_their_own(path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    if path.parent == EVAL:
        ask = partial(module.run_command, module.main, vars(module)[f"{path.stem.title()}Config"], module.__doc__)
    else:
        ask = partial(module.run_recipe, module.main, module.PRESETS, module.__doc__, next(iter(module.PRESETS)))
    with pytest.raises(SystemExit) as status:
        ask()
    assert status.value.code == 0
    shown = [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line for line in module.__doc__.splitlines() if line.startswith(("python ", "accelerate "))]
    assert examples
    assert [line for line in shown if line.startswith(("python ", "accelerate "))] == examples


# ---- the progress line


def test_the_losses_of_the_progress_line_move_with_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    lines, totals = [], []

    def note(run, _batch, losses):
        totals.append(losses["total"].item())
        if not hasattr(run, "noted"):
            run.noted = run._progress.set_postfix
            run._progress.set_postfix = lambda values, **_: lines.append(dict(values))

    options = options_of(tmp_path / "run", max_train_steps=6, log_every_steps=100, gradient_accumulation_steps=2)
    train(options, before_step=note)
    means = np.reshape(totals, (6, 2)).mean(1)
    assert [line["total"] for line in lines] == [f"{value:.4f}" for value in means]
    assert len({line["total"] for line in lines}) > 3
    assert all(not any("/" in name for name in line if name != "img/s") for line in lines)
