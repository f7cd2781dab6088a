"""Time to quality: where curves reach a bar, by hand, what is run for them, and how they are shown."""

import math
import re
import sys
import warnings
from dataclasses import replace

import pytest

import fill_tables
import time_to_quality
from curves import Curves, curve_tables, draw_curves, in_words, steps_to
from plan import PRESETS, plan
from records import RunRecords
from time_to_quality import TIME_PRESETS, curves_of, plan_budgets, what_is_missing
from vkd_gen.cli import run_recipe

DIGITS = TIME_PRESETS["time-digits"]


def record(steps, distance, frechet=None, seconds_per_step=0.1, **changes):
    scores = {"teacher_distance": distance} | ({} if frechet is None else {"fid_digits": frechet})
    return {"steps": steps, "training_seconds": steps * seconds_per_step, "student": scores, **changes}


def curves(num_steps=400, **arms):
    """Curves of arms, each a list over seeds of {steps: distance}; a step of `quick` takes half of the others' time."""
    records = {
        arm: {
            seed: {
                steps: record(steps, score, seconds_per_step=0.05 if arm == "quick" else 0.1)
                for steps, score in curve.items()
            }
            for seed, curve in enumerate(by_seed)
        }
        for arm, by_seed in arms.items()
    }
    return Curves(records, "control", num_steps, num_runs=6)


def cells(found, arm):
    (table,) = curve_tables(found).values()
    return {heading: column[table.names.index(arm)] for heading, column in table.columns}


# ---- arithmetic


@pytest.mark.parametrize(
    ("curve", "bar", "expected"),
    [
        ({100: 8.0, 200: 4.0, 400: 1.0}, 2.0, (200 * math.sqrt(2),) * 2),  # half of the way in logarithms
        ({100: 8.0, 200: 4.0, 400: 1.0}, 4.0, (200, 200)),  # a tie is reached
        ({100: 8.0, 200: 4.0, 400: 1.0}, 8.0, (0, 100)),  # and by the smallest budget, perhaps by less
        ({100: 8.0, 200: 4.0, 400: 1.0}, 0.9, (400, math.inf)),
        ({100: 1.0, 200: 4.0, 400: 1.0}, 2.0, (200 * math.sqrt(2),) * 2),  # 100 was luck
        ({100: 1.0, 200: 1.0, 400: 4.0}, 2.0, (400, math.inf)),
        ({100: math.inf, 200: 1.0}, 2.0, (100, 200)),  # that run ended in no number
        ({100: 4.0}, 4.0, (0, 100)),
        ({100: 4.0}, 3.0, (100, math.inf)),
        ({100: 2.0, 400: 2.0}, 2.0, (0, 100)),
    ],
)
def test_steps_to_a_bar(curve, bar, expected):
    assert steps_to(curve, bar) == pytest.approx(expected)
    shuffled = dict(sorted(curve.items(), reverse=True))
    assert steps_to(shuffled, bar) == steps_to(curve, bar)


def test_a_power_law_is_read_off_exactly():
    curve = {steps: 3 * steps**-0.7 for steps in (100, 150, 200, 300, 600)}
    for steps in (100.5, 170, 299, 599):
        assert steps_to(curve, 3 * steps**-0.7) == pytest.approx((steps, steps))


def test_medians_and_spreads_of_bounds():
    exact = [(value, value) for value in (2.0, 3.0, 5.0)]
    assert in_words(exact, ".1f", is_gain=True) == "3.0 (2.0 to 5.0)"
    assert in_words(exact[:1], ".1f", is_gain=True) == "2.0"
    assert in_words([], ".1f", is_gain=True) == "-"
    at_least = (6.0, math.inf)
    assert in_words([*exact[:2], at_least], ".1f", is_gain=True) == "3.0 (2.0 to ≥ 6.0)"
    assert in_words([at_least] * 3, ".1f", is_gain=True) == "≥ 6.0"
    assert in_words([(0.0, 1.0), *exact[:2]], ".1f", is_gain=True) == "2.0 (< 1.0 to 3.0)"
    assert in_words([(0.0, 100.0), (250.0, 250.0)], ".0f", is_gain=False) == "≤ 175 (≤ 100 to 250)"
    assert in_words([(600.0, math.inf), (250.0, 250.0)], ".0f", is_gain=False) == "> 425 (250 to > 600)"


def test_table_by_hand():
    control = [{200: 8.0, 400: 4.0}, {200: 8.0, 400: 2.0}]
    found = curves(
        control=control,
        quick=[{100: 8.0, 400: 2.0}, {100: 8.0, 400: 2.0}],  # 4 after 200 steps, 2 after 400, each at half of the cost
        early=[{100: 4.0, 400: 1.0}, {100: 1.0, 400: 1.0}],
        never=[{100: 8.0, 400: 5.0}, {100: 8.0, 400: 5.0}],
    )
    (title,) = curve_tables(found)
    assert title == "Time to the distance to the teacher of control after 400 steps"
    assert cells(found, "control") == {
        "runs": "4 of 6",
        "seconds per step": "0.1",
        "after all steps": "3.000 (2.000 to 4.000)",
        "steps to the bar": "400",
        "times fewer steps": "1.00",
        "seconds to the bar": "40.0",
        "times fewer seconds": "1.00",
    }
    quick = cells(found, "quick")
    assert (quick["steps to the bar"], quick["times fewer steps"]) == ("300 (200 to 400)", "1.50 (1.00 to 2.00)")
    assert (quick["seconds to the bar"], quick["times fewer seconds"]) == ("15.0 (10.0 to 20.0)", "3.00 (2.00 to 4.00)")
    early = cells(found, "early")
    assert (early["seconds to the bar"], early["times fewer seconds"]) == ("≤ 10.0", "≥ 4.00")
    never = cells(found, "never")
    assert (never["steps to the bar"], never["times fewer steps"]) == ("> 400", "< 1.00")


def test_seconds_are_of_the_median_step():
    found = curves(control=[{200: 8.0, 400: 4.0}])
    slow = record(100, 9.0, seconds_per_step=7.0)  # the machine was busy
    busy = replace(found, records={"control": {0: {100: slow, **found.records["control"][0]}}})
    assert cells(busy, "control")["seconds to the bar"] == "40.0"


def test_what_is_missing_is_left_out():
    found = curves(control=[{400: 4.0}, {200: 8.0}], quick=[{400: 8.0}, {400: 1.0}], other=[])  # seed 1 has no bar
    assert cells(found, "quick")["times fewer steps"] == "< 1.00"
    assert cells(found, "other")["runs"] == "0 of 6"
    assert set(cells(found, "other").values()) == {"0 of 6", "-"}
    nothing = curves(control=[{200: 8.0}], quick=[{400: 1.0}])
    assert cells(nothing, "quick")["times fewer steps"] == "-"
    broken = curves(control=[{400: math.nan}], quick=[{400: 1.0}])
    assert cells(broken, "quick")["times fewer steps"] == "-"
    untimed = curves(control=[{400: 4.0}], quick=[{400: 1.0}])
    untimed.records["quick"][0][400]["training_seconds"] = 0.0
    assert (cells(untimed, "quick")["times fewer steps"], cells(untimed, "quick")["times fewer seconds"]) == (
        "≥ 1.00",
        "-",
    )


# ---- what is run


def test_presets_are_whole():
    for name, config in TIME_PRESETS.items():
        runs = plan_budgets(config)
        assert config.preset == name
        assert len(runs) == len({run.flags for run in runs}) == len({run.name for run in runs}) == 9 * len(config.arms)
        assert len({run.folder for run in runs}) == len(runs)
        assert (config.control, config.base.results_file) == ("fitnet", PRESETS[config.comparison].results_file)
    assert {run.steps for run in plan_budgets(DIGITS)} == {600, 300, 200}


def test_runs_that_the_comparison_has_are_found_by_their_flags():
    known = {run.flags: run for run in plan(PRESETS["faster-digits"])}
    shared = {(known[run.flags].arm, run.arm, run.steps) for run in plan_budgets(DIGITS) if run.flags in known}
    assert shared >= {
        ("fitnet", "fitnet", 600),
        ("muon", "muon", 600),
        ("muon-half", "muon", 300),
        ("muon-third", "muon", 200),
    }
    records = RunRecords(DIGITS.base.results_file)
    found = curves_of(DIGITS, records).records
    assert {600, 300, 200} <= set(found["muon"][300])
    assert (
        found["muon"][300][300]["student"]
        == records.find(next(f for f in known if known[f].arm == "muon-half"))["student"]
    )


def test_missing_runs_are_told_in_one_line(tmp_path):
    empty = RunRecords(tmp_path / "none.json")
    line = what_is_missing(replace(DIGITS, arms=("fitnet", "muon")), empty)
    assert line.startswith("missing: 18 of 18 runs: fitnet, inherited, seed 300, 600 steps; ")
    assert line.endswith(" and 15 more")
    assert "\n" not in line
    one = replace(DIGITS, arms=("fitnet",), shares=(1,), num_seeds=1)
    assert what_is_missing(one, RunRecords(DIGITS.base.results_file)) == ""


def test_a_changed_comparison_leaves_the_committed_files_alone(tmp_path):
    committed = PRESETS["faster-digits"].results_file
    assert DIGITS.figure_file == committed.parent / "time-digits.png"
    changed = replace(DIGITS, num_seeds=1)
    assert (changed.base.results_file, changed.figure_file.parent) == (committed, changed.base.runs_folder)
    short = replace(DIGITS, max_train_steps=4, output_dir=str(tmp_path))
    assert (short.base.results_file, short.figure_file.parent) == (tmp_path / "results.json", tmp_path)
    own = replace(DIGITS, max_train_steps=4, results=str(tmp_path / "a.json"))
    assert (own.base.results_file, own.figure_file.parent) == (tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shares", "0.5"], "--shares are above 0, with 1 among them, not 0.5"),
        (["--arms", "fitnet", "muon-half"], "arm muon-half has steps of its own: name the arm that it is"),
        (["--control", "bk"], "--control bk is not among the arms"),
        (["--comparison", "nothing"], "there is no comparison 'nothing'; choose one of screen"),
        (["--arms", "fitnett"], "there is no arm 'fitnett'; the nearest are fitnet"),
        (["--num_seeds", "0"], "--num_seeds must be at least 1"),
    ],
)
def test_mistake_is_told_in_one_line(flags, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as status:
        command(monkeypatch, *flags)
    assert status.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments/time_to_quality.py", *map(str, flags)])
    run_recipe(time_to_quality.main, TIME_PRESETS, time_to_quality.__doc__, default="time-digits")


def test_a_dry_run_prints_the_plan_and_writes_nothing(monkeypatch, capsys, tmp_path):
    command(monkeypatch, "--dry_run", "--num_seeds", 1, "--output_dir", tmp_path / "runs")
    shown = capsys.readouterr().out
    assert "done: muon, inherited, seed 300, 200 steps" in shown
    assert "fitnet: features through a free 1x1 convolution" in shown
    assert re.search(rf"^{3 * len(DIGITS.arms)} runs, \d+ of them done", shown, re.M)
    assert list(tmp_path.iterdir()) == []


# ---- what is shown


@pytest.fixture
def finished(tmp_path):
    """A small comparison whose runs are all in its results file."""
    config = replace(DIGITS, arms=("fitnet", "muon"), results=str(tmp_path / "r.json"), output_dir=str(tmp_path / "o"))
    records = RunRecords(config.base.results_file)
    for run in plan_budgets(config):
        distance = (1.0 if run.arm == "fitnet" else 0.5) / run.steps
        head = {"flags": run.flags, "arm": run.arm, "start": run.start, "seed": run.seed, "seconds": 1.0}
        records.runs.append({**record(run.steps, distance, 1000 * distance), **head, "reference": ""})
    records.add(records.runs[0])
    return config


def test_results_are_shown_and_the_same_command_makes_no_run(finished, monkeypatch, capsys, tmp_path):
    flags = ["--arms", "fitnet", "muon", "--results", finished.results, "--output_dir", finished.output_dir]
    command(monkeypatch, *flags)
    shown = capsys.readouterr().out
    assert not re.search("missing|to make", shown)
    page = (tmp_path / "o" / "time-digits.md").read_text()
    row = "| muon | 9 of 9 | 0.1 | 0.000833 | 300 | 2.00 | 30.0 | 2.00 |"
    assert page.count("### Time to the ") == 2
    assert row in page
    assert (tmp_path / "time-digits.png").exists()
    block = f"<!-- time_to_quality.py --preset time-digits {' '.join(flags)} -->\n\n<!-- end -->"
    assert row in fill_tables.filled(block)
    with pytest.raises(ValueError, match="holds no run of"):
        fill_tables.filled(block.replace("r.json", "none.json"))


def test_panels_have_curves_bands_and_the_bar(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_curves(curves_of(finished, RunRecords(finished.base.results_file)))
    distance, frechet = figure.axes
    assert (distance.get_xscale(), distance.get_yscale(), frechet.get_yscale()) == ("log", "log", "log")
    lines = {line.get_label(): line for line in distance.lines}
    assert set(lines) == {"fitnet", "muon", "fitnet after 600 steps"}
    assert list(lines["muon"].get_xdata()) == pytest.approx([20, 30, 60])
    assert lines["fitnet after 600 steps"].get_linestyle() == "--"
    assert list(lines["fitnet after 600 steps"].get_ydata()) == pytest.approx([1 / 600] * 2)
    assert len(distance.collections) == 2
    assert len(figure.legends) == 1
