"""What the benchmarks share: a file of numbers with how they were taken."""

from pathlib import Path
from typing import Any

from vkd_gen.provenance import environment, write_json

RESULTS = Path(__file__).parent / "results"


def write_results(path: Path, results: dict[str, Any], **protocol: Any) -> None:
    """Write the numbers, with the protocol and this machine's environment beside them, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**results, "protocol": {**protocol, "environment": environment()}})
    print(f"written to {path}")
