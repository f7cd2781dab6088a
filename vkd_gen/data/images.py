"""Images of one size, decoded when asked for. C channels, H height, W width."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images of one size in [-1, 1], decoded when asked for.

    Attributes:
        read: image number -> PIL image, upright, opaque, 8 bits, grey or RGB; raises ValueError, naming the file, for
            one that cannot be read.
        resolution: height and width in pixels that `__getitem__` crops and resizes to.
        channels: 1 (grey) or 3 (RGB).
        name: where they come from, for messages and model cards.
        indices: numbers in the whole source, of the images that these are.
        labels: class of each image of the whole source, 0 to `num_classes` - 1; None if they were not asked for.
        num_classes: how many classes there are; 0 without labels.
        skipped: what was left out because it cannot be read, a line each: which image, and why.
        notes: how the source was understood, a line each: what of it is no data, which names say what is held out, what
            is unlike what was asked for. Of the training images alone.
        revision: commit of the data set on the hub; None for another source, or where it is not known.
        identity: gives a hash that changes with the source, without decoding it; None where there is none.
        contents: gives a hash of what the source holds, wherever it lies; None where its name or commit says that.
    """

    read: Callable[[int], Image.Image]
    resolution: int
    channels: int
    name: str
    indices: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int = 0
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    revision: str | None = None
    identity: Callable[[], str] | None = None
    contents: Callable[[], str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Float[Tensor, "channels height width"]:
        """Image `index`, float32 in [-1, 1]."""
        return torch.from_numpy(self._pixels(index).astype(np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()

    def _pixels(self, index: int) -> np.ndarray:
        """Image `index`, uint8, `[H, W, C]`: resized so that the shorter side fits, then cropped at the centre."""
        image = self.read(int(self.indices[index]))
        image = image.convert("L" if self.channels == 1 else "RGB")
        longest = LONGEST * min(image.size)
        if max(image.size) > longest:  # else one line of 60,000 pixels would be made into 512 lines of 30 million
            width, height = (min(side, longest) for side in image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        if image.size != (self.resolution, self.resolution):
            scale = self.resolution / min(image.size)
            width, height = (max(self.resolution, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
            image = image.crop((left, top, left + self.resolution, top + self.resolution))
        return np.asarray(image).reshape(self.resolution, self.resolution, self.channels)

    def pixels(self, indices: Sequence[int]) -> UInt8[Tensor, "images channels height width"]:
        """Images as uint8: what `__getitem__` gives, before scaling."""
        return torch.stack([torch.from_numpy(self._pixels(index).copy()).permute(2, 0, 1) for index in indices])

    def label(self, index: int) -> int:
        """The class of image `index`; only where there are labels."""
        assert self.labels is not None, "load_images was not asked for labels"
        return int(self.labels[self.indices[index]])

    def stack(self, count: int | None = None) -> Float[Tensor, "images channels height width"]:
        """`count` images, evenly spaced (default: all), as one tensor; sets are often sorted by class."""
        count = min(count or len(self), len(self))
        return torch.stack([self[number * len(self) // count] for number in range(count)])


def evenly_spaced(images: Images, count: int) -> Images:
    """`count` of the images, evenly spaced, since sets are often sorted by class; all of them where there are fewer."""
    count = min(count, len(images))
    return replace(images, indices=images.indices[np.arange(count) * len(images) // count])


LONGEST = 16
"""Of an image that is longer than this many times its shorter side, the middle alone is resized."""


def told_of(*parts: Images) -> list[str]:
    """What a user is to know of images: their notes, and how many cannot be read, a line each."""
    skipped = [line for images in parts for line in images.skipped]
    lines = [note for images in parts for note in images.notes]
    return lines + (
        [f"{len(skipped):,} images that cannot be read are left out, such as: {skipped[0]}"] if skipped else []
    )


def data_facts(train: Images, held_out: Images) -> dict[str, Any]:
    """What a run's configuration keeps of its data; a resumed run must find the same.

    Returns:
        `num_skipped_images`; `image_numbers_sha256`, over which images are trained on and which are held out;
        `dataset_sha256`, over what files and tables here hold, with the classes; and `dataset_revision`, the commit on
        the hub, where it is known.
    """
    digest = hashlib.sha256()
    for images in (train, held_out):
        digest.update(len(images).to_bytes(8, "little") + images.indices.astype("<i8").tobytes())
    facts = {
        "num_skipped_images": len(train.skipped) + len(held_out.skipped),
        "image_numbers_sha256": digest.hexdigest(),
    }
    if train.revision is not None:
        return {**facts, "dataset_revision": train.revision}
    if train.contents is None or held_out.contents is None:
        return facts
    is_one = train.contents is held_out.contents  # of which a part is held out
    digest = hashlib.sha256(f"{train.contents()} {'' if is_one else held_out.contents()}".encode())
    for images in (train, held_out):
        digest.update(b"" if images.labels is None else images.labels.astype("<i8").tobytes())
    return {**facts, "dataset_sha256": digest.hexdigest()}
