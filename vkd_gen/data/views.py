"""Which part of an image is seen: its crops, by number, at one size.

H height, W width, in pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ASPECT_RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
"""Width to height of buckets, those of diffusers' `generate_aspect_ratio_buckets`."""


class View(NamedTuple):
    """A part of an image that was resized, as large as the model's images.

    Attributes:
        height: of the part.
        width: of the part.
        resized_height: of the whole image before it is cropped.
        resized_width: likewise.
        top: of the part in the resized image, mirrored if it is.
        left: likewise.
        original_height: of the image as it lies on the disk, upright; of one that is longer than `images.LONGEST` times
            its shorter side, of its middle.
        original_width: likewise.
        is_flipped: the resized image is mirrored before it is cropped, as in diffusers' train_text_to_image_sdxl.py.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    original_height: int
    original_width: int
    is_flipped: bool


class Views:
    """The crops of all images, each a function of (seed, image, number of the crop) alone.

    Args:
        sizes: bucket -> height and width of the views of its images.
        buckets: of each image, by its index; None where all are in the only one.
        num_crops: of each image; number 0 is the centre.
        seed: of the others.
    """

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        buckets: np.ndarray | None = None,
        *,
        num_crops: int = 1,
        seed: int = 0,
    ):
        if num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, not {num_crops}")
        self.sizes, self.buckets, self.num_crops, self.seed = sizes, buckets, num_crops, seed

    def bucket(self, index: int) -> int:
        """The bucket of image `index`."""
        return 0 if self.buckets is None else int(self.buckets[index])

    def view(
        self, number: int, original: tuple[int, int], crop: int = 0, is_flipped: bool = False, *, bucket: int = 0
    ) -> View:
        """Crop number `crop` of an image: resized so that it just covers the view, then cut.

        Args:
            number: of the image in its source, below 2^64: it has the same crops wherever it is chosen.
            original: its height and width.
            crop: from 0 to `num_crops` - 1; the same however many there are.
            is_flipped: see `View`.
            bucket: of the image.
        """
        height, width = self.sizes[bucket]
        scale = max(height / original[0], width / original[1])
        resized = max(height, round(original[0] * scale)), max(width, round(original[1] * scale))
        spare = resized[0] - height, resized[1] - width
        if crop == 0:
            top, left = spare[0] // 2, spare[1] // 2
        else:
            key = np.array([self.seed, number], dtype=np.uint64)
            counter = np.array([0, 0, 0, crop], dtype=np.uint64)  # the last word is far from what drawing counts up
            generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
            top, left = (int(generator.integers(room + 1)) for room in spare)
        if is_flipped:
            left = spare[1] - left
        return View(height, width, *resized, top, left, *original, is_flipped)

    def describe(self) -> str:
        """Buckets with their numbers of images, in words."""
        counts = [0] * len(self.sizes) if self.buckets is None else np.bincount(self.buckets).tolist()
        return ", ".join(
            f"{height} x {width} ({count:,})" for (height, width), count in zip(self.sizes, counts, strict=True)
        )

    def facts(self) -> dict[str, Any]:
        """What decides the views, beside the images: for the name of a cache."""
        return {"num_crops": self.num_crops, "seed": self.seed if self.num_crops > 1 else 0}


def aspect_buckets(resolution: int, factor: int) -> list[tuple[int, int]]:
    """Heights and widths of buckets that have about as many pixels as a square, in several aspect ratios.

    They are those of diffusers' `generate_aspect_ratio_buckets`, which the lowest diffusers that is supported lacks.

    Args:
        resolution: side of the square.
        factor: that sides are multiples of.

    Raises:
        ValueError: in one line, for a side below the factor.

    >>> aspect_buckets(512, 64)[:4]
    [(512, 512), (576, 448), (448, 576), (640, 448)]
    """
    if not 1 <= factor <= resolution:
        raise ValueError(f"the sides of aspect buckets are multiples of {factor}: {resolution} pixels are too few")
    buckets: dict[tuple[int, int], None] = {}
    for ratio_width, ratio_height in ASPECT_RATIOS:
        height = (resolution**2 / (ratio_width / ratio_height)) ** 0.5
        sides = height, height * (ratio_width / ratio_height)
        rounded = [max(factor, round(side / factor) * factor) for side in sides]
        buckets[rounded[0], rounded[1]] = None
    return list(buckets)


def bucketed_views(
    originals: np.ndarray, buckets: Sequence[tuple[int, int]], *, num_crops: int = 1, seed: int = 0
) -> Views:
    """Views of images at the size whose aspect ratio is nearest to their own; sizes of no image are left out.

    Args:
        originals: height and width of each image, `[images, 2]`, see `Images.sizes`.
        buckets: heights and widths to choose from.
        num_crops: see `Views`.
        seed: see `Views`.
    """
    from diffusers.training_utils import find_nearest_bucket

    sizes, which = np.unique(originals, axis=0, return_inverse=True)
    nearest = np.array([find_nearest_bucket(height, width, list(buckets)) for height, width in sizes.tolist()])
    present, numbers = np.unique(nearest[which.reshape(-1)], return_inverse=True)
    return Views([buckets[number] for number in present], numbers, num_crops=num_crops, seed=seed)
