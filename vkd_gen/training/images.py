"""The images of a training recipe: what its user chooses, and how they are had."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from accelerate import Accelerator

from vkd_gen.data import Images, OnBadImage, load_images
from vkd_gen.streaming import ImageStream, stream_images
from vkd_gen.training.image_cache import cache_images
from vkd_gen.training.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images to train on."""

    dataset: str = ""
    """`digits`, `mnist`, a folder of images, parquet or arrow files, or a data set's id on the hub."""
    image_column: str | None = None
    """Column of the images in a table; by default the only one that holds images."""
    on_bad_image: OnBadImage = "refuse"
    """An image that cannot be read: `refuse` stops, at once or when it is read; `skip` decodes all images once before
    the run, leaves bad ones out and names them in skipped_images.json."""
    label_column: str | None = None
    """Of a class-conditional model: column of the classes in a table; by default the only one of classes, else
    `label`."""
    guidance_dropout: float = 0.1
    """Of a class-conditional model: share of the images whose label is hidden, for classifier-free guidance."""
    streaming: bool = False
    """Read --dataset, parquet or arrow files or a data set of the hub, from front to back, epoch after epoch, instead
    of copying it to the disk. The run goes on only with as many processes and workers: see docs/SCALING.md."""
    stream_head: int = 6000
    """Images that are read before the run and kept in memory, encoded: a sixth of them, or as many of the test split,
    are held out; statistics, scores and what a student starts from are taken from the others."""
    stream_buffer: int = 4096
    """Images that each process, or each of its workers, shuffles among, encoded."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not 0 <= self.guidance_dropout < 1:
            raise ValueError(f"--guidance_dropout must be at least 0 and below 1, not {self.guidance_dropout}")
        for name in ("stream_head", "stream_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")


SharedDataOptions = Annotated[DataOptions, tyro.conf.OmitArgPrefixes]
"""The type of a recipe's field `data`: its flags carry no prefix."""


class Loaded(NamedTuple):
    """Images of a run.

    Attributes:
        stream: what is read from front to back, if it is; the others are its head then.
        train: to train on.
        held_out: never to train on.
    """

    stream: ImageStream | None
    train: Images
    held_out: Images


def check_data(data: DataOptions, training: TrainingOptions) -> None:
    """Check what can be checked of both without loading anything.

    Raises:
        ValueError: for a stream that is to be kept on the disk.
    """
    if data.streaming and training.image_cache:
        raise ValueError(
            "--image_cache keeps all images on the disk, which --streaming is to spare: leave one of them out"
        )


def load_data(
    options: DataOptions, *, resolution: int, channels: int, with_labels: bool, num_classes: int | None = None
) -> Loaded:
    """The images that a recipe's user chose.

    Args:
        options: of the recipe.
        resolution: height and width to bring the images to, pixels.
        channels: 1 (grey) or 3 (RGB).
        with_labels: read the classes too.
        num_classes: how many classes the model knows; by default as many as the source has.

    Raises:
        ValueError: in one line, see `load_images` and `stream_images`.
    """
    wanted: dict[str, Any] = {
        "resolution": resolution,
        "channels": channels,
        "image_column": options.image_column,
        "on_bad_image": options.on_bad_image,
        "with_labels": with_labels,
        "label_column": options.label_column,
        "num_classes": num_classes,
    }
    if options.streaming:
        wanted |= {"head_size": options.stream_head, "buffer_size": options.stream_buffer}
        return Loaded(*stream_images(options.dataset, **wanted))
    return Loaded(None, *load_images(options.dataset, **wanted))


def prepare_data(loaded: Loaded, accelerator: Accelerator, *, image_cache: str = "") -> Loaded:
    """Say what was loaded, and keep the training images decoded if that was asked for; called by all processes.

    Args:
        loaded: see `load_data`.
        accelerator: to speak through.
        image_cache: folder to keep them in; empty for none.

    Raises:
        ValueError: in one line, see `cache_images`.
    """
    stream, train, held_out = loaded
    rest = f"; the head of a stream of {stream.num_shards:,} shards" if stream else ""
    accelerator.print(f"{train.name}: {len(train):,} images to train on, {len(held_out):,} held out{rest}")
    skipped = [*train.skipped, *held_out.skipped]
    if skipped:
        accelerator.print(f"{len(skipped):,} images that cannot be read are left out, such as: {skipped[0]}")
    return loaded._replace(train=cache_images(train, Path(image_cache))) if image_cache else loaded
