"""Images to score that a model makes."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from vkd_gen.evaluation.options import SamplingOptions
from vkd_gen.evaluation.prompts import Prompts
from vkd_gen.evaluation.sources import ImageSource
from vkd_gen.models import Model
from vkd_gen.pipelines import usable_steps
from vkd_gen.provenance import hash_tensors

logger = logging.getLogger(__name__)

SCHEDULER_ENTRIES = ("prediction_type", "beta_schedule", "timestep_spacing", "clip_sample", "steps_offset")
"""Entries of a scheduler that decide samples, beside its class and the number of steps."""


def from_model(
    name: str,
    model: Model,
    options: SamplingOptions,
    *,
    count: int,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    prompts: Prompts | None = None,
) -> ImageSource:
    """Images that a model makes, number i from seed `options.seed + i`, on the device where it lies when asked.

    Args:
        name: for messages and tables.
        model: that makes them.
        options: how.
        count: how many.
        num_inference_steps: network evaluations per image.
        guidance_scale: None keeps the pipeline's default.
        prompts: of a text pipeline: image i is of prompt i.

    Raises:
        ValueError: in one line, for a text pipeline without prompts, and what the pipeline does not take.
    """
    pipeline, classes, first = model.pipeline, model.num_classes, options.seed
    if guidance_scale is not None and not (classes or model.takes_prompts):
        raise ValueError(f"{name} is unconditional: it takes no guidance_scale")
    prompts = _prompts_for(name, model, options, prompts)
    steps = usable_steps(pipeline.scheduler, num_inference_steps)
    if num_inference_steps > steps:
        logger.warning("note: %s is sampled with %d steps: its schedule has no more", name, steps)

    def read(indices: Sequence[int]) -> Tensor:
        conditioning: dict[str, Sequence[str]] = {} if prompts is None else {"prompt": prompts.of(indices)}
        if options.negative_prompt is not None:
            conditioning["negative_prompt"] = [options.negative_prompt] * len(indices)
        images = model.images(
            [first + index for index in indices],
            conditioning=conditioning,
            batch_size=len(indices),
            guidance_scale=guidance_scale,
            size=options.resolution,
            num_inference_steps=steps,
            precision=options.mixed_precision,
            name=name,
        )
        return images if options.resize in (None, images.shape[-1]) else resized(images, options.resize)

    protocol: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "sampler": type(pipeline.scheduler).__name__,
        "num_inference_steps": steps,
        "num_images": count,
        "seeds": f"{first} to {first + count - 1}",
        "scheduler": {key: value for key, value in pipeline.scheduler.config.items() if key in SCHEDULER_ENTRIES},
        "weights_sha256": hash_pipeline(pipeline),
        "precision": options.mixed_precision,
    }
    side = options.resolution or model.image_size
    if classes:
        protocol |= {"class_labels": f"seed modulo {classes}"}
    if classes or prompts is not None:
        protocol |= {"guidance_scale": "default" if guidance_scale is None else guidance_scale}
    if prompts is not None:
        negative = {} if options.negative_prompt is None else {"negative_prompt": options.negative_prompt}
        protocol |= {**prompts.protocol(), **negative, "resolution": side}
    if options.resize not in (None, side):
        protocol |= {"resize": f"{side} to {options.resize}, PIL's antialiased bicubic"}
    return ImageSource(name, options.resize or side, count, read, protocol, prompts=prompts)


def _prompts_for(name: str, model: Model, options: SamplingOptions, prompts: Prompts | None) -> Prompts | None:
    """The prompts that a model takes: none for one that takes none; fails before anything is made."""
    if model.takes_prompts:
        if prompts is None:
            raise ValueError(f"{name} makes images of prompts: name some by --prompts, a file or a data set's captions")
        model.check_size(options.resolution)
        return prompts
    if prompts is not None or options.negative_prompt is not None:
        raise ValueError(f"{name} takes no prompts; leave --prompts and --negative_prompt out")
    model.check_size(options.resolution)
    return None


def resized(images: UInt8[Tensor, "images channels height width"], side: int) -> Tensor:
    """Images brought to another size, each by PIL's bicubic filter, which antialiases.

    Parmar et al., 2022 (arXiv 2104.11222), show what other filters do to FID.
    """
    pixels = [image.permute(1, 2, 0).squeeze(-1).contiguous().numpy() for image in images]
    small = [np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)) for values in pixels]
    return torch.from_numpy(np.stack(small)).view(len(images), side, side, -1).permute(0, 3, 1, 2).contiguous()


def hash_pipeline(pipeline: DiffusionPipeline) -> str:
    """SHA-256 over the weights of all of a pipeline's networks, hexadecimal."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts = [f"{name} {hash_tensors(network.state_dict())}" for name, network in sorted(networks.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
