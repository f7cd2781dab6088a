"""RESULTS.md shows what the results files hold, and they hold nothing else."""

import json
import re
from pathlib import Path

import pytest

from fill_tables import BLOCK, filled
from paired import summarize
from plan import PRESETS, plan
from records import RunRecords
from time_to_quality import TIME_PRESETS, plan_budgets

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TEXT = (EXPERIMENTS / "RESULTS.md").read_text()
COMPARISONS = [(config.results_file, plan(config)) for config in PRESETS.values()]
COMPARISONS += [(config.base.results_file, plan_budgets(config)) for config in TIME_PRESETS.values()]
INHERITANCE = {"inheritance.json", "inheritance-mnist-cifar10.json"}


def test_tables_are_those_of_the_results_files():
    assert filled(TEXT) == TEXT


def test_every_table_on_the_page_is_made_from_a_file():
    outside = BLOCK.sub("", TEXT)
    assert not re.findall(r"^\|", outside, re.MULTILINE)


def test_every_comparison_is_shown_and_whole():
    shown = {re.search(r"--preset (\S+)", block[2])[1] for block in BLOCK.findall(TEXT) if "--preset" in block[2]}
    assert shown == {*PRESETS, *TIME_PRESETS}
    for file, runs in COMPARISONS:
        records = RunRecords(EXPERIMENTS.parent / file)
        assert all(records.find(run.flags) for run in runs)


def test_results_files_hold_no_run_that_no_preset_asks_for():
    asked = {}
    for file, runs in COMPARISONS:
        asked.setdefault(file.name, set()).update(run.flags for run in runs)
    files = {path.name: path for path in (EXPERIMENTS / "results").glob("*.json") if path.name not in INHERITANCE}
    assert {
        name: {run["flags"] for run in json.loads(path.read_text())["runs"]} for name, path in files.items()
    } == asked


@pytest.mark.parametrize("page", ["RESULTS.md", "LOG.md", "PREDICTIONS.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", (EXPERIMENTS / page).read_text()):
        assert (EXPERIMENTS / link).exists(), link


def test_numbers_of_the_readme_are_those_of_the_results():
    """The table of methods: Frechet distance and distance to the teacher, on digits and on MNIST."""
    readme = (EXPERIMENTS.parent / "README.md").read_text()
    rows = re.findall(
        r"^\| .*?`.*? \| ([\d.]+) ± ([\d.]+) \| (\.\d+) \| ([\d.]+) ± ([\d.]+) \| (\.\d+) \|$",
        readme.replace("**", ""),
        re.M,
    )
    arms = ("denoising", "denoising-same-time", "output", "output-alone", "fitnet")
    arms = (*arms, "solved-raw-ratio-0.3-early-no-denoising")
    assert len(rows) == len(arms)
    for arm, row in zip(arms, rows, strict=True):
        expected = []
        for preset, frechet in (("second-confirmation", "fid_digits"), ("mnist", "fid_mnist")):
            records = RunRecords(EXPERIMENTS / "results" / f"{preset}.json")
            runs = [records.find(run.flags)["student"] for run in plan(PRESETS[preset]) if run.arm == arm]
            values = [run[frechet] for run in runs]
            distance = sum(run["teacher_distance"] for run in runs) / len(runs)
            summary = summarize(values)
            expected += [f"{summary.mean:.2f}", f"{summary.standard_deviation:.2f}", f"{distance:.4f}"[1:]]
        assert list(row) == expected
