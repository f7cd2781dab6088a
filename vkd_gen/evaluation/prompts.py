"""Prompts to make images of: from files, from the captions of a data set, or as they are given."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkd_gen.data.captions import choose_caption_column, text_columns, usable_captions
from vkd_gen.data.images import Images
from vkd_gen.data.sources import load_images
from vkd_gen.loading import check_file
from vkd_gen.text import printable, reason

TABLES = (".jsonl", ".csv", ".parquet")
"""Ends of the files that are read by column; any other file has a prompt on each line."""


@dataclass(frozen=True)
class Prompts:
    """A prompt for every image: image i has prompt i, and behind the last one they begin anew.

    Attributes:
        texts: at least one.
        source: where they are from.
    """

    texts: Sequence[str]
    source: str

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError(f"{printable(self.source)} holds no prompt")

    def of(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of the images of these numbers."""
        return [self.texts[number % len(self.texts)] for number in numbers]

    def protocol(self) -> dict[str, Any]:
        """What images are made of, for results.json."""
        digest = hashlib.sha256("\0".join(self.texts).encode("utf-8", "surrogatepass")).hexdigest()
        return {"prompts": f"{len(self.texts):,} of {self.source}, in turn", "prompts_sha256": digest}


def of_images(images: Images) -> Prompts | None:
    """The first caption of each image; None for images that were read without captions."""
    if images.captions is None or not len(images):
        return None
    return Prompts([images.captions_of(index)[0] for index in range(len(images))], f"the captions of {images.name}")


def read_prompts(source: str, caption_column: str | None = None, *, to_train_on: bool = False) -> Prompts:
    """The prompts of a file, or a data set's captions.

    Args:
        source: a `.jsonl`, `.csv` or `.parquet` with a column of captions; any other file, of a prompt on each line,
            lines without one passed over; else a data set, as `load_images` takes it: the captions of its test split
            where it has one, else of all its images. Of several captions of an image, or in a row, the first counts.
        caption_column: by default the only one of text, else the one called prompt, caption, text or the like.
        to_train_on: of a data set's splits take the other one, for training.

    Raises:
        ValueError: in one line, for what is not there, cannot be read, or holds no prompts.
    """
    path, kind = Path(source), Path(source).suffix.lower()
    if path.is_dir() or kind == ".arrow" or not (os.path.exists(source) or kind in (*TABLES, ".txt")):
        return _of_data(source, caption_column, to_train_on)
    check_file(path)
    if kind not in TABLES:
        if caption_column is not None:
            raise ValueError(f"--caption_column is for tables; {printable(path)} has a prompt on each line")
        return Prompts([line.strip() for line in _lines(path) if line.strip()], source)
    cells = (_parquet_cells if kind == ".parquet" else _cells)(path, caption_column)
    texts: list[str] = []
    faults: list[str] = []
    for number, cell in enumerate(cells):
        found, fault = usable_captions(cell)
        texts += found[:1]
        faults += [f"row {number} has {fault}"] if fault else []
    if faults and texts:
        raise ValueError(f"{printable(path)}: {len(faults):,} rows hold no prompt, such as: {faults[0]}; take them out")
    return Prompts(texts, source)


def given_prompts(given: Sequence[str]) -> Prompts | None:
    """Prompts of a flag that takes texts, or one file; None for none.

    Raises:
        ValueError: see `read_prompts`; and for a lone name of a file that is not there.
    """
    if len(given) == 1 and (Path(given[0]).suffix.lower() in (*TABLES, ".txt") or os.path.exists(given[0])):
        return read_prompts(given[0])
    if any(not text.strip() for text in given):
        raise ValueError("--validation_prompts holds an empty text")
    return Prompts(given, "--validation_prompts") if given else None


def _of_data(source: str, caption_column: str | None, to_train_on: bool) -> Prompts:
    options = {"with_captions": True, "caption_column": caption_column}
    images, test = load_images(source, resolution=1, channels=3, held_out_fraction=0, **options)
    found = of_images(images if to_train_on or not len(test) else test)
    assert found is not None
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read prompts from {printable(path)}: it is not UTF-8; save it as that") from error
    except OSError as error:
        raise ValueError(f"cannot read prompts from {printable(path)}: {reason(error)}") from error


def _cells(path: Path, caption_column: str | None) -> list[Any]:
    """The column of a `.jsonl` or `.csv` that holds captions."""
    rows: list[dict[str, Any]] = []
    try:
        if path.suffix.lower() == ".csv":
            rows += csv.DictReader(_lines(path), strict=True)
        else:
            rows += (json.loads(line) for line in _lines(path) if line.strip())
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read prompts from {printable(path)}: row {len(rows)}: {reason(error)}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"cannot read prompts from {printable(path)}: a line is no JSON object")
    columns: dict[str, bool] = {}
    for row in rows:
        for name, cell in row.items():
            columns[str(name)] = columns.get(str(name), False) or bool(usable_captions(cell)[0])
    if not rows:
        return []
    column = choose_caption_column(columns, caption_column, printable(path))
    return [row.get(column) for row in rows]


def _parquet_cells(path: Path, caption_column: str | None) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        columns = text_columns(parquet.read_schema(path))
        column = choose_caption_column(columns, caption_column, printable(path))
        return parquet.read_table(path, columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read prompts from {printable(path)}: {reason(error)}") from error
