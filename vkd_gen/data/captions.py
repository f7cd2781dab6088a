"""Captions of images: the column or the files that hold them, and what becomes of images without."""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vkd_gen.choices import OnMissingCaption
from vkd_gen.text import printable, reason

CAPTION_NAMES = frozenset({"caption", "captions", "text", "texts", "prompt", "prompts", "sentence", "sentences"})
"""Columns that are taken for captions by their names, in lower case."""
METADATA = ("metadata.jsonl", "metadata.csv")
"""What datasets' imagefolder reads beside images: `file_name`, relative to the file, and columns."""
CAPTION_SUFFIXES = frozenset({".txt", ".jsonl", ".csv"})
"""Ends of the files beside images that may be read for captions."""
LONGEST_FILE = 2**20
"""Bytes of a `.txt` file that can be a caption."""
ADVICE = (
    "write captions, or choose --on_missing_caption skip to leave such images out, or empty to take the empty prompt "
    "for them"
)
MISSING, EMPTY = "no caption", "an empty caption"

Captions = list[tuple[str, ...]]
"""Of each image; of one without captions none."""


def usable_captions(cell: Any) -> tuple[tuple[str, ...], str]:
    """The captions in a cell, and why there are none.

    Args:
        cell: a string, a list of strings, or whatever else a user's data hold. White space alone is empty; in a list,
            what is null or empty is passed over.

    Returns:
        The captions as they stand; and, if there are none, what the image has instead.
    """
    values = [value for value in (cell if isinstance(cell, list) else [cell]) if value is not None]
    for value in values:
        if not isinstance(value, str):
            return (), f"a caption of type {type(value).__name__}"
        if not value.isascii() and value.encode(errors="ignore").decode() != value:  # a lone surrogate, from JSON
            return (), "a caption that is no valid Unicode"
    texts = tuple(value for value in values if value.strip())
    return texts, "" if texts else EMPTY if values else MISSING


def collect_captions(
    cells: Iterable[Any], on_missing: OnMissingCaption, source: str, name_of: Callable[[int], str] = "image {}".format
) -> tuple[Captions, tuple[str, ...]]:
    """Captions of all images of a source.

    Args:
        cells: of each image, see `usable_captions`.
        on_missing: see `ImageSpec`.
        source: its name, for messages.
        name_of: number of an image -> its name, for messages.

    Returns:
        The captions; and notes, a line each, on what became of images without.

    Raises:
        ValueError: in one line, if an image has no usable caption and that is refused, or none has one.
    """
    captions: Captions = []
    faults: dict[str, list[int]] = defaultdict(list)
    for number, cell in enumerate(cells):
        texts, fault = usable_captions(cell)
        if fault:
            faults[fault].append(number)
        captions.append(texts or (("",) if on_missing == "empty" else ()))
    if not faults:
        return captions, ()
    told = ", ".join(f"{len(found):,} with {fault}, such as {name_of(found[0])}" for fault, found in faults.items())
    count = sum(map(len, faults.values()))
    line = f"{count:,} of {len(captions):,} images of {source} have no usable caption ({told})"
    if count == len(captions):
        raise ValueError(f"{line}: captions are needed to train from prompts")
    if on_missing == "refuse":
        raise ValueError(f"{line}: {ADVICE}")
    return captions, (f"{line}: {'left out' if on_missing == 'skip' else 'they get the empty prompt'}",)


def choose_caption_column(columns: Mapping[str, bool], wanted: str | None, source: str) -> str:
    """The column that holds captions.

    Args:
        columns: name -> whether it holds text.
        wanted: its name; by default the only column of text, else the one that is called caption, text, prompt, ...
        source: for messages.

    Raises:
        ValueError: in one line, if it does not exist, holds no text, or there are several to choose from.
    """
    there = f"(its columns are {', '.join(map(printable, columns))})"
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{source} has no column {wanted!r} for captions {there}")
        if not columns[wanted]:
            raise ValueError(f"column {wanted!r} of {source} holds neither strings nor lists of strings {there}")
        return wanted
    of_text = [name for name, is_text in columns.items() if is_text]
    chosen = of_text if len(of_text) == 1 else [name for name in of_text if name.lower() in CAPTION_NAMES]
    if len(chosen) != 1:
        raise ValueError(
            f"{source} has {len(of_text)} columns of text and {len(chosen)} of them called as captions are; name one "
            f"by --caption_column {there}"
        )
    return chosen[0]


def text_columns(schema: Any) -> dict[str, bool]:
    """Columns of pyarrow's schema, and whether each holds strings or lists of strings."""
    text = ("string", "large_string", "string_view")  # as pyarrow writes them
    return {
        field.name: str(field.type) in text or str(getattr(field.type, "value_type", None)) in text for field in schema
    }


# ---- beside the images of a folder


class Metadata(NamedTuple):
    """What a `metadata.jsonl` or `metadata.csv` says.

    Attributes:
        cells: path of an image, below the file's folder -> its captions as they stand; of several rows all.
        column: that holds them.
    """

    cells: Mapping[str, list[Any]]
    column: str


def folder_captions(
    files: Sequence[Path], root: Path, caption_column: str | None, on_missing: OnMissingCaption
) -> tuple[Captions, tuple[str, ...]]:
    """Captions of a folder's images.

    A `metadata.jsonl` or `metadata.csv` holds those of the images in its folder and below, as in datasets' imagefolder;
    several rows of one image are several captions. Where there is none, a `.txt` file of an image's name holds its one
    caption.

    Args:
        files: the images.
        root: the folder.
        caption_column: see `ImageSpec`.
        on_missing: see `ImageSpec`.

    Returns:
        See `collect_captions`.

    Raises:
        ValueError: in one line, for files that cannot be read, and what `collect_captions` refuses.
    """

    @cache
    def nearest(folder: Path) -> Path | None:
        found = [folder / name for name in METADATA if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{printable(folder)} holds both {' and '.join(METADATA)}: take one of them elsewhere")
        return found[0] if found else None if folder in (root, folder.parent) else nearest(folder.parent)

    metadata = {path: read_metadata(path, caption_column) for path in {nearest(file.parent) for file in files} if path}
    if caption_column is not None and not metadata:
        raise ValueError(
            f"--caption_column {caption_column}: {printable(root)} holds neither {' nor '.join(METADATA)}; leave it "
            "out for captions in .txt files beside the images"
        )

    def cells() -> Iterator[Any]:
        for file in files:
            path = nearest(file.parent)
            if path is None:
                yield _read_sidecar(file.with_suffix(".txt"))
            else:
                yield metadata[path].cells.get(os.path.relpath(file, path.parent))

    captions, notes = collect_captions(cells(), on_missing, printable(root), lambda number: printable(files[number]))
    return captions, (*notes, *(note for path in sorted(metadata) for note in _notes_on(path, metadata[path])))


def _notes_on(path: Path, metadata: Metadata) -> Iterator[str]:
    yield f"captions are the column {metadata.column!r} of {printable(path)}"
    unknown = [name for name in metadata.cells if not os.path.lexists(path.parent / name)]
    if unknown:
        yield f"{printable(path)} has captions of {len(unknown):,} files that are not there, such as {unknown[0]!r}"


def _read_sidecar(path: Path) -> str | None:
    """The content of a `.txt` file; None where there is none."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LONGEST_FILE:
            raise ValueError(f"it is longer than {LONGEST_FILE:,} bytes")
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the caption {printable(path)}: {_file_reason(error)}") from error


def read_metadata(path: Path, caption_column: str | None) -> Metadata:
    """Read a `metadata.jsonl` or `metadata.csv`.

    Raises:
        ValueError: in one line, if it cannot be read, a row lacks `file_name`, or no column holds captions.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in _json_rows(file) if path.suffix == ".jsonl" else _csv_rows(file):
                if not isinstance(row.get("file_name"), str):
                    raise ValueError(f"line {line} names no file in file_name")
                rows.append(row)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"cannot read {printable(path)}: {_file_reason(error)}") from error
    columns: dict[str, bool] = {}
    for row in rows:
        for name, cell in row.items():
            if name != "file_name":
                columns[name] = columns.get(name, False) or bool(usable_captions(cell)[0])
    column = choose_caption_column(columns, caption_column, printable(path))
    cells: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        cell = row.get(column)
        cells[os.path.normpath(row["file_name"])] += cell if isinstance(cell, list) else [cell]
    return Metadata(cells, column)


def _json_rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield number, row


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(lines, strict=True)
    for row in rows:
        if None in row:
            raise ValueError(f"line {rows.line_num} has more cells than there are columns: put captions in quotes")
        yield rows.line_num, row


def _file_reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8; save it as that"
    return error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
