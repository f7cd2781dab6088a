"""Does a denoiser listen to its prompt: its loss with the right prompt, with wrong ones and with none.

N samples, C channels, H height, W width, T tokens, D width of the prompts' embeddings.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vkd_gen.schedule import Schedule


class PromptLosses(NamedTuple):
    """Mean squared errors of the denoiser's prediction, and places of the right prompt.

    Attributes:
        right: loss with each sample's own prompt.
        wrong: with prompts of other samples.
        none: with the null prompt.
        rank: mean place of the own prompt among all that were tried, by the sample's loss; 1 is best.
        first: share of the samples whose own prompt has the lowest loss.
        num_prompts: prompts that were tried for each sample, with its own.
    """

    right: float
    wrong: float
    none: float
    rank: float
    first: float
    num_prompts: int


@torch.no_grad()
def prompt_losses(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: Schedule,
    samples: Float[Tensor, "samples channels height width"],
    prompts: Float[Tensor, "pool tokens width"],
    null: Float[Tensor, "1 tokens width"],
    own: Tensor,
    *,
    num_prompts: int = 32,
    num_draws: int = 4,
    seed: int = 0,
) -> PromptLosses:
    """Ask a denoiser for the same noisy samples with several prompts each.

    Sample n is tried with its own prompt and the `num_prompts` - 1 that follow it in the pool, with the same noise at
    the same times: in the middle of `num_draws` equal parts of the schedule.

    Args:
        predict: noisy samples, timesteps `[N]` and prompts `[N, T, D]` -> prediction, as a UNet's in eval mode.
        schedule: of the denoiser.
        samples: as the denoiser is trained on, latents or pixels.
        prompts: embeddings of the pool; the samples' own are among them.
        null: embeddings of the null prompt.
        own: number in the pool of each sample's prompt, `[N]` int64.
        num_prompts: at most as many as the pool holds.
        num_draws: noisy versions of each sample.
        seed: of the noise.
    """
    count = min(num_prompts, len(prompts))
    if count < 2:
        raise ValueError("right and wrong prompts are told apart among at least 2")
    generator = torch.Generator().manual_seed(seed)
    times = schedule.timesteps((torch.arange(num_draws) + 0.5) / num_draws)
    tried = (own[:, None] + torch.arange(count)) % len(prompts)  # the own one first
    losses = torch.zeros(len(samples), count + 1)
    for number, sample in enumerate(samples):
        conditions = torch.cat([prompts[tried[number]], null])
        for time in times:
            noise = torch.randn(sample.shape, generator=generator).expand(count + 1, *sample.shape)
            batch, timesteps = sample.expand_as(noise), time.expand(count + 1)
            prediction = predict(schedule.noisy(batch, noise, timesteps), timesteps, conditions)
            errors = prediction.float() - schedule.target(batch, noise, timesteps)
            losses[number] += errors.square().flatten(1).mean(1) / num_draws
    right, others, none = losses[:, 0], losses[:, 1:count], losses[:, count]
    places = 1 + (others < right[:, None]).sum(1)
    return PromptLosses(
        right.mean().item(),
        others.mean().item(),
        none.mean().item(),
        places.double().mean().item(),
        (places == 1).double().mean().item(),
        count,
    )
