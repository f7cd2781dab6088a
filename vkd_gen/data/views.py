"""Which part of an image is seen: its crops, by number, at one size.

H height, W width, in pixels.
"""

from typing import Any, NamedTuple

import numpy as np


class View(NamedTuple):
    """A part of an image that was resized, as large as the model's images.

    Attributes:
        height: of the part.
        width: of the part.
        resized_height: of the whole image before it is cropped.
        resized_width: likewise.
        top: of the part in the resized image, mirrored if it is.
        left: likewise.
        original_height: of the image as it lies on the disk, upright.
        original_width: likewise.
        is_flipped: the resized image is mirrored before it is cropped.
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
        buckets: of each image; None where all are in the only one.
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

    def view(self, index: int, original: tuple[int, int], crop: int = 0, is_flipped: bool = False) -> View:
        """Crop number `crop` of an image: resized so that the shorter side fits, then cut.

        Args:
            index: of the image.
            original: its height and width.
            crop: from 0 to `num_crops` - 1.
            is_flipped: see `View`.
        """
        height, width = self.sizes[self.bucket(index)]
        scale = max(height / original[0], width / original[1])
        resized = max(height, round(original[0] * scale)), max(width, round(original[1] * scale))
        spare = resized[0] - height, resized[1] - width
        if crop == 0:
            top, left = spare[0] // 2, spare[1] // 2
        else:
            key = np.array([self.seed, index * self.num_crops + crop], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            top, left = (int(generator.integers(room + 1)) for room in spare)
        if is_flipped:
            left = spare[1] - left
        return View(height, width, *resized, top, left, *original, is_flipped)

    def facts(self) -> dict[str, Any]:
        """What decides the views, beside the images: for the name of a cache."""
        return {"num_crops": self.num_crops, "seed": self.seed if self.num_crops > 1 else 0}
