"""Images of one size, decoded when asked for. C channels, H height, W width."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vkd_gen.choices import OnBadImage, OnMissingCaption
from vkd_gen.data.views import View, Views

LONGEST = 16
"""Of an image that is longer than this many times its shorter side, only the middle is resized."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How the images of a source are read.

    Attributes:
        resolution: height and width to bring them to, pixels.
        channels: 1 (grey) or 3 (RGB).
        held_out_fraction: share to hold out where the source has no test split of its own; the same images in every
            run. 0 holds out none.
        image_column: a table's column of images; by default the only one.
        with_labels: read the classes too. In a folder of images these are its folders, in the order of their names
            and below `train/` and `test/` if there are such, as in torchvision's ImageFolder.
        label_column: a table's column of classes, whole numbers from 0; by default the only one of classes (datasets'
            ClassLabel), else the one called `label`.
        num_classes: how many classes the model knows; by default as many as the source has.
        on_bad_image: what happens to an image that cannot be read: it is damaged, empty, of another kind than its name
            says, of floating point numbers, or of more pixels than PIL takes for safe (`Image.MAX_IMAGE_PIXELS`).
            `refuse` makes it an error: headers of files are checked at once, the rest when it is read. `skip` decodes
            every image once at the start and leaves bad ones out; which others are held out does not depend on it.
        with_captions: read the captions too: strings, or lists of strings, in a column of a table. In a folder of
            images they are a column of `metadata.jsonl` or `metadata.csv` beside `file_name`, as in datasets'
            imagefolder, or else `.txt` files of the images' names, each of one caption.
        caption_column: a table's, or such a file's, column of captions; by default the only one of text, else the one
            called caption, text, prompt, or the like.
        on_missing_caption: what happens to an image that has no usable caption: null, no row, no file, white space
            alone, or what is not text. `refuse` makes it an error, `skip` leaves the image out, `empty` gives it the
            empty prompt. Null and empty entries of a list of captions are passed over, as long as one is left.

    Raises:
        ValueError: for a value out of range.
    """

    resolution: int
    channels: int
    held_out_fraction: float = 1 / 6
    image_column: str | None = None
    with_labels: bool = False
    label_column: str | None = None
    num_classes: int | None = None
    on_bad_image: OnBadImage = "refuse"
    with_captions: bool = False
    caption_column: str | None = None
    on_missing_caption: OnMissingCaption = "refuse"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(
                f"images have 1 or 3 channels, not {self.channels}; the model's in_channels must be one of these"
            )
        if self.resolution < 1:
            raise ValueError(f"resolution must be at least 1 pixel, not {self.resolution}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be at least 0 and below 1, not {self.held_out_fraction}")
        if self.on_bad_image not in ("refuse", "skip"):
            raise ValueError(f"on_bad_image must be refuse or skip, not {self.on_bad_image!r}")
        if self.on_missing_caption not in ("refuse", "skip", "empty"):
            raise ValueError(f"on_missing_caption must be refuse, skip or empty, not {self.on_missing_caption!r}")


@dataclass(frozen=True)
class Images:
    """Images of one size in [-1, 1], decoded when asked for.

    Attributes:
        read: image number -> PIL image, upright, opaque, 8 bits, grey or RGB; raises ValueError, naming the file, for
            one that cannot be read.
        resolution: height and width in pixels that `__getitem__` crops and resizes to.
        channels: 1 (grey) or 3 (RGB).
        name: where they come from, for messages and model cards.
        indices: which images of the source these are.
        labels: class of each image of the source, 0 to `num_classes` - 1; None if they were not asked for.
        num_classes: how many classes there are; 0 without labels.
        captions: of each image of the source, by its number, one or several; None if they were not asked for.
        skipped: one line for each image that was left out because it cannot be read.
        notes: one line for each decision about the source that a user should know, such as which files are not data.
        revision: commit of the data set on the hub, where it is known.
        identity: gives a hash that changes when the source's files change, without reading them.
        contents: gives a hash of what the source holds, wherever it lies; None where its name or commit says that.
        read_size: image number -> width and height of what `read` gives, without decoding it; None where that decodes.
    """

    read: Callable[[int], Image.Image]
    resolution: int
    channels: int
    name: str
    indices: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int = 0
    captions: Sequence[tuple[str, ...]] | Mapping[int, tuple[str, ...]] | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    revision: str | None = None
    identity: Callable[[], str] | None = None
    contents: Callable[[], str] | None = None
    read_size: Callable[[int], tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Float[Tensor, "channels height width"]:
        """Image `index`, float32 in [-1, 1]."""
        return torch.from_numpy(self._pixels(index).astype(np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()

    def _pixels(self, index: int) -> np.ndarray:
        """Image `index`, uint8, `[H, W, C]`: resized so that the shorter side fits, then cropped at the centre."""
        image = self._image(index)
        if image.size != (self.resolution, self.resolution):
            scale = self.resolution / min(image.size)
            width, height = (max(self.resolution, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = _crop(image, self.resolution, self.resolution)
        return np.asarray(image).reshape(self.resolution, self.resolution, self.channels)

    def _image(self, index: int) -> Image.Image:
        image = self.read(int(self.indices[index])).convert("L" if self.channels == 1 else "RGB")
        width, height = _not_too_long(*image.size)
        return image if image.size == (width, height) else _crop(image, width, height)

    def view(self, index: int, views: Views, crop: int, is_flipped: bool) -> tuple[Float[Tensor, "C H W"], View]:
        """A crop of image `index`, float32 in [-1, 1], and which part of the image that is; see `Views.view`."""
        image = self._image(index)
        original = image.height, image.width
        view = views.view(int(self.indices[index]), original, crop, is_flipped, bucket=views.bucket(index))
        if image.size != (view.resized_width, view.resized_height):
            image = image.resize((view.resized_width, view.resized_height), Image.Resampling.BICUBIC)
        if is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
        values = np.asarray(image, dtype=np.float32).reshape(view.height, view.width, self.channels) / 127.5 - 1
        return torch.from_numpy(values).permute(2, 0, 1).contiguous(), view

    def sizes(self) -> np.ndarray:
        """Height and width of each image, `[images, 2]`, read from headers where there are any.

        Raises:
            ValueError: for an image that cannot be read.
        """
        numbers = self.indices.tolist()
        sizes = map(self.read_size, numbers) if self.read_size else (self.read(number).size for number in numbers)
        return np.array([_not_too_long(*size)[::-1] for size in sizes], dtype=np.int64).reshape(-1, 2)

    def pixels(self, indices: Sequence[int]) -> UInt8[Tensor, "images channels height width"]:
        """Images as uint8: what `__getitem__` gives, before scaling."""
        return torch.stack([torch.from_numpy(self._pixels(index).copy()).permute(2, 0, 1) for index in indices])

    def label(self, index: int) -> int:
        """The class of image `index`; only where there are labels."""
        assert self.labels is not None, "load_images was not asked for labels"
        return int(self.labels[self.indices[index]])

    def captions_of(self, index: int) -> tuple[str, ...]:
        """The captions of image `index`, at least one; only where there are captions."""
        assert self.captions is not None, "load_images was not asked for captions"
        return self.captions[int(self.indices[index])]

    def stack(self, count: int | None = None) -> Float[Tensor, "images channels height width"]:
        """`count` evenly spaced images (default: all) as one tensor."""
        some = self if count is None else evenly_spaced(self, count)
        return torch.stack([some[index] for index in range(len(some))])


def _not_too_long(width: int, height: int) -> tuple[int, int]:
    """Of an image's middle, which is resized: one line of 60,000 pixels would be made into 512 lines of 30 million."""
    longest = LONGEST * min(width, height)
    return min(width, longest), min(height, longest)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def evenly_spaced(images: Images, count: int) -> Images:
    """`count` of the images, evenly spaced, since sets are often sorted by class; all of them where there are fewer."""
    count = min(count, len(images))
    return replace(images, indices=images.indices[np.arange(count) * len(images) // count])


def told_of(*parts: Images) -> list[str]:
    """What a user should know of images, one line each: their notes, and how many cannot be read."""
    lines = [note for images in parts for note in images.notes]
    skipped = [line for images in parts for line in images.skipped]
    if skipped:
        lines.append(f"{len(skipped):,} images that cannot be read are left out, such as: {skipped[0]}")
    return lines


def data_facts(train: Images, held_out: Images) -> dict[str, Any]:
    """What a run's configuration keeps of its data; a resumed run must find the same.

    Returns:
        `num_skipped_images`; `image_numbers_sha256`, over which images are trained on and which are held out;
        `captions_sha256`, over the captions of these, where there are any; and `dataset_revision`, the commit on the
        hub, or `dataset_sha256`, over files, tables and classes, where known.
    """
    digest = hashlib.sha256()
    for images in (train, held_out):
        digest.update(len(images).to_bytes(8, "little") + images.indices.astype("<i8").tobytes())
    facts = {
        "num_skipped_images": len(train.skipped) + len(held_out.skipped),
        "image_numbers_sha256": digest.hexdigest(),
    }
    if train.captions is not None:
        facts["captions_sha256"] = _hash_captions(train, held_out)
    if train.revision is not None:
        return {**facts, "dataset_revision": train.revision}
    if train.contents is None or held_out.contents is None:
        return facts
    is_one = train.contents is held_out.contents  # of which a part is held out
    digest = hashlib.sha256(f"{train.contents()} {'' if is_one else held_out.contents()}".encode())
    for images in (train, held_out):
        digest.update(b"" if images.labels is None else images.labels.astype("<i8").tobytes())
    return {**facts, "dataset_sha256": digest.hexdigest()}


def _hash_captions(*parts: Images) -> str:
    digest = hashlib.sha256()
    for images in parts:
        for index in range(len(images)):
            digest.update(json.dumps(images.captions_of(index)).encode())
        digest.update(b"\n")
    return digest.hexdigest()
