"""What the benchmarks share: a table for the terminal, and a file of numbers with how they were taken."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vkd_gen.provenance import environment, write_json

RESULTS = Path(__file__).parent / "results"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Rows of text under a header, at a width of its own: results are often redirected to a file."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def write_results(path: Path, results: dict[str, Any], **protocol: Any) -> None:
    """Write the numbers, with the protocol and this machine's environment beside them, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**results, "protocol": {**protocol, "environment": environment()}})
    print(f"written to {path}")
