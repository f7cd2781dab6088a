"""What draws are of: samples for the denoiser and what it is told of them. C channels, H height, W width."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vkd_gen.data.images import Images

KEPT_BYTES = 2**28
"""Training images that take no more than this as float32 stay in memory, decoded."""


class Samples(Protocol):
    """A set of samples, of which `Draws` draws one at a time.

    A draw is `read`, which is the same each time, then `draw` and, after noise and time, `tell`; these two draw from
    the generator of the draw, always equally often. A batch is put together by `finish`, on the network's device.

    Attributes:
        random_flip: mirror half of the draws.
        guidance_dropout: share of the draws that are told nothing, which is what classifier-free guidance needs (Ho and
            Salimans, 2022, arXiv 2207.12598).
        buckets: of each sample, `[samples]`: those of one bucket have one shape; None where all have.
    """

    random_flip: bool
    guidance_dropout: float
    buckets: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Sample `index`, before anything of it is drawn."""

    def without_images(self, images: Images) -> "Samples":
        """The same for images that come from elsewhere, of the form of these, which are none."""

    def read_from(self, image: Images, label: int | None) -> Any:
        """What `read` gives, of one image that comes from elsewhere, and its class."""

    def shape(self, item: Any) -> tuple[int, ...]:
        """`(C, H, W)` of what is read, as the denoiser gets it."""

    def draw(self, item: Any, generator: np.random.Generator) -> Any:
        """A tensor, or a dictionary of tensors from which `finish` makes the sample."""

    def tell(self, item: Any, generator: np.random.Generator) -> dict[str, Any]:
        """What the denoiser is told: arguments by name, nested as it takes them, without the batch dimension."""

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `sample` `[B, C, H, W]` float32, and `conditioning` as the denoiser takes it."""

    def nothing(self, conditioning: dict[str, Any]) -> dict[str, Any]:
        """Of a finished batch: what the denoiser would have been told if all of it had been dropped; empty for none."""


class Pixels:
    """Images as they are, with their classes if they have some.

    Args:
        images: of one size.
        random_flip: see `Samples`.
        guidance_dropout: share of the draws whose label is "no class", the number of classes, instead of the image's.
    """

    def __init__(self, images: Images, *, random_flip: bool = False, guidance_dropout: float = 0.0):
        if not 0 <= guidance_dropout < 1:
            raise ValueError(f"guidance_dropout must be at least 0 and below 1, not {guidance_dropout}")
        self.images, self.random_flip, self.guidance_dropout = images, random_flip, guidance_dropout
        self.buckets: np.ndarray | None = None
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def without_images(self, images: Images) -> "Pixels":
        """The same for images that come from elsewhere."""
        return Pixels(images, random_flip=self.random_flip, guidance_dropout=self.guidance_dropout)

    def read(self, index: int) -> tuple[Tensor, int | None]:
        """Image and class; images of a small set are decoded once, except by processes that do nothing else."""
        label = None if self.images.labels is None else self.images.label(index)
        if index in self._kept:
            return self._kept[index], label
        sample = self.images[index]
        if len(self.images) * sample.nbytes <= KEPT_BYTES and get_worker_info() is None:
            self._kept[index] = sample
        return sample, label

    def read_from(self, image: Images, label: int | None) -> tuple[Tensor, int | None]:
        """Image and class."""
        return image[0], label

    def shape(self, item: tuple[Tensor, int | None]) -> tuple[int, ...]:
        """Of the image."""
        return tuple(item[0].shape)

    def draw(self, item: tuple[Tensor, int | None], generator: np.random.Generator) -> Tensor:
        """The image, mirrored or not."""
        return item[0].flip(-1) if generator.random() < 0.5 and self.random_flip else item[0]

    def tell(self, item: tuple[Tensor, int | None], generator: np.random.Generator) -> dict[str, Any]:
        """`class_labels`, for images with labels."""
        if item[1] is None:
            return {}
        is_dropped = generator.random() < self.guidance_dropout
        return {"class_labels": torch.tensor(self.images.num_classes if is_dropped else item[1])}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing is left to do."""
        return batch

    def nothing(self, conditioning: dict[str, Any]) -> dict[str, Any]:
        """The label for "no class"."""
        return {name: torch.full_like(value, self.images.num_classes) for name, value in conditioning.items()}
