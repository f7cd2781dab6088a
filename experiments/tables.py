"""Runs of several methods over seeds, as tables: means with their spread, and paired differences to a control."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paired import PairedDifference, paired_difference, share_of_gap, summarize
from vkd_gen.evaluation.labels import describe, label_of

SHOWN = ("teacher_distance", "denoising_error", r"fid(_(?!training|held_out).+)?", r"kid(_(?!std).+)?")
"""Patterns of the scores that are compared, the least noisy first; less of them is better. The results file has all."""
BASELINE = "denoising"
"""The arm that the gap to the teacher is measured from."""


@dataclass(frozen=True)
class Comparison:
    """What tables and figures are made of.

    Attributes:
        records: finished runs, each with `arm`, `start`, `seed`, `steps` and `student` (score -> value).
        arms: in the order to show them in.
        starts: what students started from, likewise.
        control: the arm that the others are compared to.
        num_seeds: runs that every arm should have from each start.
        reference: `rows` of the teacher and of held-out images, and `protocol`; may be empty.
    """

    records: Sequence[Mapping[str, Any]]
    arms: Sequence[str]
    starts: Sequence[str]
    control: str
    num_seeds: int
    reference: Mapping[str, Any]

    def runs(self, start: str, arm: str) -> dict[int, Mapping[str, Any]]:
        """Seed -> record."""
        found = [record for record in self.records if (record["start"], record["arm"]) == (start, arm)]
        return {record["seed"]: record for record in sorted(found, key=lambda record: record["seed"])}

    def scores(self, start: str, arm: str, score: str) -> dict[int, float]:
        """Seed -> score, for the runs that have it."""
        runs = self.runs(start, arm).items()
        return {seed: record["student"][score] for seed, record in runs if score in record["student"]}

    def difference(self, start: str, arm: str, score: str) -> PairedDifference | None:
        """To the control."""
        return paired_difference(self.scores(start, arm, score), self.scores(start, self.control, score))

    def decimals(self, start: str, score: str) -> int:
        """Decimals that a score is shown with."""
        return decimals_for([value for arm in self.arms for value in self.scores(start, arm, score).values()])

    @property
    def shown_scores(self) -> list[str]:
        """The scores of the tables."""
        names = sorted({name for record in self.records for name in record["student"]})
        return [name for pattern in SHOWN for name in names if re.fullmatch(pattern, name)]

    @property
    def frechet_distance(self) -> str | None:
        """The name of the Frechet distance among the scores."""
        return next((name for name in self.shown_scores if name.startswith("fid")), None)


@dataclass(frozen=True)
class TextTable:
    """A table of text: first column names, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def decimals_for(values: Sequence[float]) -> int:
    """Decimals that show the largest of some values in four digits.

    >>> decimals_for([0.0087, 0.0131]), decimals_for([9.6, 11.8])
    (5, 2)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return max(0, 3 - math.floor(math.log10(largest))) if largest else 0


def tables_of(comparison: Comparison) -> list[TextTable]:
    """For each start what the arms score, and how that differs from the control."""
    tables = []
    for start in comparison.starts:
        tables.append(_scores_table(comparison, start))
        if len(comparison.arms) > 1:
            tables.append(_differences_table(comparison, start))
    return tables


def _scores_table(comparison: Comparison, start: str) -> TextTable:
    scores = {score: comparison.decimals(start, score) for score in comparison.shown_scores}
    frechet = comparison.frechet_distance if BASELINE in comparison.arms else None
    references = comparison.reference.get("rows", {})
    target = references.get("teacher", {}).get(frechet)
    rows = []
    for arm in comparison.arms:
        runs = comparison.runs(start, arm)
        cells = [arm, f"{len(runs)} of {comparison.num_seeds}"]
        for score, decimals in scores.items():
            cells.append(_with_spread(list(comparison.scores(start, arm, score).values()), decimals))
        if frechet:
            baseline = comparison.scores(start, BASELINE, frechet)
            share = None if target is None else share_of_gap(comparison.scores(start, arm, frechet), baseline, target)
            cells.append("-" if share is None else f"{share:.0%}")
        steps = {record["steps"] for record in runs.values()}
        rows.append([*cells, f"{steps.pop():,}" if steps else "-"])
    for name, row in references.items():
        known = [f"{row[score]:.{decimals}f}" if score in row else "-" for score, decimals in scores.items()]
        rows.append([name, "-", *known, *(["-"] if frechet else []), "-"])
    header = ["", "runs", *map(label_of, scores), *(["share of the gap"] if frechet else []), "steps"]
    return TextTable(f"Scores, {start} weights", header, rows)


def _with_spread(values: Sequence[float], decimals: int) -> str:
    if not values:
        return "-"
    summary = summarize(values)
    spread = "" if summary.standard_deviation is None else f" ± {summary.standard_deviation:.{decimals}f}"
    return f"{summary.mean:.{decimals}f}{spread}"


def _differences_table(comparison: Comparison, start: str) -> TextTable:
    scores = {score: comparison.decimals(start, score) for score in comparison.shown_scores}
    rows = [
        [arm, *(_in_words(comparison.difference(start, arm, score), decimals) for score, decimals in scores.items())]
        for arm in comparison.arms
        if arm != comparison.control
    ]
    return TextTable(f"Differences to {comparison.control}, {start} weights", ["", *map(label_of, scores)], rows)


def _in_words(difference: PairedDifference | None, decimals: int) -> str:
    if difference is None:
        return "-"
    width = "" if difference.half_width is None else f" ± {difference.half_width:.{decimals}f}"
    mark = "*" if difference.is_off_zero else ""
    return f"{difference.mean:+.{decimals}f}{width}{mark} ({difference.num_better}/{len(difference.differences)})"


def notes_of(comparison: Comparison) -> list[str]:
    """How to read the tables, and how the scores were measured."""
    notes = [
        "Scores are means over seeds ± standard deviation; less is better in all of them.",
        f"Differences are to {comparison.control} on equal seeds, with 95 % t-intervals; * marks an interval that "
        "excludes zero, and the brackets count the seeds in which the arm is better.",
    ]
    if comparison.frechet_distance and BASELINE in comparison.arms:
        name = label_of(comparison.frechet_distance)
        notes.append(f"The share of the gap is that of {name} between {BASELINE} and the teacher.")
    for key, words in (("threads", "threads per run"), ("commit", "commits")):
        if found := sorted({record[key] for record in comparison.records if key in record}):
            notes.append(f"{words}: {', '.join(map(str, found))}")
    protocol = comparison.reference.get("protocol", {})
    return notes + [f"{label_of(name)}: {describe(value)}" for name, value in protocol.items()]


def markdown_tables(tables: Sequence[TextTable]) -> str:
    """Tables as Markdown, each under its title."""
    lines = []
    for table in tables:
        rows = ["| " + " | ".join(cells) + " |" for cells in (table.header, *table.rows)]
        rule = "|---" + "|---:" * (len(table.header) - 1) + "|"
        lines += [f"### {table.title}", "", rows[0], rule, *rows[1:], ""]
    return "\n".join(lines)


def markdown_page(comparison: Comparison) -> str:
    """Tables and notes as Markdown; the same runs give the same text."""
    notes = "\n".join(f"- {note}" for note in notes_of(comparison))
    return f"{markdown_tables(tables_of(comparison))}\n{notes}\n"


def print_tables(tables: Sequence[TextTable]) -> None:
    """Tables for a terminal, each under its title."""
    from vkd_gen.evaluation.tables import print_columns

    for table in tables:
        names, *columns = zip(*table.rows, strict=True)
        print(f"\n{table.title}")
        print_columns(names, list(zip(table.header[1:], columns, strict=True)))
