"""Write the tables of RESULTS.md anew from the results files: python experiments/fill_tables.py.

A table stands between `<!-- COMMAND -->`, such as `compare_methods.py --preset mnist --control output`, and
`<!-- end -->`. `| scores` or `| differences` after the command keeps one kind of table.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

import compare_inheritance
import time_to_quality
from compare_methods import comparison_of
from curves import curve_tables
from plan import PRESETS, ComparisonConfig
from records import RunRecords
from tables import markdown_tables, tables_of
from vkd_gen.evaluation.tables import Table

FOLDER = Path(__file__).parent
BLOCK = re.compile(
    r"^(<!-- (compare_\w+|time_to_quality)\.py (.*?)(?: \| (\w+))? -->)\n.*?\n(<!-- end -->)$", re.MULTILINE | re.DOTALL
)


def methods_tables(words: Sequence[str]) -> dict[str, Table]:
    """The tables that compare_methods.py prints, of the runs that the results file holds."""
    preset = PRESETS[words[words.index("--preset") + 1]]
    config = tyro.cli(ComparisonConfig, default=preset, args=words, use_underscores=True)
    comparison = comparison_of(config, RunRecords(FOLDER.parent / config.results_file))
    if comparison is None:
        raise ValueError(f"{config.results_file} holds no run of {' '.join(words)}")
    return tables_of(comparison)


def time_tables(words: Sequence[str]) -> dict[str, Table]:
    """The tables that time_to_quality.py prints, of the runs that the results file holds."""
    preset = time_to_quality.TIME_PRESETS[words[words.index("--preset") + 1]]
    config = tyro.cli(time_to_quality.TimeConfig, default=preset, args=words, use_underscores=True)
    curves = time_to_quality.curves_of(config, RunRecords(FOLDER.parent / config.base.results_file))
    if not curves.shown_scores:
        raise ValueError(f"{config.base.results_file} holds no run of {' '.join(words)}")
    return curve_tables(curves)


def inheritance_tables(kind: str) -> dict[str, Table]:
    """The tables that compare_inheritance.py prints: `before_training`, `layers` or `after_training`."""
    paths = [FOLDER / "results" / f"{name}.json" for name in ("inheritance", "inheritance-mnist-cifar10")]
    files = [json.loads(path.read_text()) for path in paths]
    if kind == "after_training":
        return compare_inheritance.tables_after_training(files[0])
    tables = compare_inheritance.tables_before_training(*files)
    return {title: table for title, table in tables.items() if title.endswith("by layers") == (kind == "layers")}


TABLES: dict[str, Callable[[str], dict[str, Table]]] = {
    "compare_methods": lambda words: methods_tables(shlex.split(words)),
    "compare_inheritance": inheritance_tables,
    "time_to_quality": lambda words: time_tables(shlex.split(words)),
}
"""Command -> the tables that it prints for its flags."""


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def block(found: re.Match[str]) -> str:
        tables = TABLES[found[2]](found[3])
        shown = {title: table for title, table in tables.items() if title.lower().startswith(found[4] or "")}
        return f"{found[1]}\n\n{markdown_tables(shown)}\n{found[5]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    page = FOLDER / "RESULTS.md"
    page.write_text(filled(page.read_text()))
