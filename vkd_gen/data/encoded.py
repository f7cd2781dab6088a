"""Images as a denoiser of latents gets them: latents, and embeddings of prompts or classes.

They are encoded once and kept on the disk, or each time that they are drawn; both give the same draws.
B batch, C latent channels, h x w latents, H x W pixels.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL
import torch
from torch import Tensor

from vkd_gen.data.cache import KeptRows, keep_rows
from vkd_gen.data.images import Images
from vkd_gen.data.views import View, Views
from vkd_gen.encoders import Encoders


class Store(Protocol):
    """Where latents and embeddings come from."""

    def latent(self, images: Images, index: int, crop: int, is_flipped: bool, normal: Tensor) -> dict[str, Tensor]:
        """Of an image a sample of its latents, or what `finish` needs for it, and `time_ids`.

        Args:
            images: that it is one of.
            index: of the image.
            crop: its number.
            is_flipped: mirrored.
            normal: which sample, `[C, h, w]`.
        """

    def prompt(self, caption: str) -> Any:
        """Its embeddings by name, without the batch dimension, or what `finish` needs for them."""

    def finish(self, sample: dict[str, Tensor], prompts: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples `[B, C, h, w]` float32 and embeddings `[B, ...]` of a batch; none of prompts None."""


class Item(NamedTuple):
    """An image that is drawn.

    Attributes:
        images: that it is one of.
        number: of it among these.
        label: its class, if it has one.
        bucket: of its size.
    """

    images: Images
    number: int
    label: int | None
    bucket: int


class Encoded:
    """Images with captions or classes, as `Samples` of latents.

    Which crop of the image, whether it is mirrored, the sample of its latents' distribution and which of its captions
    it gets are drawn anew in each draw.

    Args:
        images: with captions, or with labels.
        views: how they are cropped.
        store: of their latents and of their captions' embeddings.
        shape: bucket -> `(C, h, w)` of its latents.
        null: what the denoiser is told where the prompt is dropped, `[1, ...]` by name; None for images with labels, of
            which that is the number of classes.
        with_sizes: the denoiser is told sizes and crop too (SDXL).
        random_flip: mirror half of the draws.
        guidance_dropout: share of the draws without a prompt or class.
    """

    def __init__(
        self,
        images: Images,
        views: Views,
        store: Store,
        shape: Sequence[tuple[int, int, int]],
        null: dict[str, Tensor] | None,
        *,
        with_sizes: bool,
        random_flip: bool = False,
        guidance_dropout: float = 0.0,
    ):
        self.images, self.views, self.store, self.null = images, views, store, null
        self._shape, self.with_sizes = shape, with_sizes
        self.random_flip, self.guidance_dropout, self.buckets = random_flip, guidance_dropout, views.buckets

    def __len__(self) -> int:
        return len(self.images)

    def without_images(self, images: Images) -> "Encoded":
        """The same for images that come from elsewhere."""
        other = copy.copy(self)
        other.images = images
        return other

    def read(self, index: int) -> Item:
        """Which image it is: what there is of it depends on what is drawn."""
        label = None if self.images.labels is None else self.images.label(index)
        return Item(self.images, index, label, self.views.bucket(index))

    def read_from(self, image: Images, label: int | None) -> Item:
        """The image, which is encoded when it is drawn."""
        return Item(image, 0, label, 0)

    def shape(self, item: Item) -> tuple[int, ...]:
        """`(C, h, w)` of the image's bucket."""
        return self._shape[item.bucket]

    def draw(self, item: Item, generator: np.random.Generator) -> dict[str, Tensor]:
        """Of a crop, mirrored or not, a sample of the latents' distribution."""
        is_flipped = bool(generator.random() < 0.5 and self.random_flip)
        crop = int(generator.integers(self.views.num_crops))
        normal = torch.from_numpy(generator.standard_normal(self.shape(item), dtype=np.float32))
        return self.store.latent(item.images, item.number, crop, is_flipped, normal)

    def tell(self, item: Item, generator: np.random.Generator) -> dict[str, Any]:
        """One of the captions, or none; or the class, or no class."""
        if self.null is None:
            is_dropped = bool(generator.random() < self.guidance_dropout)
            return {"class_labels": torch.tensor(self.images.num_classes if is_dropped else item.label)}
        captions = item.images.captions_of(item.number)
        caption = captions[int(generator.integers(len(captions)))]
        is_dropped = bool(generator.random() < self.guidance_dropout)
        return {"prompt": self.store.prompt(caption), "is_dropped": torch.tensor(is_dropped)}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Latents, and what the denoiser is told: `encoder_hidden_states`, for SDXL `added_cond_kwargs` too; labels."""
        sample, told = dict(batch["sample"]), batch["conditioning"]
        sizes = sample.pop("time_ids")
        if self.null is None:
            return {**batch, "sample": self.store.finish(sample, None)[0]}
        latents, embeddings = self.store.finish(sample, told["prompt"])
        is_dropped = told["is_dropped"]
        for name, value in embeddings.items():
            self.null[name] = self.null[name].to(value.device, torch.float32)  # moved once
            is_without = is_dropped.view(-1, *[1] * (value.ndim - 1))
            embeddings[name] = torch.where(is_without, self.null[name], value.float())
        return {**batch, "sample": latents, "conditioning": self._arguments(embeddings, sizes)}

    def nothing(self, conditioning: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's null prompt; sizes and crops stay. Or the label for "no class"."""
        if self.null is None:
            return {name: torch.full_like(value, self.images.num_classes) for name, value in conditioning.items()}
        states = conditioning["encoder_hidden_states"]
        null = {name: value.to(states).expand(len(states), *value.shape[1:]) for name, value in self.null.items()}
        return self._arguments(null, conditioning.get("added_cond_kwargs", {}).get("time_ids"))

    def _arguments(self, embeddings: dict[str, Tensor], sizes: Tensor | None) -> dict[str, Any]:
        told: dict[str, Any] = {"encoder_hidden_states": embeddings["encoder_hidden_states"]}
        if self.with_sizes:
            told["added_cond_kwargs"] = {"text_embeds": embeddings["text_embeds"], "time_ids": sizes}
        return told


def time_ids(view: View) -> Tensor:
    """SDXL's micro-conditions: original height and width, top and left of the crop, target height and width."""
    sizes = (view.original_height, view.original_width, view.top, view.left, view.height, view.width)
    return torch.tensor(sizes, dtype=torch.float32)


class Live:
    """Encodes what is drawn, in the process that trains. Its encoders stay in memory."""

    def __init__(self, views: Views, encoders: Encoders):
        self.views, self.encoders = views, encoders

    def __getstate__(self) -> dict[str, Any]:
        """Without the encoders: workers read images alone."""
        return {**vars(self), "encoders": None}

    def latent(self, images: Images, index: int, crop: int, is_flipped: bool, normal: Tensor) -> dict[str, Tensor]:
        """The pixels, and which sample of their latents is wanted."""
        pixels, view = images.view(index, self.views, crop, is_flipped)
        return {"pixels": pixels, "normal": normal, "time_ids": time_ids(view)}

    def prompt(self, caption: str) -> str:
        """The caption as it is."""
        return caption

    def finish(self, sample: dict[str, Tensor], prompts: list[str] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode the batch, each caption once."""
        normal = sample["normal"]
        found = self.encoders.latents(sample["pixels"])
        latents = found["mean"].float() + found["deviation"].float() * normal
        if prompts is None:
            return latents, {}
        distinct = sorted(set(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=normal.device)
        return latents, {name: value[rows] for name, value in self.encoders.prompts(distinct).items()}


class Kept:
    """Reads what was encoded from the disk.

    Args:
        latents: bucket -> its rows, for each of its images all crops, each as it is and, where asked for, mirrored.
        places: of each image in its bucket.
        views: of the images.
        prompts: rows of embeddings; None for images with labels.
        numbers: caption -> its row.
        with_flips: mirrored crops are there.
    """

    def __init__(
        self,
        latents: Sequence[KeptRows],
        places: np.ndarray,
        views: Views,
        prompts: KeptRows | None,
        numbers: dict[str, int],
        with_flips: bool,
    ):
        self.latents, self.places, self.views = latents, places, views
        self.prompts, self.numbers, self.with_flips = prompts, numbers, with_flips

    def latent(self, images: Images, index: int, crop: int, is_flipped: bool, normal: Tensor) -> dict[str, Tensor]:
        """Mean and deviation of the row, put together."""
        row = _row(int(self.places[index]), crop, is_flipped, self.views.num_crops, self.with_flips)
        found = self.latents[self.views.bucket(index)][[row]]
        latent = found["mean"][0].float() + found["deviation"][0].float() * normal
        return {"latent": latent, "time_ids": found["time_ids"][0]}

    def prompt(self, caption: str) -> dict[str, Tensor]:
        """The caption's row."""
        assert self.prompts is not None
        return {name: value[0] for name, value in self.prompts[[self.numbers[caption]]].items()}

    def finish(self, sample: dict[str, Tensor], prompts: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As they are."""
        return sample["latent"], dict(prompts or {})


def _row(place: int, crop: int, is_flipped: bool, num_crops: int, with_flips: bool) -> int:
    return ((place * num_crops + crop) * 2 + is_flipped) if with_flips else place * num_crops + crop


class How(NamedTuple):
    """How images are encoded.

    Attributes:
        folder: that keeps the encodings; None encodes what is drawn.
        random_flip: mirror half of the draws.
        guidance_dropout: share of the draws without a prompt.
        batch_size: images or prompts at a time.
        advice: what to do where the disk has no room.
    """

    folder: Path | None
    random_flip: bool
    guidance_dropout: float
    batch_size: int
    advice: str = "choose another --cache_dir, or --no-cache"


def encode(images: Images, views: Views, encoders: Encoders, how: How, say: Callable[[str], None]) -> Encoded:
    """Samples of images with captions or labels; called by all processes, which share the work.

    Args:
        images: with captions, or with labels.
        views: how they are cropped, with sides that the VAE can divide.
        encoders: on the device to compute on.
        how: see `How`.
        say: prints a line.

    Raises:
        ValueError: in one line, for what cannot be read, encoded or kept.
    """
    shapes = []
    for height, width in views.sizes:
        probe = encoders.latents(torch.zeros(1, 3, height, width))["mean"]
        shapes.append((probe.shape[1], probe.shape[2], probe.shape[3]))
    captions, null = None, None
    if images.captions is not None:
        captions = sorted({caption for index in range(len(images)) for caption in images.captions_of(index)})
        null = {name: value.cpu() for name, value in encoders.null_prompt().items()}
    if captions is not None and (num_truncated := encoders.num_truncated(captions)):
        say(
            f"{num_truncated:,} of {len(captions):,} captions are longer than the text encoder reads; the rest of them "
            "is cut off"
        )
    store = Live(views, encoders) if how.folder is None else _keep(images, views, encoders, captions, how)
    return Encoded(
        images,
        views,
        store,
        shapes,
        null,
        with_sizes=encoders.is_xl,
        random_flip=how.random_flip,
        guidance_dropout=how.guidance_dropout,
    )


def _keep(images: Images, views: Views, encoders: Encoders, captions: list[str] | None, how: How) -> Kept:
    assert images.identity is not None, "nothing says what these images are"
    assert how.folder is not None
    facts, source = encoders.facts(), images.identity()
    buckets = np.array([views.bucket(index) for index in range(len(images))])
    places, latents = np.zeros(len(images), dtype=np.int64), []
    per_image = views.num_crops * (2 if how.random_flip else 1)
    for bucket, (height, width) in enumerate(views.sizes):
        members = np.flatnonzero(buckets == bucket)
        assert len(members), "views are of the buckets that there are images of"
        places[members] = np.arange(len(members))

        def compute(rows: Sequence[int], members: np.ndarray = members) -> dict[str, Tensor]:
            seen = [_view_of(row, images, members, views, how.random_flip) for row in rows]
            found = encoders.latents(torch.stack([pixels for pixels, _ in seen]))
            latents = {name: value.cpu().contiguous() for name, value in found.items()}
            return {**latents, "time_ids": torch.stack([time_ids(view) for _, view in seen])}

        own = {
            "of": "latents",
            "source": source,
            "numbers": hashlib.sha256(images.indices[members].astype("<i8").tobytes()).hexdigest(),
            "views": views.facts(),
            "size": [height, width],
            "flips": how.random_flip,
            "pillow": PIL.__version__,
            **facts["latents"],
        }
        what = f"latents of {height} x {width} pixels" if len(views.sizes) > 1 else "latents"
        latents.append(
            keep_rows(
                how.folder,
                own,
                len(members) * per_image,
                compute,
                what=what,
                advice=how.advice,
                batch_size=how.batch_size,
            )
        )

    if captions is None:
        return Kept(latents, places, views, None, {}, how.random_flip)

    def embed(rows: Sequence[int]) -> dict[str, Tensor]:
        found = encoders.prompts([captions[row] for row in rows])
        return {name: value.cpu().contiguous() for name, value in found.items()}

    own = {"of": "prompts", "captions": hashlib.sha256("\0".join(captions).encode()).hexdigest(), **facts["prompts"]}
    prompts = keep_rows(
        how.folder, own, len(captions), embed, what="prompts", advice=how.advice, batch_size=how.batch_size
    )
    numbers = {caption: number for number, caption in enumerate(captions)}
    return Kept(latents, places, views, prompts, numbers, how.random_flip)


def _view_of(row: int, images: Images, members: np.ndarray, views: Views, with_flips: bool) -> tuple[Tensor, View]:
    """What is seen in a row: the inverse of `_row`."""
    row, is_flipped = divmod(row, 2) if with_flips else (row, 0)
    place, crop = divmod(row, views.num_crops)
    return images.view(int(members[place]), views, crop, bool(is_flipped))
