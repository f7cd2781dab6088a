"""Images from a UNet or a diffusers pipeline, one seed per image; diffusers' own pipelines do the sampling.

C channels, H height, W width.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn

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
            pipeline = ClassConditionalDDIMPipeline(unet=unet, scheduler=_on_schedule(DDIMScheduler, config))
        case "ddim":
            pipeline = DDIMPipeline(unet=unet, scheduler=_on_schedule(DDIMScheduler, config))
        case "ddpm":
            # A UNet here predicts no variance, whatever the schedule of its teacher says.
            learned = str(config.get("variance_type")).startswith("learned")
            variance = {"variance_type": "fixed_small"} if learned else {}
            pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler.from_config(config, **variance))
        case "dpm-solver":
            pipeline = DDPMPipeline(unet=unet, scheduler=_on_schedule(DPMSolverMultistepScheduler, config))
        case _:
            raise ValueError(f"there is no sampler {sampler!r}; choose ddim, ddpm or dpm-solver")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _on_schedule(kind: type[SchedulerMixin], config: Mapping[str, Any]) -> SchedulerMixin:
    """A sampler on the schedule of a config; betas that DDPMScheduler alone can make are handed over as numbers."""
    if config.get("beta_schedule") not in ("sigmoid", "laplace") or config.get("trained_betas") is not None:
        return kind.from_config(config)
    betas = DDPMScheduler.from_config(config, rescale_betas_zero_snr=False).betas
    return kind.from_config(config, trained_betas=betas.tolist())


def usable_steps(noise_scheduler: SchedulerMixin, num_inference_steps: int) -> int:
    """As many sampling steps as are asked for, or the most that the schedule has timesteps for.

    Raises:
        ValueError: for a schedule that leaves no timestep to sample at.
    """
    config = noise_scheduler.config
    num_timesteps, offset = config.get("num_train_timesteps"), config.get("steps_offset", 0)
    if not isinstance(num_timesteps, int) or not isinstance(offset, int):
        raise ValueError(
            f"a {type(noise_scheduler).__name__} with num_train_timesteps {num_timesteps!r} and steps_offset "
            f"{offset!r} cannot be sampled with here; choose another scheduler"
        )
    steps = min(num_inference_steps, num_timesteps)
    if config.get("timestep_spacing", "leading") != "leading":
        return steps
    # Such timesteps are raised by the offset, and diffusers does not look whether the last one is still there.
    while steps and (steps - 1) * (num_timesteps // steps) + offset >= num_timesteps:
        steps -= 1
    if not steps:
        raise ValueError(f"steps_offset {offset} leads out of a schedule of {num_timesteps} timesteps")
    return steps


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
        where = "" if is_here else "there is no such folder, and the hub did not give it: "
        raise ValueError(f"cannot load the pipeline {source}: {where}{error}") from error
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
    elif isinstance(pipeline, DDIMPipeline | DDPMPipeline) and num_classes_of(pipeline.unet) is not None:
        raise ValueError(
            f"{source} is a {type(pipeline).__name__}, which gives its UNet no class labels, and the UNet needs them; "
            "--sampler ddim gives it some"
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
    decoder = _decoder(pipeline)
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
    name: str = "the model",
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
        num_inference_steps: network evaluations per image, at least 1; at most the schedule's.
        precision: of the network, by autocast; the sampler itself works in the pipeline's dtype.
        name: of the pipeline, for messages.

    Returns:
        Images, uint8, on the CPU.

    Raises:
        ValueError: for a count below 1, labels or guidance that the pipeline does not take, and, naming the seeds, for
            images of which a pixel or a prediction on the way is not finite.
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
    arguments["num_inference_steps"] = usable_steps(pipeline.scheduler, num_inference_steps)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    with (
        torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None),
        _finite_outputs(network, len(seeds)) as predictions,
        _finite_outputs(getattr(_decoder(pipeline), "decoder", None), len(seeds)) as decoded,
    ):
        try:
            images = torch.from_numpy(pipeline(**arguments).images)  # [images, H, W, C] in [0, 1]
        except (TypeError, AttributeError, LookupError, RuntimeError) as error:  # diffusers checks little
            if "memory" in str(error):
                raise
            raise ValueError(
                f"{name} cannot be sampled: in its {type(pipeline).__name__}, {type(network).__name__} and "
                f"{type(pipeline.scheduler).__name__} do not fit together ({' '.join(str(error).split())[:200]})"
            ) from error
    # [evaluations + 1, images]; as uint8 what is not finite would be black, and clipping hides what is infinite.
    at_end = torch.stack([found.cpu() for found in (*decoded, images.isfinite().flatten(1).all(1))]).all(0)
    is_finite = torch.stack([*(found.cpu() for found in predictions), at_end])
    if not is_finite.all():
        raise ValueError(_describe_broken(name, pipeline, is_finite, seeds, precision))
    return images.permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def _decoder(pipeline: DiffusionPipeline) -> ModelMixin | None:
    """What makes pixels of latents; None where the samples are pixels."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


@contextlib.contextmanager
def _finite_outputs(network: nn.Module | None, num_images: int) -> Iterator[list[Tensor]]:
    """A list that gets, at each evaluation of a network, of which images the output is finite: `[images]`, bool."""
    found: list[Tensor] = []
    if network is None:
        yield found
        return

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        prediction = output if isinstance(output, Tensor) else output[0]
        # With guidance an image has several rows, a whole batch after the other.
        found.append(prediction.isfinite().flatten(1).all(1).view(-1, num_images).all(0))

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
    values = [entry for network in networks for entry in network.state_dict().items()]
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


def sample_images(
    unet: ModelMixin,
    noise_scheduler: SchedulerMixin,
    seeds: Sequence[int],
    *,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    batch_size: int = 128,
    name: str = "the model",
) -> UInt8[Tensor, "images channels height width"]:
    """Sample one image per seed with DDIM; see `generate_images`.

    Args:
        unet: a `UNet2DModel`, float32; its training mode is restored afterwards.
        noise_scheduler: the schedule that it was trained with.
        seeds: one per image.
        class_labels: one per image, for a class-conditional UNet; by default each image's seed modulo the number of
            classes, so that consecutive seeds go through the classes in turn.
        guidance_scale: of classifier-free guidance; 1, the default, is the plain conditional prediction.
        num_inference_steps: network evaluations per image, at least 1; at most the schedule's.
        batch_size: images at a time.
        name: of the UNet, for messages.

    Returns:
        Images, uint8, on the CPU.

    Raises:
        ValueError: for no seeds, a count below 1, labels or guidance that do not fit the UNet, and images that are not
            finite.
    """
    if not seeds or batch_size < 1:
        raise ValueError("sampling needs at least one seed and a batch size of at least 1")
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds need as many class labels, not {len(class_labels)}")
    was_training = unet.training
    pipeline = stock_pipeline(unet.eval(), noise_scheduler)
    batches = []
    try:
        for first in range(0, len(seeds), batch_size):
            chosen = slice(first, first + batch_size)
            batches.append(
                generate_images(
                    pipeline,
                    seeds[chosen],
                    class_labels=None if class_labels is None else class_labels[chosen],
                    guidance_scale=guidance_scale,
                    num_inference_steps=num_inference_steps,
                    name=name,
                )
            )
    finally:
        unet.train(was_training)
    return torch.cat(batches)
