"""Tables for a terminal of any width."""

import shutil
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

LEAST_WIDTH, WIDTH = 80, 150
"""Characters: what every terminal has, and what is taken where there is none."""


def print_columns(names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print a table whose words and numbers are all whole; columns that have no room beside others stand below them.

    Args:
        names: of the rows; a long one is folded.
        columns: each a heading, folded between its words, and a cell for every row.
    """
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
        table = Table(Column(overflow="fold", width=name_width), *headings)
        for number, name in enumerate(names):
            table.add_row(escape(name), *(cells[number] for *_, cells in block))
        Console(width=width, emoji=False).print(table)
