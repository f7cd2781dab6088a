"""Images to train on and to compare with: where they come from, what is made of them, and draws from them."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_images`, on its first use: flags are read before torch is loaded."""
    if name == "load_images":
        from vkd_gen.data.sources import load_images

        return load_images
    raise AttributeError(f"module 'vkd_gen.data' has no attribute {name!r}")
