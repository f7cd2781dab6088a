"""Where images to score come from - a folder, an array, a data set - and one pass of a network over them.

C channels, H height, W width.
"""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, pad_across_processes
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from vkd_gen.data.images import Images, told_of
from vkd_gen.data.sources import load_images
from vkd_gen.evaluation.clip import Clip
from vkd_gen.evaluation.extractors import Extractor
from vkd_gen.evaluation.prompts import Prompts
from vkd_gen.loading import check_file
from vkd_gen.text import reason

logger = logging.getLogger(__name__)

OF_MODELS = ("model_index.json", "pipeline/model_index.json", "unet/config.json", "diffusion_pytorch_model.safetensors")
"""What a folder of images does not hold: a folder with one of these is a pipeline's, or a model's by mistake."""


CLIP_LAYER = "clip score"
"""What `Features` has the CLIP scores of images under, `[images, 1]`."""


@dataclass(frozen=True)
class ImageSource:
    """Images by number, made or read when asked for.

    Attributes:
        name: for messages and tables.
        size: height and width in pixels.
        count: how many there are.
        read: numbers -> uint8 images.
        protocol: how they came about, for results.json.
        notes: what a user is to know of them, a line each: see `told_of`.
        prompts: that they are of; None where that is not known.
    """

    name: str
    size: int
    count: int
    read: Callable[[Sequence[int]], UInt8[Tensor, "images channels height width"]]
    protocol: Mapping[str, Any]
    notes: Sequence[str] = ()
    prompts: Prompts | None = None


def from_images(name: str, images: Images) -> ImageSource:
    """Images of a data set or folder."""
    protocol = {"images": images.name, "num_images": len(images), "resize": f"shorter side to {images.resolution}"}
    return ImageSource(name, images.resolution, len(images), images.pixels, protocol, told_of(images))


def from_folder(folder: str) -> ImageSource:
    """All images under a folder, which must be of one size, as they are.

    Raises:
        ValueError: for no images, or one of another size than the first.
    """
    images, test = load_images(folder, resolution=1, channels=3, held_out_fraction=0)
    first = images.read(0)
    _check_square(folder, first.height, first.width)
    images = replace(images, resolution=first.width)
    if len(test):
        raise ValueError(f"{folder} holds a training and a test split; name the folder of one of them")

    def read(indices: Sequence[int]) -> Tensor:
        for index in indices:
            size = images.read(index).size
            if size != first.size:
                raise ValueError(
                    f"image {index} in {folder} is {size[0]} x {size[1]} pixels, unlike the first one, "
                    f"{first.width} x {first.height}; resize them alike before scoring"
                )
        return images.pixels(indices)

    return ImageSource(folder, first.width, len(images), read, _read_protocol(folder, len(images)), told_of(images))


def from_array(path: str) -> ImageSource:
    """The images of an .npz file: its entry `arr_0` (or its only one), uint8, `[images, H, W, C]`.

    Raises:
        ValueError: for a file that holds no such array.
    """
    try:
        check_file(Path(path))
        with np.load(path, allow_pickle=False) as file:
            name = "arr_0" if "arr_0" in file.files else file.files[0]
            pixels = file[name]
    except Exception as error:  # a zip file's, numpy's and the system's errors
        raise ValueError(f"cannot read images from {path}: {reason(error)}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not len(pixels):
        raise ValueError(
            f"{path} holds {pixels.dtype} {list(pixels.shape)}; images are uint8 [images, height, width, 1 or 3]"
        )
    _check_square(path, *pixels.shape[1:3])

    def read(indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(pixels[list(indices)]).permute(0, 3, 1, 2).contiguous()

    return ImageSource(path, pixels.shape[1], len(pixels), read, _read_protocol(path, len(pixels)))


def open_images(place: str) -> ImageSource | None:
    """The images in a folder or an .npz; None for anything else, such as a pipeline, which makes them.

    Raises:
        ValueError: see `from_array` and `from_folder`.
    """
    path = Path(place)
    if path.suffix == ".npz":
        return from_array(place)
    return from_folder(place) if path.is_dir() and not any((path / file).exists() for file in OF_MODELS) else None


def check_comparable(sources: Mapping[str, ImageSource]) -> int:
    """The one size in pixels that the images of all sources have; says so where samplers differ.

    Raises:
        ValueError: for unlike sizes.
    """
    sizes = {name: source.size for name, source in sources.items()}
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{name} {size} x {size}" for name, size in sizes.items())
        raise ValueError(f"images of unlike sizes cannot be compared to one reference: {described}")
    samplers = {source.protocol["sampler"] for source in sources.values() if "sampler" in source.protocol}
    if len(samplers) > 1 and PartialState().is_main_process:
        logger.warning("note: sampled by %s; --sampler makes them comparable", " and ".join(sorted(samplers)))
    return next(iter(sizes.values()))


def _check_square(name: str, height: int, width: int) -> None:
    if height != width:
        raise ValueError(f"the images in {name} are {height} x {width} pixels; square ones are scored")


def protocol_file(images: Path) -> Path:
    """Where the protocol of images on disk stands: in their folder, or beside their .npz."""
    return images.with_name(images.name + ".protocol.json") if images.suffix == ".npz" else images / "protocol.json"


def _read_protocol(images: str, count: int) -> dict[str, Any]:
    """What is known of images on disk, with what the command that made them wrote down."""
    protocol: dict[str, Any] = {"images": images, "num_images": count, "resize": "none"}
    with contextlib.suppress(OSError, ValueError):
        protocol["made_by"] = json.loads(protocol_file(Path(images)).read_text())
    return protocol


@dataclass(frozen=True)
class Features:
    """What one pass over a source gives.

    Attributes:
        layers: layer -> `[images, features]` float32, on the CPU.
        content_hash: SHA-256 over the hashes of the images' pixels, in order.
        shown: the first images.
    """

    layers: dict[str, Float[Tensor, "images features"]]
    content_hash: str
    shown: UInt8[Tensor, "shown channels height width"]


def blocks_of_process(count: int, batch_size: int, process_index: int = 0, num_processes: int = 1) -> Iterator[range]:
    """The batches that one of several processes works on.

    Batches hold the same images however many processes there are, so that each image is computed in the same company.

    >>> [list(block) for block in blocks_of_process(7, 2, process_index=1, num_processes=2)]
    [[2, 3], [6]]
    """
    if count < 0 or batch_size < 1:
        raise ValueError(f"count must be at least 0 and batch_size at least 1, not {count} and {batch_size}")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"there is no process {process_index} of {num_processes}")
    firsts = range(process_index * batch_size, count, num_processes * batch_size)
    return (range(first, min(first + batch_size, count)) for first in firsts)


def own_blocks(count: int, batch_size: int, title: str = "") -> Iterator[range]:
    """The batches of this process; with a title the main one shows how far all are."""
    state = PartialState()
    with tqdm(
        total=count,
        desc=title,
        unit="image",
        disable=not title or not state.is_main_process,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
    ) as bar:
        for block in blocks_of_process(count, batch_size, state.process_index, state.num_processes):
            yield block
            bar.update(min(len(block) * state.num_processes, count - bar.n))


def content_hash(source: ImageSource, batch_size: int = 500) -> str:
    """The hash that `extract_features` gives, without a network."""
    return extract_features(source, None, batch_size=batch_size, num_shown=1).content_hash


def extract_features(
    source: ImageSource,
    extractor: Extractor | None,
    *,
    clip: Clip | None = None,
    batch_size: int = 64,
    num_shown: int = 32,
    progress: str = "",
) -> Features:
    """Read every image once and keep its features; all processes share the work and get the whole.

    Args:
        source: of the images.
        extractor: None for the hash and the first images alone.
        clip: scores the images of a source with prompts, as the layer `CLIP_LAYER`.
        batch_size: images at a time, per process.
        num_shown: first images to keep.
        progress: title of the progress bar; none if empty.
    """
    state = PartialState()
    parts: list[dict[str, Tensor]] = []
    numbers: list[int] = []
    shown: list[tuple[int, Tensor]] = []
    problem = None
    try:
        for block in own_blocks(source.count, batch_size, progress):
            images = source.read(block)
            parts.append(_rows(images, extractor) | _clip_rows(images, source, block, clip))
            numbers += block
            shown += [pair for pair in zip(block, images, strict=True) if pair[0] < num_shown]
    except ValueError as error:
        problem = error
    if state.num_processes > 1:  # all end alike: one that is left alone would wait for the others
        told = [None if problem is None else str(problem)]
        problem = next((ValueError(words) for words in gather_object(told) if words is not None), None)
    if problem is not None:
        raise problem
    if not parts:  # fewer batches than processes: the widths must be known here too
        images = source.read(range(1))
        found = _rows(images, extractor) | _clip_rows(images, source, range(1), clip)
        parts = [{name: rows[:0] for name, rows in found.items()}]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if state.num_processes > 1:
        rows = _gather(rows, numbers, source.count, state.device)
        shown = sorted(gather_object(shown), key=lambda pair: pair[0])
    shape = f"{list(shown[0][1].shape[1:])}".encode()
    whole = hashlib.sha256(shape + rows.pop("digest").numpy().tobytes()).hexdigest()
    return Features(rows, whole, torch.stack([image for _, image in shown]))


def _rows(images: Tensor, extractor: Extractor | None) -> dict[str, Tensor]:
    """What is kept of a batch, a row per image: the hash of its pixels, and its features by layer."""
    images = images.expand(-1, 3, -1, -1).contiguous()  # grey or not: the same image is the same everywhere
    digests = [list(hashlib.sha256(image.numpy()).digest()) for image in images]
    features = extractor(images) if extractor else {}
    for name, rows in features.items():
        if not rows.isfinite().all():
            raise ValueError(f"features of {extractor.name} are not finite (layer {name}): its weights are broken")
    return {"digest": torch.tensor(digests, dtype=torch.uint8), **features}


def _clip_rows(images: Tensor, source: ImageSource, numbers: Sequence[int], clip: Clip | None) -> dict[str, Tensor]:
    if clip is None or source.prompts is None:
        return {}
    return {CLIP_LAYER: clip(images, source.prompts.of(numbers))[:, None]}


def _gather(rows: dict[str, Tensor], numbers: list[int], count: int, device: torch.device) -> dict[str, Tensor]:
    """The rows of all processes in the order of the images; some processes have fewer than others."""
    held = {"order": torch.tensor(numbers, dtype=torch.long)[:, None], **rows}
    padded = {
        name: pad_across_processes(value.to(device), pad_index=count if name == "order" else 0)
        for name, value in held.items()
    }
    gathered = {name: value.cpu() for name, value in gather(padded).items()}
    order = gathered.pop("order")[:, 0].argsort()[:count]  # what is padded comes last
    return {name: value[order] for name, value in gathered.items()}
