"""First scores of a student: Frechet distance in a network's features, and errors on images that training never saw."""

from collections.abc import Mapping

import torch
from diffusers import ModelMixin, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from vkd_gen.data import Images, TrainingDraws
from vkd_gen.diffusion import add_noise, convert_prediction, prediction_target, prediction_type_of, to_timesteps
from vkd_gen.distillation import FrozenTeacher, predict


def frechet_distance(
    features: Float[Tensor, "samples channels"], reference: Float[Tensor, "references channels"]
) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in squared feature units, float64.

    |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al., 2017, arXiv 1706.08500.

    Raises:
        ValueError: for fewer than two rows, or unlike widths.
    """
    if len(features) < 2 or len(reference) < 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"cannot compare features {list(features.shape)} and {list(reference.shape)}")
    features, reference = features.double(), reference.double()
    channels = features.shape[1]
    covariance, reference_covariance = (rows.T.cov().view(channels, channels) for rows in (features, reference))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2).
    product = torch.linalg.eigvalsh(root @ reference_covariance @ root).clamp(min=0).sqrt().sum()
    offset = (features.mean(0) - reference.mean(0)).square().sum()
    return float(offset + covariance.trace() + reference_covariance.trace() - 2 * product)


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
    sums = {name: {"denoising_error": 0.0} | ({"teacher_distance": 0.0} if teacher else {}) for name in unets}
    for first in range(0, num_draws, batch_size):
        items = [draws[draw] for draw in range(first, min(first + batch_size, num_draws))]
        batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
        conditioning = {"class_labels": batch["class_labels"]} if "class_labels" in batch else None
        for name, (unet, noise_scheduler) in unets.items():
            timesteps = to_timesteps(noise_scheduler, batch["time"])
            noisy_sample = add_noise(noise_scheduler, batch["sample"], batch["noise"], timesteps)
            kind = prediction_type_of(noise_scheduler)
            prediction = predict(unet, noisy_sample.to(unet.dtype), timesteps, conditioning).float()
            target = prediction_target(noise_scheduler, batch["sample"], batch["noise"], timesteps, kind)
            sums[name]["denoising_error"] += float((prediction - target).square().mean()) * len(items)
            if teacher is not None:
                answer, _ = teacher(noisy_sample, timesteps, conditioning, with_features=False)
                answer = convert_prediction(
                    noise_scheduler, answer, noisy_sample, timesteps, teacher.prediction_type, kind
                )
                sums[name]["teacher_distance"] += float((prediction - answer).square().mean()) * len(items)
    for name, (unet, _) in unets.items():
        unet.train(was_training[name])
    return {name: {key: value / num_draws for key, value in errors.items()} for name, errors in sums.items()}
