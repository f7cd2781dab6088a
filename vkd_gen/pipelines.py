"""Class-conditional sampling, which diffusers has no pipeline of UNets for.

A class-conditional UNet here is a `UNet2DModel` with `num_class_embeds` = classes + 1: the last label means "no class".
B images, C channels, H height, W width.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


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

        Returns:
            The images, in `.images`.

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
