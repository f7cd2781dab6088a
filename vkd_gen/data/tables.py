"""Tables of images, of files or of the Hugging Face hub, through the package datasets."""

import hashlib
import io
import logging
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vkd_gen.data.captions import Captions, choose_caption_column, collect_captions, text_columns
from vkd_gen.data.decoding import (
    ADVICE,
    check_headers,
    decode_image,
    files_contents,
    files_identity,
    image_size,
    num_hashed,
)
from vkd_gen.data.embedded import EMBEDDED
from vkd_gen.data.images import Images, ImageSpec
from vkd_gen.data.listing import TABLE_SUFFIXES, Listing, list_files
from vkd_gen.data.tars import TAR, caption_field, tars_as_table
from vkd_gen.hub import check_place, hub_problem, hub_revision, split_revision
from vkd_gen.text import one_line, printable


class Whereabouts(NamedTuple):
    """Where the images lie whose paths a table holds. A table is data: it does not decide what else is read.

    Attributes:
        folders: absolute; paths are relative to the first.
        may_leave: paths may lead elsewhere, and a note says so.
    """

    folders: tuple[Path, ...]
    may_leave: bool = False

    def find(self, path: str) -> tuple[Path, bool]:
        """The file that a path is, and whether it lies in the folders."""
        file = Path(os.path.normpath(self.folders[0] / path))
        return file, any(file.is_relative_to(folder) for folder in self.folders)


class Tables(NamedTuple):
    """The splits of a source of tables.

    Attributes:
        source: their name.
        splits: split -> datasets' Dataset, or IterableDataset where it is streamed.
        whereabouts: of images whose paths are in the tables.
        revision: see `Images`.
        notes: see `Images`.
        is_tars: they were made from tars, with the one column of captions that was chosen.
    """

    source: str
    splits: Mapping[str, Any]
    whereabouts: Whereabouts
    revision: str | None = None
    notes: tuple[str, ...] = ()
    is_tars: bool = False


def open_source(
    source: str,
    image_column: str | None = None,
    *,
    streaming: bool = False,
    with_captions: bool = False,
    caption_column: str | None = None,
) -> Tables | Listing:
    """Open tables, of a file, a folder or the hub, or webdataset's tars, or list the files of a folder of images.

    Args:
        source: see `load_images`.
        image_column: see `ImageSpec`.
        streaming: open tables as datasets' IterableDataset; nothing of them is copied to the disk here.
        with_captions: see `ImageSpec`.
        caption_column: see `ImageSpec`; for tars, whose captions are found when they are opened.

    Raises:
        ValueError: in one line, for a source that does not exist or cannot be read.
    """
    if Path(source).exists():
        listing = list_files(source, image_column, with_captions=with_captions)
        if not listing.is_tables:
            return listing
        return _local_tables(source, listing, streaming, with_captions, caption_column)
    check_place(source)
    return _hub_tables(source, streaming)


def _datasets():
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs tracebacks; its errors are told in one line here
    return datasets


def _local_tables(source: str, listing: Listing, streaming: bool, with_captions: bool, column: str | None) -> Tables:
    files = [file for chosen in listing.splits.values() for file in chosen]
    kinds = {TABLE_SUFFIXES[file.suffix.lower()]: file for file in files}
    if len(kinds) > 1:
        both = " and ".join(map(printable, kinds.values()))
        raise ValueError(f"{source} holds tables of two kinds: {both}; name one")
    is_tars, datasets = TAR in {file.suffix.lower() for file in files}, _datasets()
    field = caption_field(files[0], column) if is_tars and with_captions else None
    try:
        if is_tars:
            tables = {
                split: tars_as_table(chosen, field, streaming=streaming) for split, chosen in listing.splits.items()
            }
        else:
            data_files = {split: [str(file) for file in chosen] for split, chosen in listing.splits.items()}
            tables = datasets.load_dataset(next(iter(kinds)), data_files=data_files, streaming=streaming)
    except Exception as error:  # datasets wraps pyarrow's errors in several classes of its own
        more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        where = "" if is_tars and reason.startswith("cannot read") else f"cannot read {printable(files[0])}{more}: "
        raise ValueError(f"{where}{reason}") from error
    parents = {file.parent for file in files}
    folder = parents.pop() if len(parents) == 1 else listing.root
    return Tables(
        source, tables, Whereabouts((folder.absolute(),), may_leave=not streaming), None, listing.notes, is_tars
    )


def _hub_tables(source: str, streaming: bool) -> Tables:
    datasets = _datasets()
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    repository, revision = split_revision(source)
    try:
        problem = "" if HF_HUB_OFFLINE else hub_problem(repository, revision, "dataset")
        if problem and not _is_cached(repository):  # which datasets finds out in half a minute, and offline at once
            raise ValueError(f"it is not in its cache here, and {problem}")
        if streaming:
            builder = datasets.load_dataset_builder(repository, revision=revision)
            tables = builder.as_streaming_dataset()
            addresses = [*(builder.config.data_files or {}).values(), *(builder.info.download_checksums or ())]
        else:
            tables = datasets.load_dataset(repository, revision=revision)
            addresses = [address for table in tables.values() for address in table.info.download_checksums or ()]
    except Exception as error:  # not found, offline, gated and malformed each have a class of their own
        raise ValueError(
            f"{source!r} is neither embedded ({', '.join(EMBEDDED)}) nor a folder or file here, and the Hugging Face "
            f"hub did not give it: {one_line(error)}"
        ) from error
    # datasets notes in the files' addresses which commit they are of.
    commits = set(re.findall(r"hf://datasets/[^@]+@([0-9a-f]{40})/", " ".join(map(str, addresses))))
    if revision is not None:  # where the hub does not answer, datasets takes whichever revision it has
        wanted = hub_revision(source, "dataset")
        if commits != {wanted}:
            raise ValueError(
                f"{source} could not be had at that revision, which is {wanted or 'not known here'}; what was loaded "
                f"is of {', '.join(sorted(commits)) or 'none that is known'}; go online, or name a commit by all its "
                "40 digits"
            )
    splits = {split: table for split, table in tables.items() if split in ("train", "test")}
    if "train" not in splits:
        raise ValueError(f"{source} has no split called train; its splits are {', '.join(map(str, tables))}")
    others = ", ".join(f"the split {split}" for split in tables if split not in splits)
    return Tables(
        source,
        splits,
        Whereabouts((Path(datasets.config.HF_DATASETS_CACHE).absolute(), Path(HF_HUB_CACHE).absolute())),
        commits.pop() if len(commits) == 1 else None,
        (f"left out: {others}",) if others else (),
    )


def _is_cached(repository: str) -> bool:
    """Whether datasets, or the hub's client, may have something of a data set here."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    def plain(name: str) -> str:  # datasets writes MyData as my_data
        return re.sub("[/_]", "", name).lower()

    folders = Path(datasets.config.HF_DATASETS_CACHE).glob("*")
    is_here = any(plain(folder.name) == plain(repository) for folder in folders)
    return is_here or (Path(HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}").exists()


def table_images(table: Any, tables: Tables, spec: ImageSpec) -> Images:
    """The images of a table, each decoded when it is asked for.

    Args:
        table: datasets' Dataset: a split, or the head of a streamed one.
        tables: that it is one of.
        spec: how to read it.
    """
    source = printable(tables.source)
    undecoded, column = undecoded_images(table, spec.image_column, source)
    whereabouts, notes = tables.whereabouts, tables.notes
    places = {number: whereabouts.find(path) for number, path in _paths(undecoded, column).items()}
    outside = [file for file, is_inside in places.values() if not is_inside]
    if outside and whereabouts.may_leave:
        notes += (f"{len(outside):,} images lie outside {whereabouts.folders[0]}, such as {printable(outside[0])}",)
    named_files = {
        f"image {number} of {source}, {printable(file)}": file
        for number, (file, is_inside) in places.items()
        if is_inside or whereabouts.may_leave
    }
    if spec.on_bad_image == "refuse":
        check_headers(named_files)
    labels, num_classes = _table_labels(table, spec.label_column, source) if spec.with_labels else (None, None)
    captions, told = table_captions(table, tables, spec) if spec.with_captions else (None, ())
    files = list(named_files.values())
    return Images(
        partial(read_cell, undecoded, column, source, whereabouts),
        spec.resolution,
        spec.channels,
        tables.source,
        np.arange(len(table)),
        labels=labels,
        num_classes=num_classes or 0,
        captions=captions,
        notes=(*notes, *told),
        revision=tables.revision,
        # The fingerprint is over the table's files' times or commit, the split and the column.
        identity=partial(files_identity, files, whereabouts.folders[0], undecoded._fingerprint),
        contents=None if tables.revision else partial(_cells_contents, undecoded, column, files),
        read_size=partial(read_cell_size, undecoded, column, source, whereabouts),
    )


def _cells_contents(table: Any, column: str, files: list[Path]) -> str:
    """A hash over the images' bytes in a table, see `num_hashed`, and in the files that its paths name."""
    count = num_hashed(table.data.nbytes)
    digest = hashlib.sha256(files_contents(files, None).encode())
    for cells in table.select_columns([column]).iter(batch_size=256):
        for cell in cells[column]:
            content = (cell or {}).get("bytes") or b""
            digest.update(len(content).to_bytes(8, "little") + hashlib.sha256(content[:count]).digest())
    return digest.hexdigest()


def _paths(table: Any, column: str) -> dict[int, str]:
    """The paths of those images of a table that are not in it themselves, by number; found without copying bytes."""
    import pyarrow.compute

    paths: dict[int, str] = {}
    first = 0
    for cells in table.data.column(column).chunks:
        content, path = (pyarrow.compute.struct_field(cells, name) for name in ("bytes", "path"))
        if content.null_count:
            is_path = pyarrow.compute.and_(content.is_null(), path.is_valid())
            numbers = np.flatnonzero(is_path.to_numpy(zero_copy_only=False))
            paths |= dict(zip((first + numbers).tolist(), path.filter(is_path).to_pylist(), strict=True))
        first += len(cells)
    return {number: path for number, path in paths.items() if path and "://" not in path}


def undecoded_images(table: Any, image_column: str | None, source: str) -> tuple[Any, str]:
    """A table, or a stream of its rows, whose images are bytes or paths, and the column that holds them.

    Raises:
        ValueError: for a column that does not exist or holds no images, or several to choose from.
    """
    datasets = _datasets()
    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if image_column is not None and image_column not in table.column_names:
        raise ValueError(f"{source} has no column {image_column!r}; its columns are {', '.join(table.column_names)}")
    if image_column is None and len(columns) != 1:
        raise ValueError(
            f"{source} has {len(columns)} columns of images; name one by --image_column "
            f"(its columns are {', '.join(table.column_names)})"
        )
    column = image_column or columns[0]
    try:  # images, plain image bytes, or paths; decoded here, as files are
        return table.cast_column(column, datasets.Image(decode=False)), column
    except Exception as error:
        raise ValueError(f"column {column!r} of {source} does not hold images: {one_line(error)}") from error


def label_column_of(table: Any, label_column: str | None, source: str) -> tuple[str, int | None]:
    """The column that holds a table's classes, and how many of them it says there are.

    Raises:
        ValueError: for a column that does not exist, or none to choose.
    """
    datasets = _datasets()
    classes = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    column = label_column or (classes[0] if len(classes) == 1 else "label")
    if column not in table.column_names:
        missing = (
            f"no column {column!r}" if label_column else f"{len(classes)} columns of classes and none called label"
        )
        raise ValueError(
            f"{source} has {missing}; name one by --label_column (its columns are {', '.join(table.column_names)})"
        )
    return column, table.features[column].num_classes if column in classes else None


def caption_column_of(table: Any, tables: Tables, spec: ImageSpec) -> str:
    """The column that holds a table's captions.

    Raises:
        ValueError: see `choose_caption_column`.
    """
    source = printable(tables.source)
    _, image_column = undecoded_images(table, spec.image_column, source)
    columns = {**text_columns(table.features.arrow_schema), image_column: False}
    return choose_caption_column(columns, None if tables.is_tars else spec.caption_column, source)


def table_captions(table: Any, tables: Tables, spec: ImageSpec) -> tuple[Captions, tuple[str, ...]]:
    """Captions of a table's images, and notes on them; see `collect_captions`."""
    source = printable(tables.source)
    column = caption_column_of(table, tables, spec)
    chunks = table.with_format("arrow").select_columns([column]).iter(batch_size=10_000)
    cells = (cell for chunk in chunks for cell in chunk[column].to_pylist())
    captions, notes = collect_captions(cells, spec.on_missing_caption, source)
    return captions, (f"captions are the column {column!r} of {source}", *notes)


def _table_labels(table: Any, label_column: str | None, source: str) -> tuple[np.ndarray, int | None]:
    column, num_classes = label_column_of(table, label_column, source)
    kind = table.features[column]
    cells = table.select_columns([column])[:][column]
    if not re.match("u?int", str(getattr(kind, "dtype", ""))) or None in cells:
        held = "empty cells" if None in cells else getattr(kind, "dtype", type(kind).__name__)
        raise ValueError(f"the labels in column {column!r} of {source} must be whole numbers, but it holds {held}")
    if max(cells, default=0) >= 2**31:
        raise ValueError(f"the labels in column {column!r} of {source} go up to {max(cells)}; number them from 0 on")
    return np.array(cells, dtype=np.int64), num_classes


def read_cell(table: Any, column: str, source: str, whereabouts: Whereabouts, index: int) -> Image.Image:
    """The image in one cell; `table[index][column]` holds its bytes or its path.

    Raises:
        ValueError: naming the image, for one that cannot be read.
    """
    return decode_image(*_file_of_cell(table, column, source, whereabouts, index))


def read_cell_size(table: Any, column: str, source: str, whereabouts: Whereabouts, index: int) -> tuple[int, int]:
    """Width and height of the image in one cell; see `read_cell`."""
    return image_size(*_file_of_cell(table, column, source, whereabouts, index))


def _file_of_cell(
    table: Any, column: str, source: str, whereabouts: Whereabouts, index: int
) -> tuple[Path | io.BytesIO, str]:
    """The image's file or bytes, and its name for messages."""
    name = f"image {index} of {source}"
    try:
        cell = table[index][column] or {}
    except Exception as error:  # pyarrow's, for damaged pages
        raise ValueError(f"cannot read {name}: {one_line(error)}; {ADVICE}") from error
    content, path = cell.get("bytes"), cell.get("path")
    if content is not None:
        return io.BytesIO(content), name
    if not path:
        raise ValueError(f"cannot read {name}: the cell is empty; {ADVICE}")
    if "://" in path:  # a table is data: it does not decide what is fetched from where
        raise ValueError(f"cannot read {name}: it is the address {printable(path[:200])}; download it first; {ADVICE}")
    file, is_inside = whereabouts.find(path)
    if not is_inside and not whereabouts.may_leave:
        raise ValueError(f"cannot read {name}: it is {printable(file)}, outside {whereabouts.folders[0]}; {ADVICE}")
    return file, f"{name}, {printable(file)}"
