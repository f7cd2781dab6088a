"""Images from a UNet and a scheduler, one seed per image. The only sampler code: diffusers' own pipeline runs it.

C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from diffusers import DDIMPipeline, DDIMScheduler, ModelMixin, SchedulerMixin
from jaxtyping import UInt8
from torch import Tensor


def stock_pipeline(unet: ModelMixin, noise_scheduler: SchedulerMixin) -> DDIMPipeline:
    """The diffusers pipeline that students are sampled with and exported as: DDIM on the training schedule.

    Args:
        unet: an unconditional `UNet2DModel`.
        noise_scheduler: any diffusers scheduler; its schedule and prediction type are taken over.
    """
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(noise_scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(
    unet: ModelMixin,
    noise_scheduler: SchedulerMixin,
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    batch_size: int = 128,
) -> UInt8[Tensor, "images channels height width"]:
    """Sample one image per seed with DDIM (Song et al., 2021, arXiv 2010.02502).

    Image i depends on seed i alone, up to rounding in the network: each image has a generator of its own, on the
    CPU, whatever the device.

    Args:
        unet: an unconditional `UNet2DModel`, float32; its training mode is restored afterwards.
        noise_scheduler: the schedule that it was trained with.
        seeds: one per image.
        num_inference_steps: network evaluations per image, at least 1.
        batch_size: images at a time.

    Returns:
        Images, uint8, on the CPU.

    Raises:
        ValueError: for no seeds or a count below 1.
    """
    if not seeds or num_inference_steps < 1 or batch_size < 1:
        raise ValueError("sampling needs at least one seed, one inference step and a batch size of at least 1")
    was_training = unet.training
    pipeline = stock_pipeline(unet.eval(), noise_scheduler)
    batches = []
    for first in range(0, len(seeds), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch_size]]
        images = pipeline(
            batch_size=len(generators),
            generator=generators,
            num_inference_steps=num_inference_steps,
            output_type="np",
        ).images  # [images, H, W, C] in [0, 1]
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8))
    unet.train(was_training)
    return torch.cat(batches)
