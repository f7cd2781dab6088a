"""One image file, or its bytes, as an image: upright, opaque, 8 bits. And hashes over image files."""

import contextlib
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vkd_gen.text import one_line

ADVICE = "repair or remove it"
NO_FORMATS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that PIL knows, but does not decode by itself: PostScript is a program, which it hands to Ghostscript, and
the others need a system's or an application's own decoder. PDF it only writes."""
HASHED_BYTES, FIRST_BYTES = 2**33, 2**12
"""Sets of up to so many bytes are hashed whole, of larger ones so many of each image."""


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The formats that this installation of PIL decodes by itself."""
    Image.preinit()  # first the common ones, in PIL's own order
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_FORMATS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Ends of the names of such files, in lower case, with the dot."""
    formats = set(image_formats())
    ends = {end for end, name in Image.registered_extensions().items() if name in formats}
    return frozenset(ends - {".pfm"})  # depth maps, of floating point numbers


def check_headers(files: Mapping[str, Path]) -> None:
    """Read the headers alone: fast, and finds most of what is no image before the training starts.

    Args:
        files: by the names that messages give them.

    Raises:
        ValueError: naming the first that is no image.
    """
    bad = []
    for name, file in files.items():
        try:
            with _careful_pil(), _open(file):
                pass
        except Exception as error:  # see _opened
            bad.append(f"{name}: {_reason(error)}")
    if bad:
        others = f" ({len(bad)} such in all; --on_bad_image skip leaves them out)" if len(bad) > 1 else ""
        raise ValueError(f"cannot read {bad[0]}{others}; {ADVICE}")


def decode_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    """An image as it is meant to be seen: upright, opaque, 8 bits, grey or RGB.

    Args:
        file: or its bytes.
        name: for messages.

    Raises:
        ValueError: naming it, if it cannot be read.
    """
    with _opened(file, name) as image:
        image.load()
        return _without_transparency(_to_eight_bits(_upright(image)))


def image_size(file: Path | io.BytesIO, name: str) -> tuple[int, int]:
    """Width and height of an image, upright; only its header is read.

    Args:
        file: or its bytes.
        name: for messages.

    Raises:
        ValueError: naming it, if it cannot be read.
    """
    with _opened(file, name) as image:
        try:
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except Exception:  # see _upright
            is_turned = False
        return image.size[::-1] if is_turned else image.size


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """An image, not decoded yet; what goes wrong with it inside of the context names it, in one line."""
    try:
        with _careful_pil(), _open(file) as image:
            yield image
    except Exception as error:  # damaged files end in all kinds of errors: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read {name}: {_reason(error)}; {ADVICE}") from error


@contextlib.contextmanager
def _careful_pil() -> Iterator[None]:
    """PIL's warning of decompression bombs as an error; its others, of odd metadata, are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _open(file: Path | io.BytesIO) -> Image.Image:
    size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
    if isinstance(file, Path) and not file.is_file():  # reading from a pipe or a device would not end
        raise ValueError("it is no file")
    if not size:
        raise ValueError("the file is empty")
    return Image.open(file, formats=image_formats())  # by its content a .png may be PostScript, which PIL would run


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; as it is stored where the EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata end as damaged images do
        return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floating point numbers; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    numbers = np.asarray(image)  # 16 bits, which PIL would cut off at 255 instead of scaling
    if numbers.min() < 0 or numbers.max() > 65535:
        raise ValueError("it holds whole numbers of more than 16 bits; save it with 8 or 16")
    return Image.fromarray((numbers / 257).round().astype(np.uint8))


def _without_transparency(image: Image.Image) -> Image.Image:
    """On white, where the image is transparent: what lies below its transparent parts was never meant to be seen."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no image format that is known"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path
    return one_line(error)


def files_identity(files: list[Path], root: Path, beside: str = "") -> str:
    """A hash over the files' names below a folder, sizes and times of change, and over what is given beside them."""
    digest = hashlib.sha256(beside.encode())
    for file in files:
        line = f"{os.path.relpath(file, root)}\n"
        if file.is_file():  # else one that --on_bad_image skip leaves out
            line += f"{file.stat().st_size} {file.stat().st_mtime_ns}\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()


def num_hashed(num_bytes: int) -> int | None:
    """How many bytes of each image are hashed in a set that has so many; None for all."""
    return None if num_bytes <= HASHED_BYTES else FIRST_BYTES


def files_contents(files: list[Path], root: Path | None) -> str:
    """A hash over bytes, see `num_hashed`, over sizes and, with `root`, over names below it."""
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    count = num_hashed(sum(sizes))

    def describe(file: Path) -> bytes:
        if not file.is_file() or not os.access(file, os.R_OK):  # one that --on_bad_image skip leaves out
            return b""
        with file.open("rb") as opened:
            return hashlib.sha256(opened.read(count)).digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(max_workers=4) as pool:  # reading and hashing leave Python's lock to others
        for file, size, content in zip(files, sizes, pool.map(describe, files), strict=True):
            name = "" if root is None else file.relative_to(root)
            digest.update(os.fsencode(f"{name}\n{size} ") + content)
    return digest.hexdigest()
