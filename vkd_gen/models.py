"""A model as what makes images with it: a diffusers pipeline with a denoiser that can be exchanged.

B batch, C channels, H height, W width; latents and pixels alike are samples `[B, C, H, W]`.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from jaxtyping import UInt8
from torch import Tensor, nn

from vkd_gen.choices import Precision
from vkd_gen.encoders import ENCODERS
from vkd_gen.families import family_of
from vkd_gen.files import whole_file, whole_folder
from vkd_gen.pipelines import (
    ClassConditionalDDIMPipeline,
    num_classes_of,
    stock_pipeline,
    usable_guidance,
    usable_steps,
)
from vkd_gen.provenance import only_warns, plain_tensors
from vkd_gen.schedule import Crossing, PredictionType, Schedule, flow_samplers, is_flow
from vkd_gen.text import reason
from vkd_gen.text_pipelines import save_pipeline


class Model:
    """A diffusers pipeline whose denoiser, its part `unet` or `transformer`, can be exchanged.

    A student is its teacher's pipeline around another network, and is sampled, scored and saved as its teacher is.

    Args:
        pipeline: whole, on the device to compute on.
        noise_scheduler: the schedule that the denoiser is trained on; by default that of the pipeline's own sampler.
        encoders: where VAE, text encoders and tokenizers come from again, once `release` let go of them; None keeps
            them.

    Attributes:
        prompts: that images are of where none are given; seed s takes number s modulo how many there are.
        guidance_scale: of images where none is given; None for the pipeline's default.
        factor: pixels by which an image is divided, per side, to become a sample: 1 where samples are pixels.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        noise_scheduler: SchedulerMixin | None = None,
        encoders: "SharedParts | None" = None,
    ):
        self.pipeline, self._encoders = pipeline, encoders
        self.noise_scheduler = pipeline.scheduler if noise_scheduler is None else noise_scheduler
        self.slot = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
        self.prompts: Sequence[str] = ()
        self.guidance_scale: float | None = None
        self._released: tuple[str, ...] = ()
        self.factor = 1 if self._decoder is None else 2 ** (len(self._decoder.config.block_out_channels) - 1)

    @classmethod
    def of_unet(cls, unet: ModelMixin, noise_scheduler: SchedulerMixin) -> "Model":
        """A UNet in the stock pipeline that samples it by DDIM: for one that comes without a pipeline."""
        return cls(stock_pipeline(unet, noise_scheduler), noise_scheduler)

    @property
    def network(self) -> ModelMixin:
        """The denoiser."""
        return getattr(self.pipeline, self.slot)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Noise by timestep, and what the denoiser predicts; on the CPU."""
        return Schedule.of(self.noise_scheduler)

    @property
    def num_classes(self) -> int:
        """Number of classes that images can be asked of; 0 for a model that takes no labels."""
        if isinstance(self.pipeline, ClassConditionalDDIMPipeline):
            return num_classes_of(self.network) or 0
        config = self.network.config
        embedded = config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0
        return embedded if self._takes("class_labels") else 0

    @property
    def takes_prompts(self) -> bool:
        """Whether images are asked of the pipeline by prompts."""
        return self._takes("prompt")

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        side = self.network.config.sample_size
        side = side if isinstance(side, int) else side[0]
        return side * self.factor

    @property
    def image_channels(self) -> int:
        """Of the images: 1 (grey) or 3 (RGB)."""
        return self.network.config.in_channels if self.factor == 1 else 3

    @property
    def _decoder(self) -> ModelMixin | None:
        """What makes pixels of latents; None where the samples are pixels."""
        return getattr(self.pipeline, "vae", None) or getattr(self.pipeline, "vqvae", None)

    def around(self, network: ModelMixin, prediction_type: PredictionType | None = None) -> "Model":
        """The same pipeline around another denoiser, which predicts what this one does unless told otherwise.

        One of flow matching, of another that is none, has a sampler for that, and its draws noise that both can have.
        """
        becomes_flow = prediction_type == "flow_prediction" and not is_flow(self.noise_scheduler.config)
        changed = {} if prediction_type is None else {"prediction_type": prediction_type}
        sampler, noise_scheduler = (
            type(scheduler).from_config(scheduler.config, **changed)
            for scheduler in (self.pipeline.scheduler, self.noise_scheduler)
        )
        if becomes_flow:
            sampler, noise_scheduler = flow_samplers(self.noise_scheduler.config.num_train_timesteps)
        taken = inspect.signature(type(self.pipeline).__init__).parameters
        plain = {name: value for name, value in self.pipeline.config.items() if name in taken}
        plain |= {"add_watermarker": False} if "add_watermarker" in taken else {}  # which no config tells
        parts = {**self.pipeline.components, self.slot: network, "scheduler": sampler}
        pipeline = type(self.pipeline)(**{**plain, **parts})
        pipeline.register_to_config(**{name: plain[name] for name in plain.keys() & {"id2label"}})  # which it forgets
        pipeline.set_progress_bar_config(disable=True)
        model = Model(pipeline, noise_scheduler, self._encoders)
        model.prompts, model.guidance_scale = self.prompts, self.guidance_scale
        if becomes_flow and (crossing := Crossing.between(model.schedule, self.schedule)) is not None:
            model.schedule = replace(model.schedule, first=crossing.first, last=crossing.last)
        return model

    def release(self) -> None:
        """Let go of what encodes images and prompts, and decodes; `whole` brings it back."""
        if self._encoders is not None:
            self._released = tuple(name for name in ENCODERS if getattr(self.pipeline, name, None) is not None)
            self.pipeline.register_modules(**dict.fromkeys(self._released))

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The pipeline with all of its parts, where the denoiser is and in its precision, while the context lasts."""
        if not self._released:
            yield
            return
        assert self._encoders is not None
        loaded = self._encoders.load(self._released)
        parts = {name: getattr(loaded, name) for name in self._released}
        for part in parts.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, self.network.device, self.network.dtype)  # past diffusers' warning about casting
        self.pipeline.register_modules(**parts)
        self._released = ()
        try:
            yield
        finally:
            self.release()

    def predict(self, noisy_sample: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any] | None = None) -> Tensor:
        """The denoiser's prediction, `[B, C, H, W]` float32, computed in the denoiser's own precision.

        Timesteps are indices of the schedule, `[B]`; conditioning holds further arguments of the denoiser.
        """
        return self.predict_at(noisy_sample, self.schedule.told(timesteps), conditioning)

    def predict_at(self, noisy_sample: Tensor, times: Tensor, conditioning: Mapping[str, Any] | None = None) -> Tensor:
        """`predict` at times as the denoiser is told them, `[B]`, which may lie between the schedule's."""
        sample = noisy_sample.to(self.network.dtype)
        return family_of(self.network).call(self.network, sample, times, conditioning).float()

    @torch.no_grad()
    def images(
        self,
        seeds: Sequence[int],
        *,
        conditioning: Mapping[str, Sequence[Any]] | None = None,
        guidance_scale: float | None = None,
        size: int | None = None,
        num_inference_steps: int = 50,
        batch_size: int = 128,
        precision: Precision = "no",
        name: str = "the model",
    ) -> UInt8[Tensor, "images channels height width"]:
        """One image per seed, on the CPU.

        An image depends on its seed and conditioning alone, up to rounding in the network: each has a generator of its
        own, on the CPU, whatever the device. The denoiser is sampled in eval mode; its mode is restored.

        Args:
            seeds: below 2^64.
            conditioning: argument of the pipeline -> a value per image, such as `class_labels`, or `prompt` and
                `negative_prompt`. Class labels are by default each image's seed modulo the number of classes:
                consecutive seeds go through the classes; prompts likewise go through `prompts`.
            guidance_scale: None keeps the pipeline's default.
            size: side of the images in pixels, for pipelines that take height and width; None keeps `image_size`.
            num_inference_steps: network evaluations per image; at most the schedule's.
            batch_size: images at a time.
            precision: of the network, by autocast; the sampler works in the pipeline's dtype.
            name: of the model, for messages.

        Raises:
            ValueError: for a count below 1, conditioning that does not fit, and, naming the seeds, for images of which
                a pixel, or a prediction on the way, is not finite.
        """
        if not seeds or min(num_inference_steps, batch_size) < 1:
            raise ValueError("sampling needs at least one seed, one inference step and one image at a time")
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        guidance_scale = usable_guidance(self.pipeline, self.num_classes, guidance_scale)
        conditioning = self._conditioning(seeds, dict(conditioning or {}), guidance_scale)
        arguments: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        arguments |= self.check_size(size)
        arguments["num_inference_steps"] = usable_steps(self.pipeline.scheduler, num_inference_steps)
        batches = []
        with in_eval_mode(self.network), self.whole():
            for first in range(0, len(seeds), batch_size):
                chosen = slice(first, first + batch_size)
                own = {key: list(values[chosen]) for key, values in conditioning.items()}
                batches.append(self._batch(seeds[chosen], {**arguments, **own}, precision, name))
        return torch.cat(batches)

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.pipeline.__call__).parameters

    def _conditioning(
        self, seeds: Sequence[int], given: dict[str, Sequence[Any]], guidance_scale: float | None
    ) -> dict[str, Sequence[Any]]:
        """What the pipeline is told of each image, once it is known to take it."""
        given = {**self._by_seed(seeds, given), **given}
        if self.takes_prompts:
            if not all(isinstance(prompt, str) for prompt in given.get("prompt", [None])):
                raise ValueError(
                    f"a {type(self.pipeline).__name__} makes images of prompts: give a text for each image"
                )
            if guidance_scale is not None and not 1 <= guidance_scale < float("inf"):
                raise ValueError(f"guidance_scale must be at least 1 and finite, not {guidance_scale}")
        elif not self.num_classes and ("class_labels" in given or guidance_scale is not None):
            raise ValueError("the model is unconditional: it takes neither class labels nor guidance")
        for key, values in given.items():
            if not self._takes(key):
                raise ValueError(f"a {type(self.pipeline).__name__} takes no {key}")
            if len(values) != len(seeds):
                raise ValueError(f"{len(seeds)} seeds need as many {key.replace('_', ' ')}, not {len(values)}")
        return given

    def _by_seed(self, seeds: Sequence[int], given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """What images are of where nothing else is said."""
        if classes := self.num_classes:
            return {"class_labels": [seed % classes for seed in seeds]}
        if self.prompts and not {"prompt", "prompt_embeds"} & given.keys():
            return {"prompt": [self.prompts[seed % len(self.prompts)] for seed in seeds]}
        return {}

    def check_size(self, size: int | None) -> dict[str, int]:
        """Height and width as the pipeline takes them.

        Raises:
            ValueError: for a side in pixels that it cannot make images of.
        """
        if size is None or (size == self.image_size and not self._takes("height")):
            return {}
        if not self._takes("height"):
            raise ValueError(f"the model makes images of {self.image_size} pixels, and of no other size")
        if size < 1 or size % self.factor:
            raise ValueError(f"the size of images must be a multiple of {self.factor} pixels, not {size}")
        return {"height": size, "width": size}

    def _batch(self, seeds: Sequence[int], arguments: dict[str, Any], precision: Precision, name: str) -> Tensor:
        if self._takes("batch_size"):
            arguments["batch_size"] = len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        with (
            torch.autocast(self.pipeline.device.type, dtype=dtype, enabled=dtype is not None),
            _finite_outputs(self.network, len(seeds)) as predictions,
            _finite_outputs(getattr(self._decoder, "decoder", None), len(seeds)) as decoded,
        ):
            try:
                made = self.pipeline(**arguments, generator=generators, output_type="np").images
            except (TypeError, AttributeError, LookupError, RuntimeError) as error:  # diffusers checks little
                if "memory" in str(error):
                    raise
                kinds = [type(part).__name__ for part in (self.pipeline, self.network, self.pipeline.scheduler)]
                raise ValueError(
                    f"{name} cannot be sampled: in its {kinds[0]}, {kinds[1]} and {kinds[2]} do not fit together "
                    f"({reason(error)})"
                ) from error
        images = torch.from_numpy(made)  # [images, H, W, C] in [0, 1]
        # [evaluations + 1, images]; as uint8 what is not finite would be black, and clipping hides what is infinite.
        at_end = torch.stack([found.cpu() for found in (*decoded, images.isfinite().flatten(1).all(1))]).all(0)
        is_finite = torch.stack([*(found.cpu() for found in predictions), at_end])
        if not is_finite.all():
            raise ValueError(_describe_broken(name, self.pipeline, is_finite, seeds, precision))
        return images.permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)

    def save(self, folder: Path, card: str, variant: str | None = None) -> None:
        """Save a pipeline folder with its model card; it appears under its name once it is complete.

        With the variant `fp16` it also has the weights in half precision; see `save_pipeline`.

        `DiffusionPipeline.from_pretrained` loads it without this package; a class-conditional UNet's is loaded by
        `ClassConditionalDDIMPipeline.from_pretrained`, and its UNet alone by diffusers' own `UNet2DModel`.
        """
        with self.whole(), whole_folder(folder) as temporary:
            save_pipeline(self.pipeline, temporary, variant)
            with only_warns(f"the model card of {folder}", "the weights are saved"):
                save_card(temporary, card)


class SharedParts:
    """What loads parts of a pipeline again, one time for all models that have them at the same time.

    Args:
        load: names of parts -> a pipeline that has them.
    """

    def __init__(self, load: Callable[[Sequence[str]], DiffusionPipeline]):
        self._load = load
        self._last: Callable[[], DiffusionPipeline | None] = lambda: None

    def load(self, names: Sequence[str]) -> DiffusionPipeline:
        """A pipeline with these parts: the last one, where it is still in use."""
        pipeline = self._last()
        if pipeline is None or any(getattr(pipeline, name, None) is None for name in names):
            pipeline = self._load(names)
            self._last = weakref.ref(pipeline)
        return pipeline


def save_card(folder: Path, card: str) -> None:
    """Write, or replace, the model card in a pipeline's folder."""
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


@contextlib.contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """A network in eval mode for as long as the context lasts."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@contextlib.contextmanager
def _finite_outputs(network: nn.Module | None, num_images: int) -> Iterator[list[Tensor]]:
    """A list that gets, at each evaluation of a network, of which images the output is finite: `[images]`, bool."""
    found: list[Tensor] = []
    if network is None:
        yield found
        return

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        prediction = output if isinstance(output, Tensor) else output[0]
        rows = prediction.isfinite().flatten(1).all(1)
        if len(rows) % num_images:  # a decoder that is given one image after the other
            rows = rows.all().expand(num_images)
        # With guidance an image has several rows, a whole batch after the other.
        found.append(rows.view(-1, num_images).all(0))

    hook = network.register_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def _describe_broken(
    name: str, pipeline: DiffusionPipeline, is_finite: Tensor, seeds: Sequence[int], precision: Precision
) -> str:
    broken = [seed for seed, right in zip(seeds, is_finite.all(0).tolist(), strict=True) if not right]
    shown = ", ".join(map(str, broken[:8])) + ", ..." * (len(broken) > 8)
    first = int((~is_finite).any(1).nonzero()[0])
    where = f"from evaluation {first + 1} of {len(is_finite) - 1} on" if first < len(is_finite) - 1 else "at the end"
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    values = [entry for network in networks for entry in plain_tensors(network.state_dict()).items()]
    weights = [key for key, value in values if not value.isfinite().all()]
    if weights:
        cause = f"{len(weights)} of its weights hold NaN or infinity, such as {weights[0]}"
    elif precision != "no":
        cause = f"try another precision than {precision}"
    else:
        cause = "its weights are finite: they do not fit its schedule, or overflow"
    return (
        f"{len(broken)} of {len(seeds)} samples of {name} are not finite, {where} (seeds {shown}): {cause}; no images "
        "are made of them"
    )
