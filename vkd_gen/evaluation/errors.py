"""Errors on images that training never saw."""

import contextlib
from collections.abc import Mapping

import torch

from vkd_gen.data.draws import Draws
from vkd_gen.data.samples import Samples
from vkd_gen.models import Model, in_eval_mode
from vkd_gen.schedule import Crossing


@torch.no_grad()
def held_out_errors(
    models: Mapping[str, Model],
    samples: Samples,
    *,
    teacher: Model | None = None,
    num_draws: int = 512,
    batch_size: int = 64,
    seed: int = 1_000_003,
) -> dict[str, dict[str, float]]:
    """Mean squared errors on held-out images, noise and timesteps, the same draws for every model.

    Args:
        models: by name, on one device; of one prediction type and schedule or several, of equally many timesteps.
        samples: that no model was trained on, with what the models are told of them.
        teacher: to measure the distance to; None for the denoising error alone.
        num_draws: of (image, noise, timestep).
        batch_size: draws at a time.
        seed: unlike the training's.

    Returns:
        Name -> `denoising_error` and, with a teacher, `teacher_distance`: the squared difference between the two
        predictions; both per element and in the model's own prediction type.
    """
    some = next(iter(models.values()))
    draws = Draws(samples, some.schedule, seed=seed, batch_size=batch_size, group_size=1)
    device = some.network.device
    schedules = {name: model.schedule.to(device) for name, model in models.items()}
    crossings = {name: None if teacher is None else _crossing(model, teacher) for name, model in models.items()}
    sums = {name: {"denoising_error": 0.0} | ({"teacher_distance": 0.0} if teacher else {}) for name in models}
    with contextlib.ExitStack() as modes:
        for model in (*models.values(), *([teacher] if teacher else [])):
            modes.enter_context(in_eval_mode(model.network))
        for batch in draws.first(num_draws, device=device):
            sample, noise, timesteps, conditioning = batch.values()
            noisy_sample, answer = schedules[next(iter(models))].noisy(sample, noise, timesteps), None
            if teacher is not None:
                answer = teacher.predict(noisy_sample, timesteps, conditioning)
            of_teacher = noisy_sample, timesteps, answer
            for name, model in models.items():
                schedule, crossing = schedules[name], crossings[name]
                noisy_sample, timesteps, answer = of_teacher
                if teacher is not None and crossing is not None:
                    timesteps = timesteps.clamp(schedule.first, schedule.last)
                    noisy_sample = schedule.noisy(sample, noise, timesteps)
                    answer = teacher.predict_at(*crossing.enter(noisy_sample, timesteps), conditioning)
                    answer = crossing.leave(answer, timesteps, teacher.schedule.prediction_type)
                is_teacher = answer is not None and model is teacher
                prediction = answer if is_teacher else model.predict(noisy_sample, timesteps, conditioning)
                target = schedule.target(sample, noise, timesteps)
                sums[name]["denoising_error"] += float((prediction - target).square().mean()) * len(sample)
                if teacher is not None and answer is not None:
                    found = schedule.convert(answer, noisy_sample, timesteps, teacher.schedule.prediction_type)
                    sums[name]["teacher_distance"] += float((prediction - found).square().mean()) * len(sample)
    return {name: {key: value / num_draws for key, value in errors.items()} for name, errors in sums.items()}


def _crossing(model: Model, teacher: Model) -> Crossing | None:
    """From a model's schedule to its teacher's; None where these have the same noise."""
    if model.schedule.has_noise_of(teacher.schedule):
        return None
    crossing = Crossing.between(model.schedule, teacher.schedule)
    return None if crossing is None else crossing.to(model.network.device)
