"""What a UNet costs."""

import time
from collections.abc import Mapping

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch.utils.flop_counter import FlopCounterMode

from vkd_gen.features import copy_without_weights, example_inputs
from vkd_gen.sampling import sample_images


def count_parameters(unet: ModelMixin) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in unet.parameters())


def count_macs(unet: ModelMixin) -> int:
    """Multiply-accumulates of one forward pass on one sample, in convolutions, matrix products and attention.

    Counted on a copy without weights: nothing is computed. torch's counter counts two operations per accumulate.

    Raises:
        ValueError: if the sample size does not fit the number of stages.
    """
    copy = copy_without_weights(unet)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            copy(**example_inputs(copy))
        except RuntimeError as error:
            raise ValueError(f"the UNet cannot take a sample of size {unet.config.sample_size}: {error}") from error
    return counter.get_total_flops() // 2


def milliseconds_per_image(
    unets: Mapping[str, tuple[ModelMixin, SchedulerMixin]],
    *,
    num_images: int = 32,
    num_inference_steps: int = 50,
    repeats: int = 3,
) -> dict[str, float]:
    """Time to sample an image with each of several UNets, taken in turns: compare the figures of one call only.

    A tenth of the steps is timed and scaled up: each step costs the same.

    Args:
        unets: name -> UNet on the device to measure, and its noise scheduler.
        num_images: sampled at a time.
        num_inference_steps: network evaluations per image.
        repeats: measurements per UNet; the fastest counts.

    Returns:
        Name -> milliseconds per image.
    """
    timed_steps = max(1, num_inference_steps // 10)
    best = dict.fromkeys(unets, float("inf"))
    for turn in range(repeats + 1):  # the first turn is not counted: allocations, choices of algorithms
        for name, (unet, noise_scheduler) in unets.items():
            start = time.perf_counter()
            sample_images(
                unet,
                noise_scheduler,
                range(num_images),
                num_inference_steps=timed_steps,
                batch_size=num_images,
            )  # the images end on the CPU, so the device is done
            seconds = (time.perf_counter() - start) * num_inference_steps / timed_steps
            best[name] = min(best[name], seconds / num_images * 1000) if turn else best[name]
    return best
