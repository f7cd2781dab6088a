"""Noising, prediction targets and timestep weights on top of a diffusers noise scheduler.

All of it is computed in float32: in bfloat16 the first steps of a schedule round to "no noise added".
B batch, C channels, H height, W width.
"""

from typing import Literal, get_args

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float, Int
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepWeighting = Literal["uniform", "min_snr"]


def prediction_type_of(noise_scheduler: SchedulerMixin) -> PredictionType:
    """The scheduler's prediction type.

    Raises:
        ValueError: if it is not one of epsilon, v_prediction and sample.
    """
    prediction_type = noise_scheduler.config.get("prediction_type")
    if prediction_type not in get_args(PredictionType):
        raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(get_args(PredictionType))}")
    return prediction_type


def to_timesteps(noise_scheduler: SchedulerMixin, time: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Timesteps of the schedule for times in [0, 1], of equal width each."""
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    return (time * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def _alpha_sigma(noise_scheduler: SchedulerMixin, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    # Kept where the timesteps are, as the schedulers themselves do in add_noise: one transfer per run, not per step.
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)
    alphas_cumprod = noise_scheduler.alphas_cumprod[timesteps].float().view(-1, *[1] * (ndim - 1))
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(
    noise_scheduler: SchedulerMixin,
    sample: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    timesteps: Int[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """Noisy samples at the given timesteps, always computed in float32; `alpha_t * sample + sigma_t * noise`."""
    return noise_scheduler.add_noise(sample.float(), noise.float(), timesteps)


def prediction_target(
    noise_scheduler: SchedulerMixin,
    sample: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    timesteps: Int[Tensor, " batch"],
    prediction_type: PredictionType,
) -> Float[Tensor, "batch ..."]:
    """What a perfect network would predict, float32.

    Returns:
        The noise (`epsilon`), the sample (`sample`) or `alpha_t * noise - sigma_t * sample` (`v_prediction`,
        Salimans and Ho, 2022, arXiv 2202.00512).
    """
    match prediction_type:
        case "epsilon":
            return noise.float()
        case "sample":
            return sample.float()
        case "v_prediction":
            return noise_scheduler.get_velocity(sample.float(), noise.float(), timesteps)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def convert_prediction(
    noise_scheduler: SchedulerMixin,
    prediction: Float[Tensor, "batch ..."],
    noisy_sample: Float[Tensor, "batch ..."],
    timesteps: Int[Tensor, " batch"],
    source: PredictionType,
    target: PredictionType,
) -> Float[Tensor, "batch ..."]:
    """Express a network's prediction in another prediction type, so that teacher and student may differ in it.

    Args:
        noise_scheduler: the schedule.
        prediction: what a network of type `source` predicts for `noisy_sample`.
        noisy_sample: the network's input.
        timesteps: `[B]`.
        source: prediction type of `prediction`.
        target: prediction type to express it in.

    Returns:
        The same statement about the sample, as type `target`, float32. Where the schedule leaves no signal
        (`alpha_t = 0`) an epsilon says nothing about the sample and the result is not finite: see
        `check_convertible`.
    """
    for kind in (source, target):
        if kind not in get_args(PredictionType):
            raise ValueError(f"unknown prediction type {kind!r}")
    prediction = prediction.float()
    if source == target:
        return prediction
    noisy_sample = noisy_sample.float()
    alpha, sigma = _alpha_sigma(noise_scheduler, timesteps, prediction.ndim)
    match source:
        case "epsilon":
            noise, sample = prediction, (noisy_sample - sigma * prediction) / alpha
        case "sample":
            noise, sample = (noisy_sample - alpha * prediction) / sigma, prediction
        case "v_prediction":
            noise, sample = alpha * prediction + sigma * noisy_sample, alpha * noisy_sample - sigma * prediction
    match target:
        case "epsilon":
            return noise
        case "sample":
            return sample
    return alpha * noise - sigma * sample


def check_convertible(noise_scheduler: SchedulerMixin, source: PredictionType, target: PredictionType) -> None:
    """Check once, before training, that `convert_prediction` is finite on the whole schedule.

    Raises:
        ValueError: if the schedule ends in pure noise (zero terminal SNR) and an epsilon would have to be converted,
            or begins without noise and a sample would have to be.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod
    if source != target and source == "epsilon" and alphas_cumprod.min() <= 0:
        raise ValueError(
            f"an epsilon prediction cannot be expressed as {target} where the schedule leaves no signal "
            "(zero terminal SNR); use a student of the teacher's prediction type"
        )
    if source != target and source == "sample" and alphas_cumprod.max() >= 1:
        raise ValueError(f"a sample prediction cannot be expressed as {target} where the schedule adds no noise")


def signal_to_noise_ratio(noise_scheduler: SchedulerMixin, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """`alpha_t^2 / sigma_t^2` per timestep, float32."""
    alpha, sigma = _alpha_sigma(noise_scheduler, timesteps, 1)
    return (alpha / sigma) ** 2


def timestep_weights(
    noise_scheduler: SchedulerMixin,
    timesteps: Int[Tensor, " batch"],
    weighting: TimestepWeighting,
    prediction_type: PredictionType,
    snr_gamma: float = 5.0,
) -> Float[Tensor, " batch"] | None:
    """Weight of each sample's loss terms; None for uniform weighting.

    Args:
        noise_scheduler: the schedule.
        timesteps: `[B]`.
        weighting: `uniform`, or `min_snr`: the squared error of the implied sample weighs min(SNR, gamma)
            (Hang et al., 2023, arXiv 2303.09556), expressed for the prediction type in use.
        prediction_type: what the loss is taken in.
        snr_gamma: the bound gamma on the signal-to-noise ratio, above 0.
    """
    if weighting == "uniform":
        return None
    if weighting != "min_snr":
        raise ValueError(f"unknown timestep weighting {weighting!r}; choose uniform or min_snr")
    if not snr_gamma > 0:
        raise ValueError(f"snr_gamma must be above 0, not {snr_gamma}")
    snr = signal_to_noise_ratio(noise_scheduler, timesteps)
    bounded = snr.clamp(max=snr_gamma)
    match prediction_type:
        case "epsilon":
            # Where no signal is left the ratio is 0/0; its limit is one.
            return torch.where(snr > 0, bounded / snr.clamp(min=1e-20), torch.ones_like(snr))
        case "v_prediction":
            return bounded / (snr + 1)
        case "sample":
            return bounded
    raise ValueError(f"unknown prediction type {prediction_type!r}")
