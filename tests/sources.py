"""Small images, and folders and tables of them, whose grey levels tell one from another."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vkd_gen.data.images import Images
from vkd_gen.data.sources import load_images


def load(source, *, resolution=4, channels=3, **fields):
    return load_images(str(source), resolution=resolution, channels=channels, **fields)


def grey(level, size=(4, 4)):
    return Image.new("L", size, level)


def numbered_images(count, *, resolution=4):
    """Image i is of grey level i."""
    return Images(grey, resolution, 1, "numbered", np.arange(count))


def labelled_images(count, num_classes):
    """Image i is of grey level i and of class i modulo `num_classes`."""
    return replace(numbered_images(count), labels=np.arange(count) % num_classes, num_classes=num_classes)


def save_greys(folder, levels, *, size=(4, 4), end="png"):
    """An image of each grey level, called as that."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        grey(level, size).save(folder / f"{level:03}.{end}")
    return folder


def encoded(image, kind="PNG", **save):
    """Bytes of an image file; of an image, or of one of a grey level."""
    buffer = io.BytesIO()
    (grey(image).convert("RGB") if isinstance(image, int) else image).save(buffer, kind, **save)
    return buffer.getvalue()


def grey_levels(images):
    """The 8-bit value of each image's first pixel."""
    return [round((image[0, 0, 0].item() + 1) * 127.5) for image in images]


def levels_of(parts):
    """Of training and held-out images together, in order."""
    return sorted(itertools.chain(*map(grey_levels, parts)))


def labels_of(images):
    return [images.label(index) for index in range(len(images))]


def image_table(cells, *, labels=None, column="image"):
    """datasets' table of grey levels, bytes of files, or None; and of labels, as a datasets' feature and values."""
    datasets = pytest.importorskip("datasets")
    contents = [encoded(cell) if isinstance(cell, int) else cell for cell in cells]
    columns = {column: [None if content is None else {"bytes": content, "path": None} for content in contents]}
    features = {column: datasets.Image()}
    if labels is not None:
        features["label"], columns["label"] = labels
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_shards(folder, cells, sizes, *, labels=None, kind="parquet", split="train"):
    """Files of a table of images, so many in each: see `image_table`."""
    folder.mkdir(exist_ok=True)
    for number, end in enumerate(itertools.accumulate(sizes)):
        part = slice(end - sizes[number], end)
        table = image_table(cells[part], labels=labels and (labels[0], labels[1][part]))
        file = folder / f"{split}-{number:03}.{kind}"
        if kind == "parquet":
            table.to_parquet(file)
        else:
            pyarrow = pytest.importorskip("pyarrow")
            with pyarrow.ipc.new_stream(str(file), table.data.table.schema) as writer:
                writer.write_table(table.data.table)
    return folder
