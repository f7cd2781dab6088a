"""Rows that are computed once and kept on disk, in a folder whose name says what they are rows of: pixels of images.

The name is the SHA-256 of everything that decides the rows, so what is decided otherwise has another folder and nothing
stale is read. A folder's files are safetensors of equally many rows. Each carries the hash of its content, is written
whole or not at all, and is mapped into memory: the system reads what is asked for, and forgets it when it needs room.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vkd_gen.data.images import Images
from vkd_gen.files import reason_of
from vkd_gen.provenance import hash_tensors, write_json
from vkd_gen.text import one_line, reason

FORMAT = 1
"""Part of every name; to be raised when the same facts come to mean other rows or other files."""
FILE_BYTES = 2**28
"""A file holds as many rows as fit into this, and at least one."""
MISSING = "it is not there"
Compute = Callable[[Sequence[int]], dict[str, Tensor]]
"""Numbers of rows -> name -> tensor `[rows, ...]` on the CPU, contiguous."""


class KeptRows:
    """Rows on disk, read by their numbers. Each process maps the files for itself, once it asks for a row.

    Args:
        folder: of the files; its name is the hash of what decides them.
        num_rows: in all of them.
        rows_per_file: in each but the last.
    """

    def __init__(self, folder: Path, num_rows: int, rows_per_file: int):
        self.folder, self.num_rows, self.rows_per_file = folder, num_rows, rows_per_file
        self.num_files = -(-num_rows // rows_per_file)
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the files: a process that is started afresh would be sent all that they hold."""
        return {**vars(self), "_mapped": {}}

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Copies of rows, of numbers from 0 on in any order: name -> `[rows, ...]`."""
        parts = []
        for number, group in groupby(rows, lambda row: row // self.rows_per_file):
            if number not in self._mapped:
                self._mapped[number], _ = _map(self.path(number))
            within = [row % self.rows_per_file for row in group]
            parts.append({name: value[within] for name, value in self._mapped[number].items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rows_of(self, number: int) -> range:
        """Numbers of the rows in a file."""
        first = number * self.rows_per_file
        return range(first, min(first + self.rows_per_file, self.num_rows))

    def path(self, number: int) -> Path:
        """Path of a file; they are numbered from 0."""
        return self.folder / f"{number:05}.safetensors"

    def fault(self, number: int) -> str | None:
        """What is wrong with a file, in words; None for one that is as it was written."""
        path = self.path(number)
        if not path.exists():
            return MISSING
        try:
            tensors, digest = _map(path)
        except Exception as error:  # safetensors' own, the system's, and types that torch has not
            return reason(error)
        return None if digest == self._digest(number, tensors) else "it is not as it was written"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, which appears under its name once it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(number)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # runs may share the folder
        try:
            save_file(dict(tensors), temporary, metadata={"sha256": self._digest(number, tensors)})
            os.replace(temporary, path)  # not forced to the disk: what a power cut damages is found by its hash
        finally:
            temporary.unlink(missing_ok=True)

    def _digest(self, number: int, tensors: Mapping[str, Tensor]) -> str:
        return hashlib.sha256(f"{self.folder.name} {number} {hash_tensors(tensors)}".encode()).hexdigest()


def _map(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """A file's tensors, mapped into memory, and the hash that it carries."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get("sha256")


def keep_rows(
    folder: Path,
    facts: Mapping[str, Any],
    num_rows: int,
    compute: Compute,
    *,
    what: str,
    advice: str,
    batch_size: int = 64,
) -> KeptRows:
    """Rows from disk, once what is missing or damaged there has been computed.

    All processes call it with the same arguments and share the work. Every byte that is there is read, to compare its
    hash. What all rows take on the disk is said first.

    Args:
        folder: that holds a folder for each kind of rows; all processes see the same one.
        facts: everything that decides the rows, as JSON. Names, shapes and types of the rows are added.
        num_rows: how many there are, at least 1.
        compute: makes some of them.
        what: the name of such rows in messages, in the plural.
        advice: what to do where the disk has no room.
        batch_size: rows that are computed at once.

    Raises:
        ValueError: in one line and on all processes: if the disk has no room, before anything is computed; if it cannot
            be written to; and for whatever `compute` raises one.
    """
    from accelerate import PartialState

    first = compute([0])
    layout = {name: [str(value.dtype), *value.shape[1:]] for name, value in first.items()}
    facts = {"format": FORMAT, "num_rows": num_rows, "layout": layout, **facts}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    state, row_bytes = PartialState(), sum(value.nbytes for value in first.values())
    kept = KeptRows(folder / key, num_rows, max(1, FILE_BYTES // row_bytes))
    state.print(f"{num_rows:,} {what}: {row_bytes:,} bytes each, {_size(num_rows * row_bytes)} in {kept.folder}")
    missing = _missing_files(kept, state)
    if missing:
        num_bytes = sum(len(kept.rows_of(number)) for number in missing) * row_bytes
        _together(partial(_begin, kept.folder, facts, num_bytes, what, advice) if state.is_main_process else None)
        _together(partial(_fill, kept, missing, partial(_in_batches, compute, batch_size), what, state))
        _together(partial(_check_seen, kept))
    return kept


def _missing_files(kept: KeptRows, state: Any) -> list[int]:
    """Numbers of the files that are missing or damaged; all processes share the reading."""
    from accelerate.utils import gather_object

    own = range(state.process_index, kept.num_files, state.num_processes)
    faults = gather_object([(number, fault) for number in own if (fault := kept.fault(number))])
    for number, fault in faults:
        if fault != MISSING:
            state.print(f"{kept.path(number)} is damaged and made again: {fault}")
    return sorted(number for number, _ in faults)


def _begin(folder: Path, facts: Mapping[str, Any], num_bytes: int, what: str, advice: str) -> None:
    """See that there is room, and write down what the folder is of."""
    free = shutil.disk_usage(next(path for path in folder.parents if path.exists())).free
    if num_bytes > free:
        raise ValueError(
            f"the {what} do not fit into {folder.parent}: they need {_size(num_bytes)}, and {_size(free)} are free; "
            f"{advice}"
        )
    with _told(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "facts.json", facts)


def _fill(kept: KeptRows, missing: list[int], compute: Callable[..., Any], what: str, state: Any) -> None:
    """Compute and write this process' share of the files."""
    from tqdm.auto import tqdm

    own = missing[state.process_index :: state.num_processes]
    total = sum(len(kept.rows_of(number)) for number in own)
    with tqdm(total=total, desc=f"computing {what}", disable=not state.is_main_process) as progress:
        for number in own:
            rows = compute(kept.rows_of(number), progress.update)
            with _told(kept.folder, what):
                kept.write(number, rows)


def _in_batches(
    compute: Compute, batch_size: int, rows: Sequence[int], made: Callable[[int], object]
) -> dict[str, Tensor]:
    """Rows that are computed a batch at a time; tells how many more there are."""
    parts = []
    for first in range(0, len(rows), batch_size):
        chosen = rows[first : first + batch_size]
        parts.append(compute(chosen))
        made(len(chosen))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_seen(kept: KeptRows) -> None:
    for path in map(kept.path, range(kept.num_files)):
        if not path.exists():
            raise ValueError(f"{path} was written and is not there: all processes must see the same folder")


@contextlib.contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """What goes wrong in writing, in one line."""
    try:
        yield
    except Exception as error:
        reason = reason_of(error, folder) or one_line(error)
        raise ValueError(f"the {what} cannot be written to {folder}: {reason}") from error


def _together(action: Callable[[], None] | None) -> None:
    """Run an action, if this process has one, and raise on all processes what is a mistake on one of them."""
    from accelerate.utils import gather_object

    problem = None
    try:
        if action:
            action()
    except ValueError as error:
        problem = str(error)
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        raise ValueError(problems[0])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


# ---- images


def cache_images(images: Images, folder: Path) -> Images:
    """The same images, pixel by pixel, read from disk as `Images.pixels` gives them; called by all processes.

    Args:
        images: of any source.
        folder: to keep them in.

    Raises:
        ValueError: in one line, for an image that cannot be read, or if they cannot be kept.
    """
    assert (np.diff(images.indices) > 0).all(), "rows are found by the images' numbers"
    assert images.identity is not None, "nothing says what these images are"
    facts = {
        "source": images.identity(),
        "numbers": hashlib.sha256(images.indices.astype("<i8").tobytes()).hexdigest(),
        "resolution": images.resolution,
        "channels": images.channels,
        "pillow": PIL.__version__,
    }
    kept = keep_rows(
        folder,
        facts,
        len(images),
        lambda rows: {"pixels": images.pixels(rows)},
        what="decoded images",
        advice="choose another --image_cache, or none",
    )
    return replace(images, read=partial(_read, kept, images.indices), read_size=None)


def _read(kept: KeptRows, numbers: np.ndarray, number: int) -> Image.Image:
    """Image `number` of the whole source, as large as it is asked for: nothing is left to be done to it."""
    row = int(np.searchsorted(numbers, number))
    pixels = kept[[row]]["pixels"][0].numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
