"""Which files of a folder are images or tables of images, and which of them are held out: the same for every source.

Nothing is left out in silence: what is no data, and what a name was taken for where it can be read in two ways, is
told in `Listing.notes`.
"""

import contextlib
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vkd_gen.files import LOCK

TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "test"),
}
"""Words that name a split, datasets' (`datasets.data_files.SPLIT_KEYWORDS`) and two more. What is there to validate on
is never trained on either."""
PLAIN_WORDS = {
    *("set", "data", "split", "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "sample"),
    *("samples", "file", "files", "folder", "part", "shard", "of", "batch", "full", "all", "mini", "tiny", "small"),
    *("large", "raw", "public", "private", "labeled", "labelled", "unlabeled", "png", "jpg", "jpeg"),
}
"""Words that say nothing beside one that names a split: test_images, but not test-tube. Numbers and letters do as
little: train2017, testA, train-00000-of-00002."""

SYSTEM_NAMES = {
    *("__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "found.000", "temporary items"),
    *("network trash folder", "@recently-snapshot", "@tmp", "~snapshot"),
}
"""What archives, servers and desktops leave in folders, in lower case, beside what begins with a dot."""
SAVED_FACTS = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What datasets' save_to_disk writes beside its arrow files."""
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")
"""How the names of the hub's tables end; the older ones in letters that are no words."""
CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
"""Names of what datasets' map, filter and shuffle leave beside the arrow files that they read."""

COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
NO_FORMATS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that PIL knows, but does not decode by itself: PostScript is a program, which it hands to Ghostscript, and
the others need a system's or an application's own decoder. PDF it only writes."""
NO_SUFFIXES = frozenset({".pfm"})
"""Depth maps: floating point numbers, which are no images here."""


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The formats that this installation of PIL decodes by itself, the common ones first."""
    Image.init()
    known = [name for name in Image.ID if name not in NO_FORMATS]
    return (*(name for name in COMMON_FORMATS if name in known), *(n for n in known if n not in COMMON_FORMATS))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Ends of the names of such files, in lower case, with the dot."""
    formats = set(image_formats())
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats) - NO_SUFFIXES


class Listing(NamedTuple):
    """The data of a folder.

    Attributes:
        root: the folder.
        is_tables: the files are tables, else images.
        splits: `train`, and `test` where something is held out -> files, in the order of their paths.
        classes: folder of a file -> its class; None where it has none.
        notes: what was left out, and what was decided where names are ambiguous, a line each.
    """

    root: Path
    is_tables: bool
    splits: Mapping[str, list[Path]]
    classes: Mapping[Path, str | None]
    notes: tuple[str, ...] = ()


class LeftOut:
    """Counts what is no data, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Note what was left out.

        Args:
            reason: what it is, such as `hidden file`.
            example: a name, or the end of one.
            count: how many.
        """
        self._found.setdefault(reason, Counter())[shown(example)] += count

    def __str__(self) -> str:
        parts = []
        for reason, examples in self._found.items():
            total, named = examples.total(), sorted(examples)
            what = reason if total == 1 else re.sub(r"(file|folder|image|table|link)", r"\1s", reason, count=1)
            parts.append(f"{total:,} {what} ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})")
        return f"left out: {', '.join(parts)}" if parts else ""


def shown(path: Path | str) -> str:
    """A path in one line, whatever its name is made of."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def list_files(source: str, image_column: str | None = None) -> Listing:
    """List a folder of images, a folder of tables, or one table.

    Hidden files and folders, what systems leave behind, folders of runs, and caches of datasets are no data. Of a
    folder that `save_to_disk` wrote, the arrow files that its state.json names are read. Where tables lie beside
    images, those that hold images themselves are read if there are any, else the images. Links to folders are
    followed, unless what they lead to is read anyway.

    Splits are told from the names of folders, and of tables: see `find_splits`. A folder of held-out images alone is
    taken for the images themselves.

    Args:
        source: path of a folder, or of a parquet or arrow file.
        image_column: the column that holds a table's images, where it is known.

    Raises:
        ValueError: in one line, if it holds no images, a table lacks the column, or tables do not fit each other.
    """
    root = Path(source)
    if root.is_file() and root.suffix.lower() in TABLE_SUFFIXES:
        check_columns({root: table_columns(root)}, image_column)
        return Listing(root.parent, True, {"train": [root]}, {})
    if not root.is_dir():
        raise ValueError(f"{source} is neither a folder nor a parquet or arrow file")
    left_out = LeftOut()
    images, tables = [], []
    for file in sorted(_walk(root, left_out)):
        end = file.suffix.lower()
        if end in TABLE_SUFFIXES:
            tables.append(file)
        elif end in image_suffixes():
            images.append(file)
        elif file.name not in SAVED_FACTS:
            left_out.add("file of no image format", end or f"{file.name}, without an ending")
    tables = _tables_to_read(tables, images, image_column, left_out)
    files = tables or images
    if not files:
        told = f"; {left_out}" if str(left_out) else ""
        raise ValueError(f"{source} holds no images (.png, .jpg, .webp and what else PIL decodes){told}")
    for file in images if tables else ():
        left_out.add("image beside the tables", file.name)
    # Of an image the folders' names alone: one that is called test.png may well be there to train on.
    keys = {file: file.relative_to(root).parts[:-1] + ((SHARD.sub("", file.stem),) if tables else ()) for file in files}
    places, notes = find_splits(keys.values())
    splits: dict[str, list[Path]] = {}
    for file in files:
        place = places[keys[file]]
        if place.split:
            splits.setdefault(place.split, []).append(file)
        else:
            name = str(file.relative_to(root))
            left_out.add(f"{'table' if tables else 'image'} beside {place.beside}", name)
    _drop_second_links(splits, left_out)
    if not splits.get("train"):
        notes.append("all of it lies in folders that are called as what is there to test on; it is taken whole")
        splits = {"train": splits["test"]}
    classes = {file.parent: places[key].class_name for file, key in keys.items() if not tables}
    return Listing(root, bool(tables), splits, classes, tuple(line for line in (str(left_out), *notes) if line))


def _walk(root: Path, left_out: LeftOut) -> Iterable[Path]:
    """All files but hidden ones and caches."""
    real_root = Path(os.path.realpath(root))
    seen = {real_root}

    def cannot(error: OSError) -> None:
        left_out.add("folder that may not be read", os.path.relpath(str(error.filename), root))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=cannot):
        if LOCK in files and Path(folder) != root:  # its samples are no data when the run goes on
            left_out.add("folder of a run", os.path.relpath(folder, root))
            folders.clear()
            continue
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            real, is_link = Path(os.path.realpath(path)), os.path.islink(path)
            is_inside = real.is_relative_to(real_root) and not any(map(_is_hidden, real.relative_to(real_root).parts))
            if _is_hidden(name):
                left_out.add("hidden folder", name)
            elif real in seen or (is_link and (is_inside or real_root.is_relative_to(real))):
                # else images would be there twice
                left_out.add(f"{'link to a ' if is_link else ''}folder that is read anyway", name)
            else:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        saved = _saved_files(Path(folder)) if "state.json" in files else None
        for name in files:
            if _is_hidden(name):
                left_out.add("hidden file", name)
            elif name.endswith(".arrow") and (CACHE.fullmatch(name) or (saved is not None and name not in saved)):
                left_out.add("cached arrow file", name)
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
    taken: set[str] = set()
    for split in sorted(splits):  # test, train
        kept = set()
        for file in sorted(splits[split], key=lambda file: file in links):
            real = os.path.realpath(file)
            if real in taken:
                left_out.add("second link or name of one file", file.name)
            else:
                kept.add(file)
            taken.add(real)
        splits[split] = [file for file in splits[split] if file in kept]


def _saved_files(folder: Path) -> set[str] | None:
    """Names of the arrow files that datasets' state.json lists; None for another program's."""
    try:
        names = {entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    for name in sorted(map(str, names)):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / 'state.json'} lists {shown(name)}, which is not there: copy the folder anew")
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
            left_out.add("table that cannot be read", file.name)
    chosen = [
        file for file, columns in found.items() if (image_column in columns if image_column else any(columns.values()))
    ]
    if not chosen and (image_column or not images):
        chosen = list(found)  # what is wrong with them is told here, or where they are read
    for file in found.keys() - set(chosen):
        left_out.add("table without images", file.name)
    check_columns({file: list(found[file]) for file in chosen}, image_column)
    return chosen


def table_columns(file: Path) -> dict[str, bool]:
    """A table's columns, and whether each is said to hold images; its schema alone is read.

    Raises:
        ValueError: in one line, for a file that is no such table, or without the package pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading tables needs the package datasets: pip install datasets") from error
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
        raise ValueError(f"cannot read {shown(file)}: {' '.join(str(error).split())[:200]}") from error
    kinds: Mapping[str, object] = {}
    with contextlib.suppress(ValueError, LookupError, TypeError):  # of another program, or none
        kinds = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    return {name: "'_type': 'Image'" in str(kinds.get(name)) for name in schema.names}


def check_columns(columns: Mapping[Path, Iterable[str]], image_column: str | None) -> None:
    """Refuse tables that lack the column of images, or have columns that the first of them has not.

    Args:
        columns: table -> its columns.
        image_column: the one that must be there; None for any.

    Raises:
        ValueError: in one line, naming the table.
    """
    for file, names in columns.items():
        first = next(iter(columns))
        there = ", ".join(map(shown, names))
        if image_column is not None and image_column not in names:
            raise ValueError(f"{shown(file)} has no column {image_column!r}; its columns are {there}")
        more = [name for name in names if name not in columns[first]]
        if more:
            raise ValueError(
                f"the tables of a folder must have the same columns: {shown(file)} has {', '.join(map(shown, more))}, "
                f"which {shown(first)} has not (its columns are {', '.join(map(shown, columns[first]))}); take one of "
                "them elsewhere"
            )


# ---- splits


Key = tuple[str, ...]
"""Names of the folders that lead to a file; of a table its own name too, without its end."""


class Place(NamedTuple):
    """What the files of one folder are for.

    Attributes:
        split: `train` or `test`; empty for what is left out.
        first: number of the folder that names the split, counted from 0; None where none does.
        last: of the last folder that repeats it.
        beside: the splits beside what is left out.
        class_name: the class; None where there is none.
    """

    split: str
    first: int | None = None
    last: int = -1
    beside: str = ""
    class_name: str | None = None


def find_splits(keys: Iterable[Key]) -> tuple[dict[Key, Place], list[str]]:
    """Tell training images, held-out ones and classes from the names of folders.

    A name can name a split if it holds a word for one (`SPLIT_WORDS`) and

    - nothing else of meaning: Testing, val2017, test_images; or
    - the same as one of the other kind beside it: seg_train and seg_test; or
    - lies beside such names alone.

    Where there are splits of both kinds, what lies beside them is neither, and inside them names are classes. Names for
    training alone are splits if nothing lies beside them: train beside bus and car is a class. Names for testing alone
    are held out from what lies beside them.

    Args:
        keys: of all files.

    Returns:
        Key -> its place; and what was decided where names can be read in two ways, a line each.
    """
    doubts: dict[str, list[str]] = {}
    places = _descend(list(dict.fromkeys(keys)), 0, doubts)
    prefixes = {key[: place.first] for key, place in places.items() if place.split}
    is_each = len(prefixes) > 1  # each class is split for itself, if at all: cats/train, cats/test, dogs/train, birds
    for key, place in places.items():
        before, after = key[: place.first or 0], key[place.last + 1 :]
        if before and is_each:
            after = before
        places[key] = place._replace(class_name=next(iter(after), None))
    notes = []
    for reason, names in doubts.items():
        more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
        notes.append(f"{shown(names[0])}{more} {reason}")
    return places, notes


def _descend(keys: list[Key], depth: int, doubts: dict[str, list[str]]) -> dict[Key, Place]:
    """The places of keys that share their first parts; names in doubt are added, by what was decided."""
    places = {key: Place("train") for key in keys if len(key) == depth}
    below: dict[str, list[Key]] = {}
    for key in keys:
        if len(key) > depth:
            below.setdefault(key[depth], []).append(key)
    splits = _named_splits(below)
    held_out = sorted(name for name, split in splits.items() if split == "test")
    inside_held_out = {key[depth + 1] for name in held_out for key in below[name] if len(key) > depth + 1}
    if inside_held_out & (below.keys() - splits.keys()):  # bus, car, train and test, which holds the same classes
        splits = dict.fromkeys(held_out, "test")
    is_alone = len(splits) == len(below) and not places
    if not held_out and not is_alone:
        splits = {}
    is_both = len(set(splits.values())) == 2
    beside = " and ".join(sorted(splits))
    if is_both:
        places = dict.fromkeys(places, Place("", beside=beside))
    for name, inside in below.items():
        path = "/".join(inside[0][: depth + 1])
        split = splits.get(name)
        if split is None and is_both:
            places |= dict.fromkeys(inside, Place("", beside=beside))
        elif split is None:
            if _split_of(name)[0]:
                doubts.setdefault("is not taken for a split, beside other names", []).append(path)
            places |= _descend(inside, depth + 1, doubts)
        else:
            deeper_doubts: dict[str, list[str]] = {}
            deeper = _descend(inside, depth + 1, deeper_doubts) if is_alone and not is_both else {}
            if any(place.first is not None for place in deeper.values()):  # a folder that holds all splits
                places |= deeper
                doubts |= deeper_doubts
                continue
            if not is_both and not is_alone:
                reason = "is held out, as its name says; give it another name if it is there to train on"
                doubts.setdefault(reason, []).append(path)
            last = depth  # archives may hold one folder of their own name: seg_train/seg_train
            while {key[last + 1] if len(key) > last + 1 else "" for key in inside} == {name}:
                last += 1
            places |= dict.fromkeys(inside, Place(split, depth, last))
    return places


def _named_splits(names: Iterable[str]) -> dict[str, str]:
    """Those of the names side by side that can name a split, and which: see `find_splits`."""
    found = {name: _split_of(name) for name in names}
    hints = {name: (split, rest) for name, (split, rest) in found.items() if split}
    named = {
        name
        for name, (split, rest) in hints.items()
        if not rest or any(other != split and rest == its_rest for other, its_rest in hints.values())
    }
    if named and len(hints) == len(found):
        named = set(hints)
    return {name: hints[name][0] for name in hints if name in named}


def _split_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The split that a name holds a word for, empty for none or several, and its other words that mean something.

    >>> _split_of("seg_Testing2"), _split_of("testA"), _split_of("held-out"), _split_of("valley")
    (('test', ('seg',)), ('test', ()), ('test', ()), ('', ('valley',)))
    """
    name = re.sub(r"(held|hold)[-_. ]?out", r" \1out ", name, flags=re.IGNORECASE)
    # Words begin at capitals too, as in TestImages and trainA.
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+", name)]
    words = [word.removesuffix("set") or word for word in words]
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    rest = tuple(word for word in words if len(word) > 1 and word not in PLAIN_WORDS and word not in SPLIT_WORDS)
    return (splits.pop() if len(splits) == 1 else "", rest)
