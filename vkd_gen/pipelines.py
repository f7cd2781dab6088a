"""The diffusers pipelines that models are sampled with: around a bare UNet, from a folder or the hub; one of our own.

A class-conditional UNet here is a `UNet2DModel` with `num_class_embeds` = classes + 1: the last label means "no class".
B images, C channels, H height, W width.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor

from vkd_gen.choices import Sampler
from vkd_gen.hub import hub_folder, part_files, split_revision
from vkd_gen.loading import load_parts, pipeline_class, read_json
from vkd_gen.text import reason
from vkd_gen.text_pipelines import PIPELINES, is_text_pipeline, load_text_pipeline


def num_classes_of(unet: ModelMixin) -> int | None:
    """Number of classes that a UNet knows, "no class" left out; None for one without class labels."""
    num_embeddings = getattr(unet.config, "num_class_embeds", None)
    return None if num_embeddings is None else num_embeddings - 1


class ClassConditionalDDIMPipeline(DiffusionPipeline):
    """Images of given classes, by DDIM (Song et al., 2021, arXiv 2010.02502), with classifier-free guidance.

    Called as diffusers' `DiTPipeline` is. Save it by `save_pretrained` and load it by
    `ClassConditionalDDIMPipeline.from_pretrained(folder)`; the UNet in it is a stock
    `UNet2DModel.from_pretrained(folder, subfolder="unet")`.

    Where the scheduler clips samples, the noise is derived again from the clipped one (`use_clipped_model_output`).
    `DDIMPipeline` leaves that out; with guidance images are noise without it. The sampler works in float32, whatever
    the UNet's dtype.

    Args:
        unet: with `num_class_embeds` = classes + 1; guidance needs one that was trained with some labels dropped.
        scheduler: any diffusers scheduler; its schedule and prediction type are taken over.

    Raises:
        ValueError: for a UNet that takes no class labels.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler):
        super().__init__()
        if num_classes_of(unet) is None:
            raise ValueError("the UNet takes no class labels (num_class_embeds is None); sample it by DDIMPipeline")
        self.register_modules(unet=unet, scheduler=DDIMScheduler.from_config(scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per label.

        Args:
            class_labels: B of them, 0 to the number of classes - 1; the number of classes itself for "no class".
            guidance_scale: w, at least 1: the prediction is `none + w (conditional - none)` (Ho and Salimans, 2022,
                arXiv 2207.12598). 1 is the conditional prediction; more doubles the cost of a step.
            generator: of the noise; a list of B makes each image depend on its own alone.
            num_inference_steps: steps, each one forward pass of the UNet.
            output_type: `pil`, `np` (`[B, H, W, C]` in [0, 1]) or `pt` (`[B, C, H, W]` in [0, 1]).
            return_dict: False for a tuple of the images alone.

        Raises:
            ValueError: for labels that the UNet does not know, a guidance below 1, or another number of generators.
        """
        labels = self._check(class_labels, guidance_scale, generator)
        is_guided = guidance_scale > 1
        if is_guided:
            labels = torch.cat([labels, torch.full_like(labels, self.unet.config.num_class_embeds - 1)])
        size = self.unet.config.sample_size
        shape = (len(class_labels), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        sample = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([sample, sample]) if is_guided else sample
            prediction = self.unet(inputs.to(self.unet.dtype), timestep, class_labels=labels).sample.float()
            if is_guided:
                conditional, none = prediction.chunk(2)
                prediction = none + guidance_scale * (conditional - none)
            # The noise that goes with the clipped sample: guidance reaches far outside of [-1, 1], and the network's
            # own noise, put together with a clipped sample, would add up from step to step.
            step = self.scheduler.step(prediction, timestep, sample, use_clipped_model_output=True)
            sample = step.prev_sample
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, class_labels: Sequence[int], guidance_scale: float, generator: object) -> torch.Tensor:
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        num_classes = self.unet.config.num_class_embeds - 1
        if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
            raise ValueError(f"class_labels must be a list of at least one whole number, not {class_labels}")
        unknown = labels[(labels < 0) | (labels > num_classes)].tolist()
        if unknown:
            raise ValueError(
                f"there is no class {unknown[0]}; labels are 0 to {num_classes - 1}, and {num_classes} for no class"
            )
        if not 1 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be at least 1 and finite, not {guidance_scale}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(labels)} labels need one generator or as many, not {len(generator)}")
        return labels.long()


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
            raise ValueError(f"a bare UNet is not sampled by {sampler!r}; choose ddim, ddpm or dpm-solver")
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


NULL_CLASS = 1000
"""The label for no class in `DiTPipeline`, whichever its denoiser has."""


def usable_guidance(pipeline: DiffusionPipeline, num_classes: int, guidance_scale: float | None) -> float | None:
    """The guidance scale; 1 in a `DiTPipeline` whose denoiser has another label for no class than the pipeline.

    Raises:
        ValueError: for another that is asked for there.
    """
    if not isinstance(pipeline, DiTPipeline) or num_classes == NULL_CLASS:
        return guidance_scale
    if guidance_scale not in (None, 1):
        raise ValueError(
            f"a DiTPipeline guides by class {NULL_CLASS}, and this denoiser knows {num_classes} classes: "
            f"guidance_scale must be 1, not {guidance_scale}"
        )
    return 1.0


def resample(pipeline: DiffusionPipeline, sampler: Sampler) -> DiffusionPipeline:
    """Give a text-to-image pipeline another sampler, on its own schedule; no sample is clipped.

    Raises:
        ValueError: for PNDM on a schedule that ends in pure noise, which it cannot start from.
    """
    config = pipeline.scheduler.config
    to_one = {"set_alpha_to_one": config.get("set_alpha_to_one", False)}
    if sampler == "pndm" and config.get("rescale_betas_zero_snr"):
        raise ValueError("pndm cannot sample a schedule of zero terminal SNR; choose ddim, ddpm, dpm-solver or euler")
    match sampler:
        case "ddim":
            scheduler = DDIMScheduler.from_config(config, clip_sample=False, **to_one)
        case "ddpm":
            scheduler = DDPMScheduler.from_config(config, clip_sample=False)
        case "dpm-solver":
            scheduler = DPMSolverMultistepScheduler.from_config(config)
        case "pndm":
            scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True, **to_one)
        case "euler":
            scheduler = EulerDiscreteScheduler.from_config(config)
    pipeline.register_modules(scheduler=scheduler)
    return pipeline


def load_pipeline(source: str, sampler: Sampler | None = None) -> DiffusionPipeline:
    """Load a pipeline that makes images from noise, from noise and class labels, or from prompts.

    Args:
        source: a pipeline's folder, the folder of a run of a recipe (its exported pipeline is taken), or a hub id,
            `ID@REVISION` for a certain commit, tag or branch; safetensors only. Of Stable Diffusion also a checkpoint
            in one file.
        sampler: for a pipeline of a `UNet2DModel` or of Stable Diffusion, what to sample it with; None keeps the
            pipeline's own.

    Raises:
        ValueError: in one line, for what is not there, cannot be loaded, or needs more than labels or a prompt.
    """
    if Path(source).is_file() and Path(source).suffix == ".safetensors":
        pipeline = load_text_pipeline(source)
        return pipeline if sampler is None else resample(pipeline, sampler)
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
        index = read_json(path / "model_index.json")
        kind = pipeline_class(index, [ClassConditionalDDIMPipeline])
    except ValueError as error:
        where = "" if is_here else "there is no such folder, and the hub did not give it: "
        raise ValueError(f"cannot load the pipeline {source}: {where}{error}") from error
    if is_text_pipeline(index):
        pipeline = load_text_pipeline(source)
        return pipeline if sampler is None else resample(pipeline, sampler)
    _check_call(kind, source)
    try:
        path = path if is_here else hub_folder(source, part_files(kind))
        parts = load_parts(kind, path)
        pipeline = kind(**parts)
        pipeline.register_to_config(
            **{name: parts[name] for name in parts.keys() & {"id2label"}}
        )  # DiT's, which forgets
    except Exception as error:  # missing, damaged and foreign parts each have a class of their own
        raise ValueError(f"cannot load the pipeline {source}: {reason(error, 1000)}") from error
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
    has_no_default = (entry for entry in parameters.values() if entry.default is entry.empty)
    needed = {entry.name for entry in has_no_default if entry.kind is not entry.VAR_KEYWORD}
    makes_images = "output_type" in parameters and bool({"batch_size", "class_labels"} & set(parameters))
    if needed - {"self", "class_labels"} or "prompt" in parameters or not makes_images:
        raise ValueError(
            f"{source} is a {kind.__name__}, which needs more than noise and class labels; unconditional and "
            "class-conditional pipelines can be sampled here, and of text to image "
            + " and ".join(kind.__name__ for kind in PIPELINES)
        )
