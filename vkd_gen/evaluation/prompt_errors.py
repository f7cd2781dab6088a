"""Whether a model reads its prompts: its errors with right ones and wrong ones, on images that training never saw.

B draws; a sample is `[C, H, W]`.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vkd_gen.data.draws import Draws
from vkd_gen.data.samples import Samples
from vkd_gen.models import Model, in_eval_mode
from vkd_gen.schedule import Schedule

TIMES = (0.2, 0.4, 0.6, 0.8)
"""Of the schedule, where prompts are ranked: at its ends they decide little."""


@torch.no_grad()
def prompt_errors(
    models: Mapping[str, Model],
    samples: Samples,
    *,
    teacher: Model | None = None,
    num_draws: int = 512,
    num_ranked: int = 16,
    batch_size: int = 64,
    seed: int = 1_000_003,
) -> dict[str, dict[str, float]]:
    """What prompts change, on the draws of `held_out_errors` where the arguments are the same.

    Args:
        models: of prompts, by name, on one device.
        samples: that no model was trained on, with their prompts.
        teacher: to compare to; None leaves `guidance_gap_ratio` out.
        num_draws: of (image, noise, timestep).
        num_ranked: of the draws, whose prompts are ranked against one another.
        batch_size: draws at a time.
        seed: unlike the training's.

    Returns:
        Name -> `wrong_prompt_error`, the denoising error of each draw with the prompt of the next one;
        `guidance_gap_ratio`, the mean norm of what a prompt changes in the prediction of a sample, as a share of what
        it changes in the teacher's; and `prompt_rank`, see there.
    """
    some = next(iter(models.values()))
    device, draws = some.network.device, Draws(samples, some.schedule, seed=seed, batch_size=batch_size)
    schedules = {name: model.schedule.to(device) for name, model in models.items()}
    wrong, gaps, of_teacher = (dict.fromkeys(models, 0.0) for _ in range(3))
    with contextlib.ExitStack() as modes:
        for model in (*models.values(), *([teacher] if teacher else [])):
            modes.enter_context(in_eval_mode(model.network))
        for first in range(0, num_draws, batch_size):
            numbers = range(first, min(first + batch_size, num_draws))
            batch = draws.batch(numbers, device)
            sample, noise, timesteps = (batch[key] for key in ("sample", "noise", "timesteps"))
            right, nothing = batch["conditioning"], samples.nothing(batch["conditioning"])
            others = draws.batch([number + 1 for number in numbers], device)["conditioning"]
            for name, model in models.items():
                schedule = schedules[name]
                noisy_sample = schedule.noisy(sample, noise, timesteps)
                target = schedule.target(sample, noise, timesteps)
                answer = model.predict(noisy_sample, timesteps, with_prompts_of(right, others))
                wrong[name] += float((answer - target).square().mean()) * len(sample)
                for asked, sums in ((model, gaps), (teacher, of_teacher)):
                    if asked is not None:
                        with_prompt, without = (
                            schedule.convert(
                                asked.predict(noisy_sample, timesteps, told),
                                noisy_sample,
                                timesteps,
                                asked.schedule.prediction_type,
                            )
                            for told in (right, nothing)
                        )
                        sums[name] += float((with_prompt - without).flatten(1).norm(dim=1).sum())
        few = draws.batch(range(min(num_ranked, len(samples))), device)
        return {
            name: {"wrong_prompt_error": wrong[name] / num_draws}
            | ({"guidance_gap_ratio": gaps[name] / of_teacher[name]} if of_teacher[name] else {})
            | {"prompt_rank": prompt_rank(model, few, schedules[name], batch_size=batch_size)}
            for name, model in models.items()
        }


def with_prompts_of(conditioning: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What a denoiser is told, with other prompts: sizes and crops (SDXL's `time_ids`) stay the samples' own."""
    found: dict[str, Any] = {}
    for key, value in conditioning.items():
        is_nested = isinstance(value, Mapping)
        found[key] = with_prompts_of(value, other[key]) if is_nested else value if key == "time_ids" else other[key]
    return found


@torch.no_grad()
def prompt_rank(
    model: Model, batch: Mapping[str, Any], schedule: Schedule, seed: int = 1_000_003, batch_size: int = 64
) -> float:
    """Mean rank of the right prompt of each sample of a batch among the prompts of all, by the denoising error.

    1 is the best; (B + 1) / 2 is chance; equal prompts do not compete. After Li et al., 2023 (arXiv 2303.16203), who
    classify so. An error is a mean over `TIMES`, with a noise at each, which is the same for all prompts.

    Args:
        model: of prompts.
        batch: finished draws, of which sample and conditioning are taken.
        schedule: the model's, on its device.
        seed: of the noise.
        batch_size: prompts at a time.
    """
    sample, conditioning = batch["sample"], batch["conditioning"]
    count, generator = len(sample), torch.Generator().manual_seed(seed)
    errors = torch.zeros(count, count, device=sample.device)  # [sample, prompt]
    for time in TIMES:
        noise = torch.randn(sample.shape, generator=generator).to(sample)
        timesteps = schedule.timesteps(torch.full((count,), time)).to(sample.device)
        noisy_sample, target = (make(sample, noise, timesteps) for make in (schedule.noisy, schedule.target))
        for number in range(count):
            told = with_prompts_of(_repeated(conditioning, number, count), conditioning)
            answers = torch.cat(
                [
                    model.predict(noisy_sample[number].expand_as(sample)[rows], timesteps[rows], _rows_of(told, rows))
                    for rows in (slice(first, first + batch_size) for first in range(0, count, batch_size))
                ]
            )
            errors[number] += (answers - target[number]).square().flatten(1).mean(1)
    own, states = errors.diagonal()[:, None], conditioning["encoder_hidden_states"]
    is_better = (errors < own).double() + (errors == own).double() / 2  # one that reads nothing stands at chance
    is_same = torch.stack([(states == state).flatten(1).all(1) for state in states])
    return float(is_better.masked_fill(is_same, 0).sum(1).add(1).mean())


def _rows_of(conditioning: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {
        name: _rows_of(value, rows) if isinstance(value, Mapping) else value[rows]
        for name, value in conditioning.items()
    }


def _repeated(conditioning: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    def repeated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[number].expand(count, *value.shape[1:])
        return {key: repeated(part) for key, part in value.items()}

    return repeated(conditioning)
