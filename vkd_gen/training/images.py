"""The images of a training recipe, as its user chose them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vkd_gen.data.cache import cache_images
from vkd_gen.data.draws import Draws
from vkd_gen.data.images import Images, ImageSpec, evenly_spaced, told_of
from vkd_gen.data.samples import Pixels, Samples
from vkd_gen.data.sources import load_images
from vkd_gen.data.streaming import ImageStream, stream_images
from vkd_gen.schedule import Schedule
from vkd_gen.training.options import DataOptions


class Data(NamedTuple):
    """Images of a run.

    Attributes:
        stream: what is read from front to back, if it is; the others are its head then.
        train: to train on.
        held_out: never to train on.
        reference: what samples are compared to: `train`, before some of it is chosen.
        samples: of `train`, for the denoiser.
        held_out_samples: of `held_out`.
    """

    stream: ImageStream | None
    train: Images
    held_out: Images
    reference: Images
    samples: Samples
    held_out_samples: Samples

    def draws(self, schedule: Schedule, *, seed: int, batch_size: int, both_branches: bool = False) -> Draws:
        """What the run draws of them, noise and times included; see `Draws`."""
        return Draws(
            self.samples,
            schedule,
            seed=seed,
            stream=self.stream,
            batch_size=batch_size,
            both_branches=both_branches,
        )


def load_data(
    options: DataOptions,
    source: str,
    form: tuple[int, int],
    num_classes: int | None,
    say: Callable[[str], None],
    *,
    with_captions: bool = False,
) -> Data:
    """The images that a recipe's user chose, kept decoded if that was asked for; called by all processes.

    Args:
        options: of the recipe.
        source: `options.dataset`, found.
        form: side in pixels and channels to bring the images to.
        num_classes: of the model, 0 for as many as the data have; None reads no classes.
        say: prints a line.
        with_captions: the model takes prompts.

    Raises:
        ValueError: in one line, see `load_images`, `stream_images` and `cache_images`.
    """
    spec = ImageSpec(
        resolution=form[0],
        channels=form[1],
        image_column=options.image_column,
        with_labels=num_classes is not None,
        label_column=options.label_column,
        num_classes=num_classes or None,
        on_bad_image=options.on_bad_image,
        with_captions=with_captions,
        caption_column=options.caption_column,
        on_missing_caption=options.on_missing_caption,
    )
    stream = None
    if options.streaming:
        sizes = {"head_size": options.stream_head, "buffer_size": options.stream_buffer}
        stream, train, held_out = stream_images(source, spec, **sizes)
    else:
        train, held_out = load_images(source, spec)
    rest = f"; the head of a stream of {stream.num_shards:,} shards" if stream else ""
    say(f"{train.name}: {len(train):,} images to train on, {len(held_out):,} held out{rest}")
    for line in told_of(train, held_out):
        say(line)
    reference = train = cache_images(train, Path(options.image_cache)) if options.image_cache else train
    if options.max_train_samples is not None:
        train = evenly_spaced(reference, options.max_train_samples)
        say(f"training on {len(train):,} of them")
    pixels = Pixels(train, random_flip=options.random_flip, guidance_dropout=options.guidance_dropout)
    return Data(stream, train, held_out, reference, pixels, Pixels(held_out))
