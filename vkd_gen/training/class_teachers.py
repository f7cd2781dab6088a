"""Teachers that make images of classes out of latents: `DiTPipeline`, found, checked and loaded."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, ModelMixin, SchedulerMixin

from vkd_gen.families.blocks import check_blocks
from vkd_gen.families.classes import complete_config
from vkd_gen.hub import hub_folder
from vkd_gen.limits import check_sizes
from vkd_gen.loading import load_model, model_without_weights, read_json
from vkd_gen.models import Model, SharedParts
from vkd_gen.pipelines import load_pipeline
from vkd_gen.schedule import flow_scheduler, is_flow
from vkd_gen.text import reason
from vkd_gen.training.text_teachers import pipeline_index
from vkd_gen.training.unets import training_schedule

CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
STABLE_DIFFUSIONS_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""Configuration of the VAE that published teachers have."""


def load_class_teacher(source: str, *, without_weights: bool) -> tuple[Model, str] | None:
    """The teacher that a name is of, if that is a `DiTPipeline`, and where its schedule is from.

    Args:
        source: folder of a pipeline or a run, or hub id.
        without_weights: read configurations alone, and leave the networks on the meta device.

    Returns:
        None for all else.

    Raises:
        ValueError: in one line, for a pipeline whose parts are not there or do not fit together.
    """
    found = pipeline_index(source)
    if found is None or found[1].get("_class_name") != DiTPipeline.__name__:
        return None
    folder = found[0] if Path(source).is_dir() else hub_folder(source, CONFIGS)
    config, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    _check_fit(config, vae, source)
    noise_scheduler = _noise_scheduler(scheduler, source)
    if without_weights:
        kinds = {"transformer": DiTTransformer2DModel, "vae": AutoencoderKL}
        try:
            networks = [model_without_weights(kind, folder / part) for part, kind in kinds.items()]
        except Exception as error:  # diffusers checks little, and what it does not check fails in all kinds of ways
            raise ValueError(f"cannot load the pipeline {source}: {reason(error)}") from error
        return Model(DiTPipeline(*networks, noise_scheduler), noise_scheduler), source
    pipeline = load_pipeline(source)
    if not hasattr(pipeline.scheduler, "scale_model_input"):
        raise ValueError(
            f"{source}: its DiTPipeline cannot sample by {type(pipeline.scheduler).__name__}; give it a "
            "DPMSolverMultistepScheduler of flow_prediction with use_flow_sigmas, and its shift as flow_shift"
        )
    return Model(pipeline, noise_scheduler, SharedParts(partial(_load_vae, source))), source


def class_teacher_of(network: ModelMixin, noise_scheduler: SchedulerMixin) -> Model:
    """A denoiser without weights in the pipeline that published ones have: for one that comes without a pipeline."""
    with torch.device("meta"):
        vae = AutoencoderKL(**STABLE_DIFFUSIONS_VAE)
    return Model(DiTPipeline(network, vae, DDIMScheduler.from_config(noise_scheduler.config)), noise_scheduler)


def _load_vae(source: str, _names: Sequence[str]) -> DiTPipeline:
    """A pipeline of the VAE alone, which is all that leaves memory."""
    found = pipeline_index(source)
    assert found is not None
    folder = found[0] / "vae"
    try:
        return DiTPipeline(transformer=None, vae=load_model(AutoencoderKL, folder), scheduler=None)
    except Exception as error:  # what changed since it was loaded before fails in all kinds of ways
        raise ValueError(f"cannot load the VAE in {folder} again: {reason(error)}") from error


def _check_fit(config: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
    check_sizes(config, f"{source}/transformer", "DiT")
    complete = complete_config({**config, "_class_name": DiTTransformer2DModel.__name__})
    try:
        check_blocks(complete)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} holds no DiT that can be run: {reason(error)}") from error
    channels = vae.get("latent_channels", 4)
    if channels != complete["in_channels"]:
        raise ValueError(
            f"{source}: its DiT takes latents of {complete['in_channels']} channels, and its VAE makes such of "
            f"{channels}: they are not of one model"
        )


def _noise_scheduler(config: Mapping[str, Any], source: str) -> SchedulerMixin:
    """The schedule that the teacher was trained on, from the configuration of its sampler."""
    if not is_flow(config):
        return training_schedule(config, source)
    check_sizes(config, source, "schedule")
    try:
        return flow_scheduler(config, str(config.get("_class_name", "scheduler")))
    except (TypeError, ZeroDivisionError) as error:  # diffusers checks little
        raise ValueError(f"{source} holds no schedule that diffusers can build: {reason(error)}") from error
