"""Images from a UNet or a diffusers pipeline, one seed per image; diffusers' own pipelines do the sampling.

C channels, H height, W width.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
    SchedulerMixin,
)
from jaxtyping import UInt8
from torch import Tensor

from vkd_gen.choices import Precision, Sampler
from vkd_gen.hub import hub_folder, load_parts, part_files, pipeline_class, read_json
from vkd_gen.pipelines import ClassConditionalDDIMPipeline, num_classes_of
from vkd_gen.provenance import split_revision


def stock_pipeline(unet: ModelMixin, noise_scheduler: SchedulerMixin, sampler: Sampler = "ddim") -> DiffusionPipeline:
    """The diffusers pipeline that students are sampled with and, for `ddim`, exported as.

    Args:
        unet: a `UNet2DModel`; diffusers' own `DDIMPipeline` takes it, or, if it is class-conditional, this package's.
        noise_scheduler: any diffusers scheduler; its schedule and prediction type are taken over.
        sampler: `ddim` (Song et al., 2021, arXiv 2010.02502), `ddpm` (Ho et al., 2020, arXiv 2006.11239) or
            `dpm-solver` (DPM-Solver++, Lu et al., 2022, arXiv 2211.01095).

    Raises:
        ValueError: for an unknown sampler.
    """
    config = noise_scheduler.config
    if num_classes_of(unet) is not None and sampler != "ddim":
        raise ValueError(f"class-conditional UNets are sampled by ddim, not by {sampler}")
    match sampler:
        case "ddim" if num_classes_of(unet) is not None:
            pipeline = ClassConditionalDDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(config))
        case "ddim":
            pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(config))
        case "ddpm":
            pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler.from_config(config))
        case "dpm-solver":
            pipeline = DDPMPipeline(unet=unet, scheduler=DPMSolverMultistepScheduler.from_config(config))
        case _:
            raise ValueError(f"there is no sampler {sampler!r}; choose ddim, ddpm or dpm-solver")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(source: str, sampler: Sampler | None = None) -> DiffusionPipeline:
    """Load a pipeline that makes images from noise, or from noise and class labels.

    Args:
        source: a pipeline's folder, the folder of a run of a recipe (its exported pipeline is taken), or a hub id,
            `ID@REVISION` for a certain commit, tag or branch; safetensors only.
        sampler: for a pipeline of a `UNet2DModel`, what to sample it with; None keeps the pipeline's own.

    Raises:
        ValueError: in one line, for what is not there, cannot be loaded, or needs more than labels, such as a prompt.
    """
    path = Path(source)
    repository, _ = split_revision(source)
    is_here = path.is_dir()
    if is_here:
        found = [folder for folder in (path, path / "pipeline") if (folder / "model_index.json").exists()]
        if not found:
            raise ValueError(f"{source} holds no pipeline: neither model_index.json nor pipeline/model_index.json")
        path = found[0]
    elif path.exists() or path.suffix == ".npz" or source.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise ValueError(f"there is no pipeline folder {source}")
    try:
        path = path if is_here else hub_folder(source, ["model_index.json"])
        kind = pipeline_class(read_json(path / "model_index.json"), [ClassConditionalDDIMPipeline])
    except ValueError as error:
        raise ValueError(f"cannot load the pipeline {source}: {error}") from error
    _check_call(kind, source)
    try:
        path = path if is_here else hub_folder(source, part_files(kind))
        pipeline = kind(**load_parts(kind, path))
    except Exception as error:  # missing, damaged and foreign parts each have a class of their own
        raise ValueError(f"cannot load the pipeline {source}: {' '.join(str(error).split())[:1000]}") from error
    if sampler is not None:
        if isinstance(pipeline, DDIMPipeline | DDPMPipeline | ClassConditionalDDIMPipeline):
            pipeline = stock_pipeline(pipeline.unet, pipeline.scheduler, sampler)
        else:
            raise ValueError(
                f"{source} is a {type(pipeline).__name__}; a sampler can be chosen for UNet pipelines only"
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_call(kind: type[DiffusionPipeline], source: str) -> None:
    """Refuse a pipeline that needs more than noise and class labels, by its class alone."""
    parameters = inspect.signature(kind.__call__).parameters
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    makes_images = "output_type" in parameters and bool({"batch_size", "class_labels"} & set(parameters))
    if needed - {"self", "class_labels"} or "prompt" in parameters or not makes_images:
        raise ValueError(
            f"{source} is a {kind.__name__}, which needs more than noise and class labels; unconditional and "
            "class-conditional pipelines can be sampled here"
        )


def num_classes(pipeline: DiffusionPipeline) -> int:
    """Number of classes that a pipeline can be asked for; 0 for an unconditional one."""
    if isinstance(pipeline, ClassConditionalDDIMPipeline):
        return num_classes_of(pipeline.unet) or 0
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return 0
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    return network.config.get("num_class_embeds") or network.config.get("num_embeds_ada_norm") or 0


def image_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Side in pixels and channels of the images that a pipeline makes."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    side = network.config.sample_size
    side = side if isinstance(side, int) else side[0]
    decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if decoder is not None:
        return side * 2 ** (len(decoder.config.block_out_channels) - 1), 3
    return side, network.config.in_channels


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    *,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    precision: Precision = "no",
) -> UInt8[Tensor, "images channels height width"]:
    """One batch of images, one per seed.

    Image i depends on its seed (and label) alone, up to rounding in the network: each image has a generator of its own,
    on the CPU, whatever the device.

    Args:
        pipeline: from `load_pipeline` or `stock_pipeline`, on the device to compute on.
        seeds: one per image.
        class_labels: one per image, for a class-conditional pipeline; by default each image's seed modulo the number
            of classes, so that consecutive seeds go through the classes in turn.
        guidance_scale: of a class-conditional pipeline with guidance; None keeps the pipeline's default.
        num_inference_steps: network evaluations per image, at least 1.
        precision: of the network, by autocast; the sampler itself works in the pipeline's dtype.

    Returns:
        Images, uint8, on the CPU.

    Raises:
        ValueError: for a count below 1, and labels or guidance that the pipeline does not take.
    """
    if not seeds or num_inference_steps < 1:
        raise ValueError("sampling needs at least one seed and one inference step")
    classes = num_classes(pipeline)
    if not classes and (class_labels is not None or guidance_scale is not None):
        raise ValueError("the model is unconditional: it takes neither class labels nor guidance")
    if classes and class_labels is None:
        class_labels = [seed % classes for seed in seeds]
    parameters = inspect.signature(pipeline.__call__).parameters
    arguments: dict = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "output_type": "np"}
    arguments |= {"batch_size": len(seeds)} if "batch_size" in parameters else {}
    arguments |= {"class_labels": list(class_labels)} if class_labels is not None else {}
    arguments |= {"guidance_scale": guidance_scale} if guidance_scale is not None else {}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    with torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None):
        images = pipeline(num_inference_steps=num_inference_steps, **arguments).images  # [images, H, W, C] in [0, 1]
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def sample_images(
    unet: ModelMixin,
    noise_scheduler: SchedulerMixin,
    seeds: Sequence[int],
    *,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    batch_size: int = 128,
) -> UInt8[Tensor, "images channels height width"]:
    """Sample one image per seed with DDIM; see `generate_images`.

    Args:
        unet: a `UNet2DModel`, float32; its training mode is restored afterwards.
        noise_scheduler: the schedule that it was trained with.
        seeds: one per image.
        class_labels: one per image, for a class-conditional UNet; by default each image's seed modulo the number of
            classes, so that consecutive seeds go through the classes in turn.
        guidance_scale: of classifier-free guidance; 1, the default, is the plain conditional prediction.
        num_inference_steps: network evaluations per image, at least 1.
        batch_size: images at a time.

    Returns:
        Images, uint8, on the CPU.

    Raises:
        ValueError: for no seeds, a count below 1, and labels or guidance that do not fit the UNet.
    """
    if not seeds or batch_size < 1:
        raise ValueError("sampling needs at least one seed and a batch size of at least 1")
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds need as many class labels, not {len(class_labels)}")
    was_training = unet.training
    pipeline = stock_pipeline(unet.eval(), noise_scheduler)
    batches = []
    for first in range(0, len(seeds), batch_size):
        chosen = slice(first, first + batch_size)
        batches.append(
            generate_images(
                pipeline,
                seeds[chosen],
                class_labels=None if class_labels is None else class_labels[chosen],
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
            )
        )
    unet.train(was_training)
    return torch.cat(batches)
