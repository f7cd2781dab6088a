"""Errors on images that training never saw."""

from collections.abc import Mapping

import torch
from diffusers import ModelMixin, SchedulerMixin

from vkd_gen.data.draws import TrainingDraws
from vkd_gen.data.images import Images
from vkd_gen.distillation import FrozenTeacher, predict
from vkd_gen.schedule import Schedule


@torch.no_grad()
def held_out_errors(
    unets: Mapping[str, tuple[ModelMixin, SchedulerMixin]],
    teacher: FrozenTeacher | None,
    images: Images,
    *,
    num_draws: int = 512,
    batch_size: int = 64,
    seed: int = 1_000_003,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Mean squared errors on held-out images, noise and timesteps, the same draws for every UNet.

    Args:
        unets: name -> UNet and the noise scheduler that it was trained with.
        teacher: to measure the distance to; None for the denoising error alone.
        images: that no UNet was trained on; with labels for class-conditional UNets, which are told them.
        num_draws: of (image, noise, timestep).
        batch_size: at a time.
        seed: of the draws, unlike the training's.
        device: of the UNets.

    Returns:
        Name -> `denoising_error` and, with a teacher, `teacher_distance`: the squared difference between the two
        predictions; both per element and in the UNet's own prediction type.
    """
    was_training = {name: unet.training for name, (unet, _) in unets.items()}
    for unet, _ in unets.values():
        unet.eval()
    draws = TrainingDraws(images, seed=seed)
    schedules = {name: Schedule.of(noise_scheduler).to(device) for name, (_, noise_scheduler) in unets.items()}
    sums = {name: {"denoising_error": 0.0} | ({"teacher_distance": 0.0} if teacher else {}) for name in unets}
    for first in range(0, num_draws, batch_size):
        items = [draws[draw] for draw in range(first, min(first + batch_size, num_draws))]
        batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
        conditioning = {"class_labels": batch["class_labels"]} if "class_labels" in batch else None
        for name, (unet, _) in unets.items():
            schedule = schedules[name]
            timesteps = schedule.timesteps(batch["time"])
            noisy_sample = schedule.noisy(batch["sample"], batch["noise"], timesteps)
            prediction = predict(unet, noisy_sample.to(unet.dtype), timesteps, conditioning).float()
            target = schedule.target(batch["sample"], batch["noise"], timesteps)
            sums[name]["denoising_error"] += float((prediction - target).square().mean()) * len(items)
            if teacher is not None:
                answer, _ = teacher(noisy_sample, timesteps, conditioning, with_features=False)
                answer = schedule.convert(answer, noisy_sample, timesteps, teacher.prediction_type)
                sums[name]["teacher_distance"] += float((prediction - answer).square().mean()) * len(items)
    for name, (unet, _) in unets.items():
        unet.train(was_training[name])
    return {name: {key: value / num_draws for key, value in errors.items()} for name, errors in sums.items()}
