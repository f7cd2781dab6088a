"""Whether a model reads its prompts: its errors with right ones, wrong ones and none.

B draws, N samples, P prompts; a sample is `[C, H, W]`.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vkd_gen.data.draws import Draws
from vkd_gen.data.samples import Samples
from vkd_gen.models import Model, in_eval_mode
from vkd_gen.schedule import PredictionType, Schedule

logger = logging.getLogger(__name__)

TIMES = (0.2, 0.4, 0.6, 0.8)
"""Of the schedule, where prompts are ranked: at its ends they decide little."""
MOST_PASSED_OVER = 32
"""Draws of the same prompt that are passed over for another one; behind more than these none is looked for."""


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
        models: of prompts, by name, on one device; they differ in nothing but what they predict of a noisy sample.
        samples: that no model was trained on, with their prompts.
        teacher: to compare to; None leaves `guidance_gap_ratio` out.
        num_draws: of (image, noise, timestep).
        num_ranked: of the draws, whose prompts are ranked against one another.
        batch_size: draws at a time.
        seed: unlike the training's.

    Returns:
        Name -> `wrong_prompt_error`, the denoising error of each draw with the prompt of the next one that has another;
        `guidance_gap_ratio`, the mean norm of what a prompt changes in the prediction of a sample, as a share of what
        it changes in the teacher's; and `prompt_rank`, see there. Where all prompts are equal, a warning says so, and
        the first and the last are left out.
    """
    some = next(iter(models.values()))
    draws = Draws(samples, some.schedule, seed=seed, batch_size=batch_size, group_size=1)
    device = some.network.device
    schedules = {name: model.schedule.to(device) for name, model in models.items()}
    wrong, gaps, of_teacher = (dict.fromkeys(models, 0.0) for _ in range(3))
    num_wrong = 0  # draws that have a wrong prompt
    with contextlib.ExitStack() as modes:
        for model in (*models.values(), *([teacher] if teacher else [])):
            modes.enter_context(in_eval_mode(model.network))
        for batch, others, has_other in _with_other_prompts(draws, num_draws, device):
            sample, noise, timesteps, right = (batch[key] for key in ("sample", "noise", "timesteps", "conditioning"))
            noisy = (schedules[next(iter(models))].noisy(sample, noise, timesteps), timesteps)
            both = right, samples.nothing(right)
            answers = [teacher.predict(*noisy, told) for told in both] if teacher else []
            num_wrong += int(has_other.sum())
            for name, model in models.items():
                schedule = schedules[name]
                errors = model.predict(*noisy, others) - schedule.target(sample, noise, timesteps)
                wrong[name] += float(errors.square().flatten(1).mean(1)[has_other].sum())
                if teacher:
                    own = answers if model is teacher else [model.predict(*noisy, told) for told in both]
                    gaps[name] += _gap(own, *noisy, schedule, model.schedule.prediction_type)
                    of_teacher[name] += _gap(answers, *noisy, schedule, teacher.schedule.prediction_type)
        rows = {name: {"guidance_gap_ratio": gaps[name] / gap} if gap else {} for name, gap in of_teacher.items()}
        if not num_wrong:
            logger.warning("note: all prompts of the held-out images are equal: no wrong ones are told from right ones")
            return rows
        few = [draws.batch([number], device) for number in range(min(num_ranked, len(samples)))]
        told = _joined([draw["conditioning"] for draw in few])
        for name, model in models.items():
            rank = prompt_rank(model, [draw["sample"][0] for draw in few], told, batch_size=batch_size)
            rows[name] |= {"wrong_prompt_error": wrong[name] / num_wrong, "prompt_rank": rank}
        return rows


def _gap(
    answers: Sequence[Tensor], noisy_sample: Tensor, timesteps: Tensor, schedule: Schedule, source: PredictionType
) -> float:
    """Sum over draws of the norm of what a prompt changes, in the schedule's prediction type."""
    with_prompt, without = (schedule.convert(answer, noisy_sample, timesteps, source) for answer in answers)
    return float((with_prompt - without).flatten(1).norm(dim=1).sum())


def _with_other_prompts(
    draws: Draws, num_draws: int, device: torch.device
) -> Iterator[tuple[dict[str, Any], dict[str, Any], Bool[Tensor, " draws"]]]:
    """Batches of draws; what is told of the next draw of each that has another prompt; and whether there is one."""
    known: dict[int, dict[str, Any]] = {}
    for numbers in draws.alike(num_draws):
        batch = draws.batch(numbers, device)
        known = {number: told for number, told in known.items() if number > numbers[0]}  # of the batch before
        known |= {number: _rows_of(batch["conditioning"], slice(at, at + 1)) for at, number in enumerate(numbers)}
        others, has_other = [], []
        for number in numbers:
            for following in range(number + 1, number + 2 + MOST_PASSED_OVER):
                if following not in known:
                    known[following] = draws.batch([following], device)["conditioning"]
                is_other = not torch.equal(*(known[n]["encoder_hidden_states"] for n in (number, following)))
                if is_other:
                    break
            others.append(with_prompts_of(known[number], known[following]))
            has_other.append(is_other)
        yield batch, _joined(others), torch.tensor(has_other, device=device)


def with_prompts_of(conditioning: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What a denoiser is told, with other prompts: sizes and crops (SDXL's `time_ids`) stay the samples' own."""
    found: dict[str, Any] = {}
    for key, value in conditioning.items():
        is_nested = isinstance(value, Mapping)
        found[key] = with_prompts_of(value, other[key]) if is_nested else value if key == "time_ids" else other[key]
    return found


def prompt_rank(
    model: Model,
    samples: Sequence[Tensor],
    conditioning: Mapping[str, Any],
    *,
    seed: int = 1_000_003,
    batch_size: int = 64,
) -> float:
    """Mean rank of the right prompt of each sample among the prompts of all, by the denoising error.

    1 is the best; (N + 1) / 2 is chance; equal prompts do not compete. After Li et al., 2023 (arXiv 2303.16203), who
    classify so. An error is a mean over `TIMES`.

    Args:
        model: of prompts, in eval mode.
        samples: N of them.
        conditioning: what is told of each, `[N, ...]`.
        seed: of the noise.
        batch_size: prompts at a time.
    """
    tried = (with_prompts_of(_repeated(conditioning, n, len(samples)), conditioning) for n in range(len(samples)))
    errors = errors_by_prompt(model, samples, tried, times=TIMES, seed=seed, batch_size=batch_size)
    states = conditioning["encoder_hidden_states"]
    is_same = torch.stack([(states == state).flatten(1).all(1) for state in states])
    return float(places(errors, errors.diagonal(), is_same).mean())


@torch.no_grad()
def errors_by_prompt(
    model: Model,
    samples: Sequence[Tensor],
    tried: Iterable[Mapping[str, Any]],
    *,
    times: Sequence[float],
    seed: int,
    batch_size: int = 64,
) -> Float[Tensor, "samples prompts"]:
    """Denoising error of each sample with several prompts: a mean over times, with one noise at each for all prompts.

    Args:
        model: of prompts, in eval mode.
        samples: N of them, which may be of several sizes.
        tried: of each sample what the denoiser is told in turn, `[P, ...]`.
        times: in [0, 1], of the model's schedule.
        seed: of the noise.
        batch_size: prompts at a time.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for sample, told in zip(samples, tried, strict=True):
        schedule, count = model.schedule.to(sample.device), len(told["encoder_hidden_states"])
        errors = torch.zeros(count, device=sample.device)
        for timestep in schedule.timesteps(torch.tensor(times)).to(sample.device).split(1):
            noise = torch.randn(sample.shape, generator=generator).to(sample)[None]
            noisy_sample, target = (make(sample[None], noise, timestep) for make in (schedule.noisy, schedule.target))
            for part in (slice(first, first + batch_size) for first in range(0, count, batch_size)):
                size = len(errors[part])
                answers = model.predict(
                    noisy_sample.expand(size, *sample.shape), timestep.expand(size), _rows_of(told, part)
                )
                errors[part] += (answers - target).square().flatten(1).mean(1) / len(times)
        rows.append(errors)
    return torch.stack(rows)


def places(
    errors: Float[Tensor, "samples prompts"],
    own: Float[Tensor, " samples"],
    is_same: Bool[Tensor, "samples prompts"],
) -> Float[Tensor, " samples"]:
    """Place of each sample's own prompt among all by their errors, float64: 1 for the least; of equal ones the middle.

    Args:
        errors: see `errors_by_prompt`.
        own: those with the samples' own prompts.
        is_same: which prompts are the sample's own, and do not compete.
    """
    is_better = (errors < own[:, None]).double() + (errors == own[:, None]).double() / 2
    return is_better.masked_fill(is_same, 0).sum(1).add(1)


def _rows_of(conditioning: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {
        name: _rows_of(value, rows) if isinstance(value, Mapping) else value[rows]
        for name, value in conditioning.items()
    }


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: _joined([part[name] for part in parts])
        if isinstance(value, Mapping)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }


def _repeated(conditioning: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    def repeated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[number].expand(count, *value.shape[1:])
        return {key: repeated(part) for key, part in value.items()}

    return repeated(conditioning)
