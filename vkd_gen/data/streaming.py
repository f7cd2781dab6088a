"""Images of a set that is read from front to back, for sets larger than the disk.

The set's files are its shards. In each epoch every process, and every worker that reads for it, is a reader of its own:
it goes through its share of the shards, shuffles within a bounded buffer, and decodes. The order is a function of seed,
epoch and reader alone, and a reader's `Position` a few whole numbers: from there on it reads what it would have read.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vkd_gen.choices import OnBadImage, OnMissingCaption
from vkd_gen.data.captions import ADVICE, usable_captions
from vkd_gen.data.embedded import EMBEDDED
from vkd_gen.data.images import Images, ImageSpec
from vkd_gen.data.sources import split_images
from vkd_gen.data.tables import (
    Tables,
    Whereabouts,
    caption_column_of,
    label_column_of,
    open_source,
    read_cell,
    table_images,
    undecoded_images,
)
from vkd_gen.text import reason

logger = logging.getLogger(__name__)

HEAD_SHARDS = 16
"""The head is the fronts of so many shards, if they are long enough: sets are often sorted by class."""
ROWS_AT_A_TIME = 32
"""Rows that are read from a shard at once."""


class Position(NamedTuple):
    """How far a reader has come.

    Attributes:
        epoch: which pass through the set it is in.
        place: of the shard that its buffer begins in, in the epoch's order.
        row: of that shard that its buffer begins with.
        given: images of the buffer that it has given.
    """

    epoch: int = 0
    place: int = 0
    row: int = 0
    given: int = 0


class Row(NamedTuple):
    """One image, undecoded: the place of its shard in the epoch's order, the shard, its row there, and its cells."""

    place: int
    shard: int
    number: int
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class ImageStream:
    """The training images of a set that is read from front to back.

    Attributes:
        table: datasets' IterableDataset of the images, undecoded, and of their classes.
        image_column: column of the images.
        label_column: column of the classes; None without labels.
        images: none, but of the size, channels, name and classes of those in the stream.
        held_out: shard -> rows that are held out.
        buffer_size: images that a reader shuffles among.
        on_bad_image: `skip` leaves out what cannot be read.
        whereabouts: of images whose paths are in the table.
        caption_column: column of the captions; None without.
        on_missing_caption: see `ImageSpec`.
    """

    table: Any
    image_column: str
    label_column: str | None
    images: Images
    held_out: Mapping[int, frozenset[int]]
    buffer_size: int
    on_bad_image: OnBadImage
    whereabouts: Whereabouts
    caption_column: str | None = None
    on_missing_caption: OnMissingCaption = "refuse"

    @property
    def num_shards(self) -> int:
        """How many parts the set can be read in."""
        return self.table.n_shards

    def read(
        self, position: Position, *, seed: int, reader: int, num_readers: int
    ) -> Iterator[tuple[Position, Tensor, int]]:
        """What `read_images` gives, as tensors: the position, the image, `[C, H, W]` float32, and its class."""
        for at, image, label in self.read_images(position, seed=seed, reader=reader, num_readers=num_readers):
            yield at, image[0], label

    def read_images(
        self, position: Position, *, seed: int, reader: int, num_readers: int
    ) -> Iterator[tuple[Position, Images, int]]:
        """One reader's images, epoch after epoch, without end.

        A buffer of images is read, and given in an order of its own; while it is, the next one fills, so that at no
        time more than `buffer_size` images are held. Going on from a position reads its buffer again.

        Yields:
            The position after the image; the image alone, decoded, with its captions; its class, 0 without labels.

        Raises:
            ValueError: for an image that cannot be read or has no caption, unless those are left out, and for a reader
                without images.
        """
        epoch, place, row, given = position
        is_empty = position == Position(epoch)
        while True:
            rows = self._rows(epoch, place, row, seed=seed, reader=reader, num_readers=num_readers)
            buffer = list(islice(rows, self.buffer_size))
            while buffer:
                start = buffer[0].place, buffer[0].number
                order = np.random.default_rng([seed, epoch, 1 + reader, *start]).permutation(len(buffer))
                waiting = [buffer[number] for number in reversed(order)]
                del waiting[len(waiting) - given :]
                buffer = list(islice(rows, given))
                while waiting:
                    image = self._decode(waiting.pop(), epoch)
                    buffer.extend(islice(rows, 1))
                    given += 1
                    if image is not None:
                        is_empty = False
                        yield Position(epoch, *start, given), *image
                given = 0
            if is_empty:
                raise ValueError(
                    f"{self.images.name} has no image that can be read for reader {reader + 1} of {num_readers}: lower "
                    "--num_processes or --dataloader_num_workers, or leave out --streaming"
                )
            epoch, place, row, given, is_empty = epoch + 1, 0, 0, 0, True

    def _rows(self, epoch: int, place: int, row: int, *, seed: int, reader: int, num_readers: int) -> Iterator[Row]:
        """A reader's rows of one epoch, from one row of one shard on.

        As many shards as can be are dealt out whole; those left over are read by all, who take turns at their rows.
        """
        order = np.random.default_rng([seed, epoch]).permutation(self.num_shards).tolist()
        num_dealt = self.num_shards // num_readers * num_readers
        for number, shard in enumerate(order):
            is_dealt = number < num_dealt
            if number < place or (is_dealt and number % num_readers != reader):
                continue
            left_out = self.held_out.get(shard, frozenset())
            for row_number, cells in enumerate(_read_shard(self.table, shard, self.images.name)):
                is_own = is_dealt or row_number % num_readers == reader
                if is_own and row_number not in left_out and (number, row_number) >= (place, row):
                    yield Row(number, shard, row_number, cells)

    def _decode(self, row: Row, epoch: int) -> tuple[Images, int] | None:
        """An image and its class; None for one that is to be left out."""
        name = f"shard {row.shard} of {self.images.name}"
        captions = self._captions(row, name)
        if captions == ():
            return None
        try:
            decoded = read_cell({row.number: row.cells}, self.image_column, name, self.whereabouts, row.number)
        except ValueError as error:
            if self.on_bad_image == "refuse":
                raise
            if epoch == 0:
                logger.warning("left out: %s", error)
            return None
        number = row.shard * 2**32 + row.number  # of no other image of the set
        captioned = None if captions is None else {number: captions}
        image = replace(self.images, read=lambda _: decoded, indices=np.array([number]), captions=captioned)
        if self.label_column is None:
            return image, 0
        label = row.cells[self.label_column]
        if label is None or not 0 <= label < self.images.num_classes:
            highest = self.images.num_classes - 1
            raise ValueError(f"image {row.number} of {name} has the label {label}; labels are 0 to {highest}")
        return image, label

    def _captions(self, row: Row, name: str) -> tuple[str, ...] | None:
        """The captions of an image; none where it is to be left out; None where none are asked for."""
        if self.caption_column is None:
            return None
        captions, fault = usable_captions(row.cells[self.caption_column])
        if fault and self.on_missing_caption == "refuse":
            raise ValueError(f"image {row.number} of {name} has {fault}: {ADVICE}")
        return ("",) if fault and self.on_missing_caption == "empty" else captions


def _read_shard(table: Any, shard: int, source: str) -> Iterator[Mapping[str, Any]]:
    """The rows of one shard, in order; also in a process that reads for another one, where datasets would share out."""
    from datasets.distributed import split_dataset_by_node

    part = split_dataset_by_node(table, shard, table.n_shards)
    try:
        for columns in part.iter(batch_size=ROWS_AT_A_TIME):
            for cells in zip(*columns.values(), strict=True):
                yield dict(zip(columns, cells, strict=True))
    except Exception as error:  # the network's, the file system's and pyarrow's
        raise ValueError(f"cannot read shard {shard} of {source}: {reason(error)}") from error


def stream_images(
    source: str, spec: ImageSpec, *, head_size: int, buffer_size: int
) -> tuple[ImageStream, Images, Images]:
    """Open a set as a stream, and read its head into memory, undecoded, for all that needs images at hand.

    The head is split as `load_images` splits a whole set: a part is held out, unless there is a test split, whose head
    is that part then. What is held out is never in the stream; the rest of the head is.

    Args:
        source: tables or a data set of the hub, see `load_images`. Nothing of it is copied to the disk.
        spec: how images are read. Skipped ones are named in `Images.skipped` if they are of the head, others in a
            warning each, in the first epoch.
        head_size: images of the head; fewer where there are fewer, or the shards are short.
        buffer_size: images that a reader shuffles among, undecoded. Each epoch has its own order of shards, but a shard
            is read from front to back.

    Returns:
        The stream, and of its head the training images and the held-out ones.

    Raises:
        ValueError: in one line, for a source that cannot be streamed, and for what `load_images` refuses.
    """
    tables = (
        None
        if source in EMBEDDED
        else open_source(
            source,
            spec.image_column,
            streaming=True,
            with_captions=spec.with_captions,
            caption_column=spec.caption_column,
        )
    )
    if not isinstance(tables, Tables):
        raise ValueError(
            f"{source} is no set of parquet or arrow files, nor on the hub, with images to train on: it cannot be "
            "streamed; leave out --streaming"
        )
    chosen = {split: _chosen_columns(table, tables, spec) for split, table in tables.splits.items()}
    heads = {split: _read_head(columns.table, head_size, source) for split, columns in chosen.items()}
    splits = {split: _as_table(rows, chosen[split].table) for split, rows in heads.items() if rows}
    train, held_out = split_images({split: table_images(table, tables, spec) for split, table in splits.items()}, spec)
    left_out: dict[int, set[int]] = defaultdict(set)
    for number in () if heads.get("test") else held_out.indices.tolist():
        row = heads["train"][number]
        left_out[row.shard].add(row.number)
    columns = chosen["train"]
    stream = ImageStream(
        columns.table,
        columns.image,
        columns.label,
        Images(_no_image, spec.resolution, spec.channels, source, train.indices[:0], num_classes=train.num_classes),
        {shard: frozenset(rows) for shard, rows in left_out.items()},
        buffer_size,
        spec.on_bad_image,
        tables.whereabouts,
        columns.caption,
        spec.on_missing_caption,
    )
    return stream, train, held_out


class Columns(NamedTuple):
    """A table of what is asked for, its images undecoded, and the columns of images, classes and captions."""

    table: Any
    image: str
    label: str | None
    caption: str | None


def _chosen_columns(table: Any, tables: Tables, spec: ImageSpec) -> Columns:
    source = tables.source
    if table.features is None:
        raise ValueError(f"{source} does not say which columns it has: it cannot be streamed; leave out --streaming")
    table, image_column = undecoded_images(table, spec.image_column, source)
    label_column = caption_column = None
    if spec.with_labels:
        label_column, num_classes = label_column_of(table, spec.label_column, source)
        if not (num_classes or spec.num_classes):
            raise ValueError(
                f"{source} does not say how many classes it has, which a stream cannot count; leave out --streaming"
            )
    if spec.with_captions:
        caption_column = caption_column_of(table, tables, spec)
    chosen = [name for name in (image_column, label_column, caption_column) if name is not None]
    return Columns(table.select_columns(chosen), image_column, label_column, caption_column)


def _read_head(table: Any, size: int, source: str) -> list[Row]:
    """Rows from the fronts of several shards, the same in every run."""
    each = -(-size // min(table.n_shards, HEAD_SHARDS))
    rows: list[Row] = []
    for shard in np.random.default_rng(0).permutation(table.n_shards).tolist():
        front = islice(_read_shard(table, shard, source), min(each, size - len(rows)))
        rows += [Row(0, shard, number, cells) for number, cells in enumerate(front)]
    return rows


def _as_table(rows: list[Row], table: Any) -> Any:
    """Rows of a streamed table as one in memory."""
    from datasets import Dataset

    return Dataset.from_list([row.cells for row in rows], features=table.features)


def _no_image(number: int) -> Any:
    raise AssertionError(f"a stream has no image {number} at hand")
