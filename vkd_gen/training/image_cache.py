"""Training images decoded once and kept on disk, instead of decoded in each pass through them."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from torch import Tensor

from vkd_gen.data.images import Images
from vkd_gen.training.cache import KeptRows, keep_rows


def cache_images(images: Images, folder: Path) -> Images:
    """The same images, pixel by pixel, read from disk as `Images.pixels` gives them; called by all processes.

    Args:
        images: of any source.
        folder: to keep them in.

    Raises:
        ValueError: in one line, for an image that cannot be read, or if they cannot be kept.
    """
    assert (np.diff(images.indices) > 0).all(), "rows are found by the images' numbers"

    def decode(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"pixels": images.pixels(rows)}

    kept = keep_rows(
        folder,
        image_facts(images),
        len(images),
        decode,
        what="decoded images",
        advice="choose another --image_cache, or none",
    )
    return replace(images, read=partial(_read, kept, images.indices))


def _read(kept: KeptRows, numbers: np.ndarray, number: int) -> Image.Image:
    """Image `number` of the whole source, as large as it is asked for: nothing is left to be done to it."""
    row = int(np.searchsorted(numbers, number))
    pixels = kept[[row]]["pixels"][0].numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def image_facts(images: Images) -> dict[str, Any]:
    """Everything that decides the pixels of images, as JSON.

    The source goes in by its identity: names, sizes and times of files, or a table's fingerprint. Where there is none,
    as for the embedded sets, every pixel goes in.
    """
    return {
        "source": images.identity() if images.identity else _hash_of_pixels(images),
        "numbers": hashlib.sha256(images.indices.astype("<i8").tobytes()).hexdigest(),
        "resolution": images.resolution,
        "channels": images.channels,
        "pillow": PIL.__version__,
    }


def _hash_of_pixels(images: Images) -> str:
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(images.pixels([index]).numpy().data)
    return digest.hexdigest()
