"""Images from a UNet and a scheduler, one seed per image. The only sampler code: the exported pipeline runs it.

C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from diffusers import DDIMPipeline, DDIMScheduler, ModelMixin, SchedulerMixin
from jaxtyping import UInt8
from torch import Tensor

from vkd_gen.pipelines import ClassConditionalDDIMPipeline, num_classes_of


def stock_pipeline(unet: ModelMixin, noise_scheduler: SchedulerMixin) -> DDIMPipeline | ClassConditionalDDIMPipeline:
    """The pipeline that students are sampled with and exported as: DDIM on the training schedule.

    Args:
        unet: a `UNet2DModel`; diffusers' own `DDIMPipeline` takes it, or, if it is class-conditional, this package's.
        noise_scheduler: any diffusers scheduler; its schedule and prediction type are taken over.
    """
    pipeline_class = DDIMPipeline if num_classes_of(unet) is None else ClassConditionalDDIMPipeline
    pipeline = pipeline_class(unet=unet, scheduler=DDIMScheduler.from_config(noise_scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(
    unet: ModelMixin,
    noise_scheduler: SchedulerMixin,
    seeds: Sequence[int],
    *,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
    batch_size: int = 128,
) -> UInt8[Tensor, "images channels height width"]:
    """Sample one image per seed with DDIM (Song et al., 2021, arXiv 2010.02502).

    Image i depends on seed i and label i alone, up to rounding in the network: each image has a generator of its own,
    on the CPU, whatever the device.

    Args:
        unet: a `UNet2DModel`, float32; its training mode is restored afterwards.
        noise_scheduler: the schedule that it was trained with.
        seeds: one per image.
        class_labels: one per image, for a class-conditional UNet; by default each image's seed modulo the number of
            classes, so that consecutive seeds go through the classes in turn.
        guidance_scale: of classifier-free guidance; 1 is the plain conditional prediction.
        num_inference_steps: network evaluations per image, at least 1.
        batch_size: images at a time.

    Returns:
        Images, uint8, on the CPU.

    Raises:
        ValueError: for no seeds, a count below 1, and labels or guidance that do not fit the UNet.
    """
    if not seeds or num_inference_steps < 1 or batch_size < 1:
        raise ValueError("sampling needs at least one seed, one inference step and a batch size of at least 1")
    num_classes = num_classes_of(unet)
    if num_classes is None and (class_labels is not None or guidance_scale != 1):
        raise ValueError("the UNet is unconditional: it takes neither class labels nor guidance")
    if num_classes is not None and class_labels is None:
        class_labels = [seed % num_classes for seed in seeds]
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds need as many class labels, not {len(class_labels)}")
    was_training = unet.training
    pipeline = stock_pipeline(unet.eval(), noise_scheduler)
    batches = []
    for first in range(0, len(seeds), batch_size):
        chosen = slice(first, first + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
        asked = (
            {"batch_size": len(generators)}
            if class_labels is None
            else {"class_labels": class_labels[chosen], "guidance_scale": guidance_scale}
        )
        images = pipeline(
            **asked, generator=generators, num_inference_steps=num_inference_steps, output_type="np"
        ).images  # [images, H, W, C] in [0, 1]
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8))
    unet.train(was_training)
    return torch.cat(batches)
