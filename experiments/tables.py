"""Runs of several methods over seeds, as tables: means with their spread, and paired differences to a control."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paired import PairedDifference, paired_difference, share_of_gap, summarize
from vkd_gen.evaluation.labels import describe, label_of
from vkd_gen.evaluation.tables import Table, print_columns

SHOWN = ("teacher_distance", "denoising_error", r"fid(_(?!training|held_out).+)?", r"kid(_(?!std).+)?")
"""Patterns of the scores that are compared, the least noisy first; less of them is better. The results file has all."""
OF_PROMPTS = ("guidance_gap_ratio", "wrong_prompt_error", "prompt_rank")
"""Scores of models with prompts that are shown too: less is not better in them."""
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
    def scores_of_prompts(self) -> list[str]:
        """Those of `OF_PROMPTS` that there are."""
        return [name for name in OF_PROMPTS if any(name in record["student"] for record in self.records)]

    @property
    def frechet_distance(self) -> str | None:
        """The name of the Frechet distance among the scores."""
        return next((name for name in self.shown_scores if name.startswith("fid")), None)


def decimals_for(values: Sequence[float]) -> int:
    """Decimals that show the largest of some values in four digits.

    >>> decimals_for([0.0087, 0.0131]), decimals_for([9.6, -11.8]), decimals_for([99999.0]), decimals_for([])
    (5, 2, 0, 0)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return max(0, 3 - math.floor(math.log10(largest))) if largest else 0


def tables_of(comparison: Comparison) -> dict[str, Table]:
    """Title -> table: for each start what the arms score, and how that differs from the control."""
    tables = {}
    for start in comparison.starts:
        tables[f"Scores, {start} weights"] = _scores_table(comparison, start)
        if len(comparison.arms) > 1:
            tables[f"Differences to {comparison.control}, {start} weights"] = _differences_table(comparison, start)
    return tables


def _scores_table(comparison: Comparison, start: str) -> Table:
    references = comparison.reference.get("rows", {})
    runs = [comparison.runs(start, arm) for arm in comparison.arms]
    columns = [("runs", [f"{len(found)} of {comparison.num_seeds}" for found in runs])]
    for score in (*comparison.shown_scores, *comparison.scores_of_prompts):
        decimals = comparison.decimals(start, score)
        values = [list(comparison.scores(start, arm, score).values()) for arm in comparison.arms]
        known = [f"{row[score]:.{decimals}f}" if score in row else "-" for row in references.values()]
        columns.append((label_of(score), [_with_spread(found, decimals) for found in values] + known))
    if (frechet := comparison.frechet_distance) and BASELINE in comparison.arms:
        target, baseline = references.get("teacher", {}).get(frechet), comparison.scores(start, BASELINE, frechet)
        shares = [
            None if target is None else share_of_gap(comparison.scores(start, arm, frechet), baseline, target)
            for arm in comparison.arms
        ]
        columns.append(("share of the gap", ["-" if share is None else f"{share:.0%}" for share in shares]))
    columns.append(("steps", [f"{next(iter(found.values()))['steps']:,}" if found else "-" for found in runs]))
    num_rows = len(runs) + len(references)
    filled = [(heading, cells + ["-"] * (num_rows - len(cells))) for heading, cells in columns]
    return Table([*comparison.arms, *references], filled)


def _with_spread(values: Sequence[float], decimals: int) -> str:
    if not values:
        return "-"
    summary = summarize(values)
    spread = "" if summary.standard_deviation is None else f" ± {summary.standard_deviation:.{decimals}f}"
    return f"{summary.mean:.{decimals}f}{spread}"


def _differences_table(comparison: Comparison, start: str) -> Table:
    arms = [arm for arm in comparison.arms if arm != comparison.control]
    columns = []
    for score in comparison.shown_scores:
        decimals = comparison.decimals(start, score)
        differences = [comparison.difference(start, arm, score) for arm in arms]
        columns.append((label_of(score), [_in_words(difference, decimals) for difference in differences]))
    return Table(arms, columns)


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
    if comparison.scores_of_prompts:
        notes.append(
            "But of the guidance gap ratio 1 is best, an error with a wrong prompt should be far above that with the "
            "right one, and the best rank of the right prompt is 1."
        )
    if comparison.frechet_distance and BASELINE in comparison.arms:
        name = label_of(comparison.frechet_distance)
        notes.append(f"The share of the gap is that of {name} between {BASELINE} and the teacher.")
    for key, words in (("threads", "threads per run"), ("commit", "commits")):
        if found := sorted({record[key] for record in comparison.records if key in record}):
            notes.append(f"{words}: {', '.join(map(str, found))}")
    protocol = comparison.reference.get("protocol", {})
    return notes + [f"{label_of(name)}: {describe(value)}" for name, value in protocol.items()]


def markdown_tables(tables: Mapping[str, Table]) -> str:
    """Tables as Markdown, each under its title."""
    return "\n".join(f"### {title}\n\n{table.markdown()}\n" for title, table in tables.items())


def markdown_page(comparison: Comparison) -> str:
    """Tables and notes as Markdown; the same runs give the same text."""
    notes = "\n".join(f"- {note}" for note in notes_of(comparison))
    return f"{markdown_tables(tables_of(comparison))}\n{notes}\n"


def print_tables(tables: Mapping[str, Table]) -> None:
    """Tables for a terminal, each under its title."""
    for title, table in tables.items():
        print(f"\n{title}")
        print_columns(table.names, table.columns)
