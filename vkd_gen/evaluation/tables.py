"""Tables of results: on a terminal of any width, in Markdown and in HTML, all from the same cells."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column
from rich.table import Table as RichTable

from vkd_gen.evaluation.labels import METRICS, Score, describe, label_of
from vkd_gen.text import html_text, markdown_text, printable

LEAST_WIDTH, WIDTH = 80, 150
"""Characters: what every terminal has, and what is taken where there is none."""


@dataclass(frozen=True)
class Table:
    """Cells by row and column.

    Attributes:
        names: of the rows.
        columns: each a heading, and a cell for every row.
    """

    names: Sequence[str]
    columns: Sequence[tuple[str, Sequence[str]]]

    @property
    def _rows(self) -> list[list[str]]:
        return [[cells[number] for _, cells in self.columns] for number in range(len(self.names))]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = ["| | " + " | ".join(heading for heading, _ in self.columns) + " |"]
        lines += ["|---" + "|---:" * len(self.columns) + "|"]
        for name, cells in zip(self.names, self._rows, strict=True):
            lines.append(f"| {markdown_text(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def html(self) -> str:
        """The table in HTML: a column per row, as long as those are fewer than the columns."""
        cells, across, down = self._rows, [heading for heading, _ in self.columns], list(self.names)
        if len(down) < len(across):
            cells, across, down = [list(line) for line in zip(*cells, strict=True)], down, across
        head = "".join(f"<th>{html_text(title)}</th>" for title in across)
        body = "\n".join(
            f"<tr><td>{html_text(title)}</td>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
            for title, line in zip(down, cells, strict=True)
        )
        return (
            f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        )


def print_columns(names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print a table whose words and numbers are all whole; columns that have no room beside others stand below them.

    Args:
        names: of the rows; a long one is folded.
        columns: each a heading, folded between its words, and a cell for every row.
    """
    names = list(map(printable, names))
    width = max(LEAST_WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    name_width = min(max(map(cell_len, names)), width // 3)
    blocks: list[list[tuple[int, str, Sequence[str]]]] = []
    room = 0
    for heading, cells in columns:
        needed = max(map(cell_len, [*heading.split(), *cells]))
        if needed + 3 > room:  # a line and two spaces stand between two columns
            blocks.append([])
            room = width - name_width - 4
        room -= needed + 3
        blocks[-1].append((needed, heading, cells))
    for block in blocks:
        headings = (Column(heading, width=needed) for needed, heading, _ in block)
        table = RichTable(Column(overflow="fold", width=name_width), *headings)
        for number, name in enumerate(names):
            table.add_row(escape(name), *(cells[number] for *_, cells in block))
        Console(width=width, emoji=False).print(table)


def score_table(rows: Mapping[str, Mapping[str, float]], *, for_terminal: bool = False) -> Table:
    """The rows of results.json, a column for each score that some row has.

    Args:
        rows: name -> key -> number.
        for_terminal: leave out what a terminal has no room for.
    """
    order = list(METRICS)
    found = {key: score for row in rows.values() for key in row if (score := Score.of(key))}
    shown = [
        score
        for _, score in sorted(found.items(), key=lambda item: (order.index(item[1].metric), item[0]))
        if METRICS[score.metric].form and (METRICS[score.metric].is_narrow or not for_terminal)
    ]

    def cell(row: Mapping[str, float], score: Score) -> str:
        return str(Score(score.metric, score.network, row[score.key])) if score.key in row else "-"

    return Table(list(rows), [(score.label, [cell(row, score) for row in rows.values()]) for score in shown])


def print_table(results: Mapping[str, Any]) -> None:
    """Print the rows of results.json for a person."""
    table = score_table(results["rows"], for_terminal=True)
    print_columns(table.names, table.columns)


def markdown_table(results: Mapping[str, Any]) -> str:
    """The rows and the protocol of results.json in Markdown."""
    facts = {label_of(name): describe(value) for name, value in results["protocol"].items()}
    lines = [f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in facts.items()]
    return "\n".join([score_table(results["rows"]).markdown(), "", *lines])
