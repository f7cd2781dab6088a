"""docs/RESULTS.md shows what the committed results files hold."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipes import conftest as recipes
from vkd_gen.evaluation.method_tables import Comparison, markdown_tables
from vkd_gen.evaluation.run_records import RunRecords

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "RESULTS.md").read_text()
BLOCKS = re.findall(
    r"^<!-- compare_methods\.py --preset (\S+) --control (\S+) -->\n(.*?)\n<!-- end -->$",
    TEXT,
    re.MULTILINE | re.DOTALL,
)


def comparison_of(preset, control):
    """What the command shows of the runs that the results file holds."""
    recipe = recipes.load_recipe("compare_methods")
    config = replace(recipe.PRESETS[preset], control=control)
    records = RunRecords(ROOT / (config.results or f"docs/results/{preset}.json"))
    found = [(run, records.find(run.flags)) for run in recipe.plan(config)]
    found = [{**record, "arm": run.arm} for run, record in found if record is not None]
    return Comparison(
        found,
        arms=config.arms,
        starts=config.starts,
        control=control,
        num_seeds=config.num_seeds,
        reference=records.references[found[0]["reference"]],
    )


@pytest.mark.parametrize(("preset", "control", "shown"), BLOCKS, ids=[f"{name}-{to}" for name, to, _ in BLOCKS])
def test_tables_are_those_of_the_results_files(preset, control, shown):
    tables = markdown_tables(comparison_of(preset, control)).replace("### ", "#### ")
    assert shown.strip() == tables.strip()


def test_every_comparison_is_shown():
    recipe = recipes.load_recipe("compare_methods")
    kept = {f"docs/results/{path.name}" for path in (ROOT / "docs" / "results").glob("*.json")}
    paths = {name: config.results or f"docs/results/{name}.json" for name, config in recipe.PRESETS.items()}
    assert {name for name, _, _ in BLOCKS} == {name for name, path in paths.items() if path in kept}
