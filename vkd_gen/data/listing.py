"""Which files of a folder are images or tables of images, and which of them are held out: the same for every source.

Nothing is left out in silence: `Listing.notes` says what is not data, and how ambiguous names were understood.
"""

import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from vkd_gen.data.captions import CAPTION_SUFFIXES
from vkd_gen.data.decoding import image_suffixes
from vkd_gen.data.splits import find_splits
from vkd_gen.data.tars import TAR, is_tar
from vkd_gen.files import LOCK
from vkd_gen.text import printable, reason

TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", TAR: "webdataset"}

SYSTEM_NAMES = {
    *("__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "found.000", "temporary items"),
    *("network trash folder", "@recently-snapshot", "@tmp", "~snapshot"),
}
"""What archives, servers and desktops leave in folders, in lower case, beside what begins with a dot."""
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")
"""How the names of the hub's tables end; the older ones in letters that are not words."""
CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
"""Names of what datasets' map, filter and shuffle leave beside the arrow files that they read."""

LeftOut = dict[str, list[str]]
"""What is not data: reason, such as `hidden file` -> examples, as many as there are."""


class Listing(NamedTuple):
    """The data of a folder.

    Attributes:
        root: the folder.
        is_tables: the files are tables, else images.
        splits: `train`, and `test` where something is held out -> files, in the order of their paths.
        classes: folder of a file -> its class; None where it has none.
        notes: what was left out, and how ambiguous names were understood, a line each.
    """

    root: Path
    is_tables: bool
    splits: Mapping[str, list[Path]]
    classes: Mapping[Path, str | None]
    notes: tuple[str, ...] = ()


def list_files(source: str, image_column: str | None = None, *, with_captions: bool = False) -> Listing:
    """List a folder of images, a folder of tables or of webdataset's tars, or one of these.

    Hidden files and folders, what systems leave behind, folders of runs, and caches of datasets are not data. In a
    folder that `save_to_disk` wrote, the arrow files that its state.json names are read. Where tables lie beside
    images, those that hold images themselves are read if there are any, else the images. Tars are read where there is
    nothing else. Links to folders are followed, unless what they lead to is read anyway.

    Splits are told from the names of folders, and of tables: see `find_splits`. A folder that holds only images to
    test on is taken for the images themselves.

    Args:
        source: path of a folder, or of a parquet, arrow or tar file.
        image_column: the column that holds a table's images, where it is known.
        with_captions: files beside the images may hold their captions, and are not told of as left out.

    Raises:
        ValueError: in one line, if it holds no images, a table lacks the column, or tables do not fit each other.
    """
    root = Path(source)
    if root.is_file() and root.suffix.lower() in TABLE_SUFFIXES:
        if root.suffix.lower() != TAR:
            _check_columns({root: table_columns(root)}, image_column)
        return Listing(root.parent, True, {"train": [root]}, {})
    if not root.is_dir():
        raise ValueError(f"{source} is neither a folder nor a parquet or arrow file")
    left_out: LeftOut = defaultdict(list)
    images, tables, tars = [], [], []
    for file in sorted(_walk(root, left_out)):
        end = file.suffix.lower()
        if end == TAR:
            tars.append(file)
        elif end in TABLE_SUFFIXES:
            tables.append(file)
        elif end in image_suffixes():
            images.append(file)
        elif not (with_captions and end in CAPTION_SUFFIXES):
            left_out["file of no image format"].append(end or f"{file.name}, without an ending")
    tables = _tables_to_read(tables, images, image_column, left_out)
    if tables and images:
        left_out["image beside the tables"] += [file.name for file in images]
    if not tables and not images and any(map(is_tar, tars)):
        tables, tars = tars, []
    if tars:
        left_out["file of no image format"] += [TAR] * len(tars)
    files = tables or images
    if not files:
        told = "; ".join(["", *_told(left_out)])
        raise ValueError(f"{source} holds no images (.png, .jpg, .webp and what else PIL decodes){told}")
    # Of an image only the folders' names count: one that is called test.png may well be there to train on.
    keys = {file: file.relative_to(root).parts[:-1] + ((SHARD.sub("", file.stem),) if tables else ()) for file in files}
    places, notes = find_splits(keys.values())
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        place = places[keys[file]]
        if place.split:
            splits[place.split].append(file)
        else:
            left_out[f"{'table' if tables else 'image'} beside {place.beside}"].append(str(file.relative_to(root)))
    _drop_second_links(splits, left_out)
    if not splits.get("train"):
        notes.append("all of it lies in folders that are called as what is there to test on; it is taken whole")
        splits = {"train": splits["test"]}
    classes = {file.parent: places[key].class_name for file, key in keys.items() if not tables}
    return Listing(root, bool(tables), splits, classes, (*_told(left_out), *notes))


def _told(left_out: LeftOut) -> list[str]:
    """One line on all that was left out, if anything was."""
    parts = []
    for why, examples in left_out.items():
        what = why if len(examples) == 1 else re.sub(r"(file|folder|image|table|link)", r"\1s", why, count=1)
        names = sorted(set(map(printable, examples)))
        parts.append(f"{len(examples):,} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    return [f"left out: {', '.join(parts)}"] if parts else []


def _walk(root: Path, left_out: LeftOut) -> Iterable[Path]:
    """All files but hidden ones and caches."""
    real_root = Path(os.path.realpath(root))
    seen = {real_root}

    def cannot(error: OSError) -> None:
        left_out["folder that may not be read"].append(os.path.relpath(str(error.filename), root))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=cannot):
        if LOCK in files and Path(folder) != root:  # its samples are not data when the run goes on
            left_out["folder of a run"].append(os.path.relpath(folder, root))
            folders.clear()
            continue
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            real, is_link = Path(os.path.realpath(path)), os.path.islink(path)
            is_inside = real.is_relative_to(real_root) and not any(map(_is_hidden, real.relative_to(real_root).parts))
            if _is_hidden(name):
                left_out["hidden folder"].append(name)
            elif real in seen or (is_link and (is_inside or real_root.is_relative_to(real))):
                # else images would be there twice
                left_out[f"{'link to a ' if is_link else ''}folder that is read anyway"].append(name)
            else:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        saved = _saved_files(Path(folder)) if "state.json" in files else None
        for name in files:
            if _is_hidden(name):
                left_out["hidden file"].append(name)
            elif name.endswith(".arrow") and (CACHE.fullmatch(name) or (saved is not None and name not in saved)):
                left_out["cached arrow file"].append(name)
            else:
                yield Path(folder, name)


def _is_hidden(name: str) -> bool:
    # .incomplete is how datasets and the hub call what is half written
    return name.startswith(".") or name.lower() in SYSTEM_NAMES or name.endswith(".incomplete")


def _drop_second_links(splits: dict[str, list[Path]], left_out: LeftOut) -> None:
    """Leave out links to files that are data already, held out before trained on: an image is there once."""
    links = {file for files in splits.values() for file in files if file.is_symlink()}
    if not links:
        return
    taken: dict[str, Path] = {}  # real file -> the one name that is kept
    for split in sorted(splits):  # test, train
        for file in sorted(splits[split], key=lambda file: file in links):
            if taken.setdefault(os.path.realpath(file), file) != file:
                left_out["second link or name of one file"].append(file.name)
    kept = set(taken.values())
    splits.update({split: [file for file in files if file in kept] for split, files in splits.items()})


def _saved_files(folder: Path) -> set[str] | None:
    """Names of the arrow files that datasets' state.json lists; None for another program's."""
    try:
        names = {str(entry["filename"]) for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    for name in sorted(names):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / 'state.json'} lists {printable(name)}, which is not there: copy the folder anew"
            )
    return names


def _tables_to_read(tables: list[Path], images: list[Path], image_column: str | None, left_out: LeftOut) -> list[Path]:
    """Those tables that hold images; none of them, where images lie beside tables without."""
    found = {}
    for file in tables:
        try:
            found[file] = table_columns(file)
        except ValueError:
            if not images:
                raise
            left_out["table that cannot be read"].append(file.name)
    chosen = {
        file: columns
        for file, columns in found.items()
        if (image_column in columns if image_column else any(columns.values()))
    }
    if not chosen and (image_column or not images):
        chosen = found  # what is wrong with them is told here, or where they are read
    for file in found.keys() - chosen.keys():
        left_out["table without images"].append(file.name)
    _check_columns(chosen, image_column)
    return list(chosen)


def table_columns(file: Path) -> dict[str, bool]:
    """A table's columns, and whether each is said to hold images; only its schema is read.

    Raises:
        ValueError: in one line, for a file that is no such table.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        if not file.is_file():  # reading from a pipe would not end
            raise OSError("there is no such file" if not file.exists() else "it is no file")
        if file.suffix.lower() == ".parquet":
            schema = pyarrow.parquet.read_schema(file)
        else:
            with pyarrow.memory_map(str(file)) as opened:
                try:
                    schema = pyarrow.ipc.open_stream(opened).schema
                except pyarrow.ArrowInvalid:
                    schema = pyarrow.ipc.open_file(opened).schema
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {printable(file)}: {reason(error)}") from error
    kinds: Mapping[str, object] = {}
    with contextlib.suppress(ValueError, LookupError, TypeError):  # of another program, or none
        kinds = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    return {name: "'_type': 'Image'" in str(kinds.get(name)) for name in schema.names}


def _check_columns(tables: Mapping[Path, Iterable[str]], image_column: str | None) -> None:
    """Refuse tables that lack the column of images, or have columns that the first of them has not."""
    for file, columns in tables.items():
        first = next(iter(tables))
        if image_column not in (None, *columns):
            there = ", ".join(map(printable, columns))
            raise ValueError(f"{printable(file)} has no column {image_column!r}; its columns are {there}")
        more = ", ".join(printable(name) for name in columns if name not in tables[first])
        if more:
            raise ValueError(
                f"the tables of a folder must have the same columns: {printable(file)} has {more}, which "
                f"{printable(first)} has not (its columns are {', '.join(map(printable, tables[first]))}); take one of "
                "them elsewhere"
            )
