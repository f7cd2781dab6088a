"""The images of a training recipe, as its user chose them."""

from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from vkd_gen.data.cache import cache_images
from vkd_gen.data.images import Images, ImageSpec, told_of
from vkd_gen.data.sources import load_images
from vkd_gen.data.streaming import ImageStream, stream_images
from vkd_gen.training.options import DataOptions


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


def load_data(
    options: DataOptions, *, resolution: int, channels: int, with_labels: bool, num_classes: int | None = None
) -> Loaded:
    """The images that a recipe's user chose; see `ImageSpec` for what the model decides of them.

    Raises:
        ValueError: in one line, see `load_images` and `stream_images`.
    """
    spec = ImageSpec(
        resolution=resolution,
        channels=channels,
        image_column=options.image_column,
        with_labels=with_labels,
        label_column=options.label_column,
        num_classes=num_classes,
        on_bad_image=options.on_bad_image,
    )
    if options.streaming:
        sizes = {"head_size": options.stream_head, "buffer_size": options.stream_buffer}
        return Loaded(*stream_images(options.dataset, spec, **sizes))
    return Loaded(None, *load_images(options.dataset, spec))


def prepare_data(loaded: Loaded, accelerator: Accelerator, options: DataOptions) -> Loaded:
    """Say what was loaded, and keep the training images decoded if that was asked for; called by all processes.

    Raises:
        ValueError: in one line, see `cache_images`.
    """
    stream, train, held_out = loaded
    rest = f"; the head of a stream of {stream.num_shards:,} shards" if stream else ""
    accelerator.print(f"{train.name}: {len(train):,} images to train on, {len(held_out):,} held out{rest}")
    for line in told_of(train, held_out):
        accelerator.print(line)
    return loaded._replace(train=cache_images(train, Path(options.image_cache))) if options.image_cache else loaded
