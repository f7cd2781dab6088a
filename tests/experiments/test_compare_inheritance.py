"""The comparison of ways to start a student: what it measures, keeps and prints."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import compare_inheritance
from vkd_gen.cli import run_command


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Run the comparison in this process with the given flags."""
    monkeypatch.setenv("VKD_GEN_CACHE", str(tmp_path / "cache"))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["experiments/compare_inheritance.py", *map(str, flags)])
        run_command(compare_inheritance.main, compare_inheritance.InheritanceConfig, "")

    return run


def cells(table, row):
    return {heading: column[table.names.index(row)] for heading, column in table.columns}


def test_tables_by_hand():
    def cell(mean):
        return {"mean": mean, "standard_deviation": 0.5, "values": [mean]}

    def choice(error, *last, default=False):
        return {"error": error, "layers": {"up_blocks.0": [0, 2], "up_blocks.1": list(last)}, "default": default}

    choices = [choice(0.1, 1, 2), choice(0.2, 0, 2, default=True), choice(0.9, 0, 1), choice(1.5, 0, 1)]
    known = {
        "protocol": {"max_train_steps": 7},
        "before_training": {"a": {"first": cell(1.0), "random": cell(2.0)}},
        "layers": {"a": choices, "of one layer": [{"error": 0.0, "layers": {}, "default": True}]},
        "after_training": {"width 0.5": {"way": {"fid_digits": cell(12.0), "denoising_error": cell(0.1)}}},
    }
    other = {"before_training": {"b": {"random": cell(3.0)}}, "layers": {}}
    before = compare_inheritance.tables_before_training(known, other)["Error before training"]
    assert cells(before, "first") == {"a": "1.0000 ± 0.5000", "b": "-"}
    assert cells(before, "random") == {"a": "2.0000 ± 0.5000", "b": "3.0000 ± 0.5000"}
    layers = compare_inheritance.layers_table(known, other)
    assert layers.names == ["a"]
    assert list(cells(layers, "a").values()) == ["4", "0.2000 (place 2)", "0.1000", "0.2000", "0.9000"]
    after = compare_inheritance.tables_after_training(known)["After 7 steps, width 0.5"]
    assert list(cells(after, "way").values()) == ["12.00 ± 0.50", "0.1000 ± 0.5000"]


def test_comparison_before_training(tmp_path, pipeline_folder, compare, capsys):
    results = tmp_path / "docs" / "inheritance.json"
    flags = ["--step0_teachers", f"{pipeline_folder}=digits", "--widths", 0.5, "--num_seeds", 2]
    flags += ["--num_draws", 16, "--max_train_steps", 0, "--results", results]
    compare(*flags)
    rows = json.loads(results.read_text())["before_training"]["teacher width 0.5"]
    assert set(rows) == {"random initialisation"} | {
        f"{channels}, {rescaling}"
        for channels in ("random", "first", "magnitude", "activation")
        for rescaling in ("none", "fan_in", "least_squares")
    }
    assert len(rows["first, none"]["values"]) == 2
    assert rows["activation, least_squares"]["mean"] < rows["random initialisation"]["mean"]
    assert "activation, least_squares" in capsys.readouterr().out

    known = json.loads(results.read_text())
    known["before_training"]["teacher width 0.5"]["first, none"]["mean"] = 123.0
    results.write_text(json.dumps(known))
    compare(*flags)  # what is done already is not done again
    assert json.loads(results.read_text())["before_training"] == known["before_training"]
    compare(*flags, "--num_draws", 8)  # another protocol is
    assert json.loads(results.read_text())["before_training"] != known["before_training"]


def test_comparison_refuses_in_one_line(compare, tmp_path, capsys):
    (tmp_path / "damaged.json").write_text("[1, 2]")
    for flags, words in (
        (["--step0_teachers", "folder"], "takes FOLDER=DATASET"),
        (["--num_seeds", 0], "--num_seeds must be at least 1"),
        (["--results", tmp_path / "damaged.json"], "cannot read the results in"),
    ):
        with pytest.raises(SystemExit) as status:
            compare(*flags)
        assert status.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


@pytest.mark.parametrize(
    ("changes", "results"),
    [
        ({"num_draws": 8}, "runs/inheritance/inheritance.json"),
        ({"num_seeds": 1, "output_dir": "o"}, "o/inheritance.json"),
        ({"widths": (0.5,), "results": "r.json"}, "r.json"),
        ({"output_dir": "o"}, str(compare_inheritance.COMMITTED)),
    ],
)
def test_what_a_flag_changes_stays_out_of_the_committed_results(changes, results):
    assert str(compare_inheritance.InheritanceConfig(**changes).results_file) == results


def test_a_trained_run_is_made_once_and_by_its_flags(tmp_path, monkeypatch):
    made = []

    def stand_in(command, **_options):
        made.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"rows": {"student": {"fid_digits": len(made)}}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", stand_in)
    config = compare_inheritance.InheritanceConfig(output_dir=str(tmp_path))
    for changes, number in (({}, 1), ({}, 1), ({"max_train_steps": 20}, 2), ({"num_draws": 8}, 3)):
        changed = replace(config, **changes)
        scores = compare_inheritance.train(changed, 0.5, "first channels, fitted", seed=7)
        assert scores == {"fid_digits": number}
    command = shlex.join(made[1])
    for words in ("--inherit_channels first", "--student_width 0.5", "--seed 7", "--max_train_steps 20"):
        assert words in command
    assert "--lr_warmup_steps 20" in command
