"""The images of a training recipe, as its user chose them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState

from vkd_gen.choices import TimestepSampling
from vkd_gen.data.cache import cache_images
from vkd_gen.data.draws import Draws
from vkd_gen.data.encoded import How, encode
from vkd_gen.data.images import Images, ImageSpec, evenly_spaced, told_of
from vkd_gen.data.samples import Pixels, Samples
from vkd_gen.data.sources import load_images
from vkd_gen.data.streaming import ImageStream, stream_images
from vkd_gen.data.views import Views, aspect_buckets, bucketed_views
from vkd_gen.encoders import Encoders
from vkd_gen.files import cache_folder
from vkd_gen.models import Model
from vkd_gen.schedule import Schedule, TimestepDensity
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

    def draws(
        self,
        schedule: Schedule,
        *,
        seed: int,
        batch_size: int,
        group_size: int,
        both_branches: bool = False,
        sampling: TimestepSampling = "random",
    ) -> Draws:
        """What the run draws of them, noise and times included; see `Draws`.

        Args:
            schedule: see `Draws`.
            seed: see `Draws`.
            batch_size: see `Draws`.
            group_size: images of a forward pass, which are of one shape.
            both_branches: see `Draws`.
            sampling: how times are drawn.
        """
        return Draws(
            self.samples,
            schedule,
            seed=seed,
            stream=self.stream,
            batch_size=batch_size,
            group_size=group_size,
            both_branches=both_branches,
            stratified=sampling == "stratified",
            density=TimestepDensity(kind=sampling) if sampling in ("logit_normal", "mode") else None,
        )


NUM_HELD_OUT = 512
"""Held-out images with captions that are encoded, evenly spaced: as many as errors are measured on."""


def encode_data(
    data: Data, options: DataOptions, model: Model, *, seed: int, batch_size: int, say: Callable[[str], None]
) -> Data:
    """The data with samples as a model of latents takes them; called by all processes.

    Args:
        data: with captions, or with labels.
        options: of the recipe.
        model: whole; what it encodes with is on the CPU.
        seed: of the run.
        batch_size: images or prompts at a time.
        say: prints a line.

    Raises:
        ValueError: in one line, see `encode`.
    """
    encoders = Encoders(model.pipeline, precision=options.encoding_precision, tiling=options.vae_tiling)
    encoders.to(PartialState().device)
    folder = folder_of(options, "encodings")
    size = model.image_size
    views = Views([(size, size)], num_crops=options.num_crops, seed=seed)
    if options.aspect_buckets:
        factor = encoders.factor * 2 ** (len(model.network.config.block_out_channels) - 1)
        views = bucketed_views(data.train.sizes(), aspect_buckets(size, factor), num_crops=options.num_crops, seed=seed)
        say(f"aspect buckets, height x width: {views.describe()}")
    if data.stream is not None:
        say("images and captions of a stream are encoded as they are drawn: the encoders stay in memory")
    is_kept = options.cache and data.stream is None
    how = How(folder if is_kept else None, options.random_flip, options.guidance_dropout, batch_size)
    samples = encode(data.train, views, encoders, how, say)
    held_out = evenly_spaced(data.held_out, NUM_HELD_OUT)
    views = bucketed_views(held_out.sizes(), views.sizes) if options.aspect_buckets else Views(views.sizes)
    how = how._replace(random_flip=False, guidance_dropout=0.0)
    held_out_samples = encode(held_out, views, encoders, how, say)
    return data._replace(samples=samples, held_out_samples=held_out_samples)


def folder_of(options: DataOptions, name: str) -> Path:
    """Where what is made once of the data is kept: --cache_dir, or else a folder of that name in the cache."""
    return Path(options.cache_dir).expanduser() if options.cache_dir else cache_folder(name)


def load_data(
    options: DataOptions,
    source: str,
    form: tuple[int, int],
    num_classes: int | None,
    say: Callable[[str], None],
    *,
    with_captions: bool = False,
    of_latents: bool = False,
) -> Data:
    """The images that a recipe's user chose, kept decoded if that was asked for; called by all processes.

    Args:
        options: of the recipe.
        source: `options.dataset`, found.
        form: side in pixels and channels to bring the images to.
        num_classes: of the model, 0 for as many as the data have; None reads no classes.
        say: prints a line.
        with_captions: the model takes prompts.
        of_latents: the images are encoded for the model.

    Raises:
        ValueError: in one line, see `load_images`, `stream_images` and `cache_images`.
    """
    _check_meant(options, with_captions, of_latents)
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


OF_LATENTS = ("num_crops", "cache", "cache_dir", "encoding_precision", "vae_tiling")
"""Options that have no effect on images that are not encoded."""
OF_PROMPTS = ("aspect_buckets", "caption_column", "on_missing_caption", "num_teacher_images")
"""Options that have no effect on images without captions."""


def _check_meant(options: DataOptions, with_captions: bool, of_latents: bool) -> None:
    """Refuse what has no effect on the images of such a model."""
    if (with_captions or of_latents) and options.image_cache:
        raise ValueError(
            "--image_cache is for models of pixels; of a model of prompts --cache_dir keeps the encodings: leave it out"
        )
    for name in () if with_captions else OF_PROMPTS if of_latents else (*OF_LATENTS, *OF_PROMPTS):
        default = DataOptions.__dataclass_fields__[name].default
        if getattr(options, name) != default:
            raise ValueError(f"--{name} is for models of prompts, and this one takes none: leave it out")
