"""Rows that are computed once and kept on disk, in a folder whose name says what they are rows of.

The name is the SHA-256 of everything that decides the rows, so what is decided otherwise has another folder and nothing
stale is read. A folder's files are safetensors of equally many rows. Each carries the hash of its content, is written
whole or not at all, and is mapped into memory: the system reads what is asked for, and forgets it when it needs room.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from vkd_gen.provenance import hash_tensors, write_json
from vkd_gen.training.checkpoints import force_to_disk, problem_of

FORMAT = 1
"""Part of every name; to be raised when the same facts come to mean other rows or other files."""
FILE_BYTES = 2**28
"""A file holds as many rows as fit into this, and at least one."""
SECONDS_LEFT = 3600
"""A temporary file that has not changed for so long was left by a process that was killed."""
MISSING = "it is not there"


class KeptRows:
    """Rows on disk, read by their numbers. Each process maps the files for itself, once it asks for a row.

    Args:
        folder: of the files; its name is the hash of what decides them.
        num_rows: in all of them.
        rows_per_file: in each but the last.
    """

    def __init__(self, folder: Path, num_rows: int, rows_per_file: int):
        self.folder, self.num_rows, self.rows_per_file = folder, num_rows, rows_per_file
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the files: a process that is started afresh would be sent all that they hold."""
        return {**vars(self), "_mapped": {}}

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Copies of rows, of numbers from 0 on in any order: name -> `[rows, ...]`."""
        parts = [
            (self._file(number), [row % self.rows_per_file for row in group])
            for number, group in groupby(rows, lambda row: row // self.rows_per_file)
        ]
        return {name: torch.cat([file[name][within] for file, within in parts]) for name in parts[0][0]}

    def _file(self, number: int) -> dict[str, Tensor]:
        if number not in self._mapped:
            self._mapped[number], _ = _map(self.path(number))
        return self._mapped[number]

    @property
    def num_files(self) -> int:
        """Files, from number 0 on."""
        return -(-self.num_rows // self.rows_per_file)

    def rows_of(self, number: int) -> range:
        """Numbers of the rows in a file."""
        first = number * self.rows_per_file
        return range(first, min(first + self.rows_per_file, self.num_rows))

    def path(self, number: int) -> Path:
        """Of a file."""
        return self.folder / f"{number:05}.safetensors"

    def fault(self, number: int) -> str | None:
        """What is wrong with a file, in words; None for one that is as it was written."""
        path = self.path(number)
        if not path.exists():
            return MISSING
        try:
            tensors, digest = _map(path)
        except Exception as error:  # safetensors' own, the system's, and types that torch has not
            return " ".join(str(error).split())[:200]
        return None if digest == self._digest(number, tensors) else "it is not as it was written"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, which appears under its name once it is whole and on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(number)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # runs may share the folder
        try:
            save_file(dict(tensors), temporary, metadata={"sha256": self._digest(number, tensors)})
            force_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _digest(self, number: int, tensors: Mapping[str, Tensor]) -> str:
        return hashlib.sha256(f"{self.folder.name} {number} {hash_tensors(tensors)}".encode()).hexdigest()


def keep_rows(
    folder: Path,
    facts: Mapping[str, Any],
    num_rows: int,
    compute: Callable[[Sequence[int]], dict[str, Tensor]],
    *,
    what: str,
    advice: str,
) -> KeptRows:
    """Rows from disk, once what is missing or damaged there has been computed.

    All processes call it with the same arguments and share the work. Every byte that is there is read, to compare its
    hash. What all rows take on the disk is said first.

    Args:
        folder: that holds a folder for each kind of rows; all processes see the same one.
        facts: everything that decides the rows, as JSON. Names, shapes and types of the rows are added.
        num_rows: how many there are, at least 1.
        compute: numbers of rows -> name -> tensor `[rows, ...]` on the CPU, contiguous.
        what: these rows are, in the plural, for messages.
        advice: what to do where the disk has no room.

    Raises:
        ValueError: in one line and on all processes: if the disk has no room, before anything is computed; if it cannot
            be written to; and for whatever `compute` raises one.
    """
    state = PartialState()
    first = compute([0])
    layout = {name: [str(value.dtype), *value.shape[1:]] for name, value in first.items()}
    facts = {"format": FORMAT, "num_rows": num_rows, "layout": layout, **facts}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    row_bytes = sum(value.nbytes for value in first.values())
    kept = KeptRows(folder / key, num_rows, max(1, FILE_BYTES // row_bytes))
    state.print(f"{num_rows:,} {what}: {row_bytes:,} bytes each, {_size(num_rows * row_bytes)} in {kept.folder}")

    check_room = partial(_check_room, kept, what=what, advice=advice)
    # First, where nothing is there: so many files might not even be counted.
    _together(None if kept.folder.exists() else partial(check_room, num_rows * row_bytes))
    own = range(state.process_index, kept.num_files, state.num_processes)
    parts = gather_object([{number: kept.fault(number) for number in own}])
    faults = {number: fault for part in parts for number, fault in part.items() if fault is not None}
    for number, fault in faults.items():
        if fault != MISSING:
            state.print(f"{kept.path(number)} is damaged and made again: {fault}")
    if not faults:
        return kept
    _together(partial(check_room, sum(len(kept.rows_of(number)) for number in faults) * row_bytes))
    _together(partial(_begin, kept, facts, what) if state.is_main_process else None)
    _together(partial(_fill, kept, compute, sorted(faults)[state.process_index :: state.num_processes], what))
    _together(partial(_look, kept))
    return kept


def _check_room(kept: KeptRows, num_bytes: int, *, what: str, advice: str) -> None:
    free = shutil.disk_usage(next(path for path in kept.folder.parents if path.exists())).free
    if num_bytes > free:
        raise ValueError(
            f"the {what} do not fit into {kept.folder.parent}: they need {_size(num_bytes)}, and "
            f"{_size(free)} are free; {advice}"
        )


def _begin(kept: KeptRows, facts: Mapping[str, Any], what: str) -> None:
    """Make the folder, write down what its name is the hash of, and tidy up after what was killed."""

    def begin() -> None:
        kept.folder.mkdir(parents=True, exist_ok=True)
        for temporary in kept.folder.glob("*.tmp"):
            if time.time() - temporary.stat().st_mtime > SECONDS_LEFT:
                temporary.unlink()
        write_json(kept.folder / "facts.json", facts)

    _refuse(problem_of(begin, kept.folder), kept, what)


def _fill(kept: KeptRows, compute: Callable[[Sequence[int]], dict[str, Tensor]], files: list[int], what: str) -> None:
    for number in tqdm(files, f"computing {what}", unit="file", disable=not PartialState().is_main_process):
        rows = compute(kept.rows_of(number))
        _refuse(problem_of(partial(kept.write, number, rows), kept.folder), kept, what)


def _look(kept: KeptRows) -> None:
    unseen = [path for path in map(kept.path, range(kept.num_files)) if not path.exists()]
    if unseen:
        raise ValueError(f"{unseen[0]} was written and is not there: all processes must see the same folder")


def _refuse(problem: str | None, kept: KeptRows, what: str) -> None:
    if problem is not None:
        raise ValueError(f"the {what} cannot be written to {kept.folder}: {problem}")


def _together(action: Callable[[], None] | None) -> None:
    """Run an action, if this process has one, and raise on all processes what is a mistake on one of them."""
    problem = None
    if action is not None:
        try:
            action()
        except ValueError as error:
            problem = str(error)
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        raise ValueError(problems[0])


def _map(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """A file's tensors, mapped into memory, and the hash that it carries."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get("sha256")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
