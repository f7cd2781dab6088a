"""How much noise each timestep has, and what a network is asked to predict of it.

A noisy sample is `alpha * sample + sigma * noise`, and whatever a network predicts is linear in the same two:
`a * sample + b * noise`. All of it is computed in float32: in bfloat16 the first steps of a schedule round to "no noise
added".

B batch, T timesteps.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float, Int
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepWeighting = Literal["uniform", "min_snr"]


@dataclass(frozen=True)
class Schedule:
    """Noise by timestep, and what a network predicts.

    Timesteps are indices, 0 to T - 1, the noise growing with them.

    Attributes:
        alpha: what is left of the sample, `[T]` float32.
        sigma: how much noise there is, `[T]` float32.
        prediction_type: `epsilon` (the noise), `sample`, or `v_prediction` (`alpha * noise - sigma * sample`, Salimans
            and Ho, 2022, arXiv 2202.00512).
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: PredictionType

    @classmethod
    def of(cls, noise_scheduler: SchedulerMixin) -> "Schedule":
        """The schedule of a diffusers scheduler that was made from betas (DDPM, DDIM, DPM-Solver, ...).

        Raises:
            ValueError: for a scheduler of another kind, or a prediction type that is not known.
        """
        if not hasattr(noise_scheduler, "alphas_cumprod"):
            raise ValueError(f"a {type(noise_scheduler).__name__} has no betas; a scheduler such as DDPMScheduler has")
        alphas_cumprod = noise_scheduler.alphas_cumprod.float()
        return cls(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, noise_scheduler.config.get("prediction_type"))

    def __post_init__(self) -> None:
        """Refuse what no network here predicts."""
        known = get_args(PredictionType)
        if self.prediction_type not in known:
            raise ValueError(f"prediction type {self.prediction_type!r} is not one of {', '.join(known)}")

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule on a device: where its timesteps lie."""
        return replace(self, alpha=self.alpha.to(device), sigma=self.sigma.to(device))

    def timesteps(self, time: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Timesteps for times in [0, 1], each of equal width."""
        return (time * len(self)).long().clamp(max=len(self) - 1)

    def noisy(
        self, sample: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """Noisy samples, float32: `alpha_t * sample + sigma_t * noise`."""
        alpha, sigma = self._at(timesteps, sample.ndim)
        return alpha * sample.float() + sigma * noise.float()

    def target(
        self, sample: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """What a perfect network would predict, float32."""
        match self.prediction_type:
            case "epsilon":
                return noise.float()
            case "sample":
                return sample.float()
        alpha, sigma = self._at(timesteps, sample.ndim)
        return alpha * noise.float() - sigma * sample.float()

    def convert(
        self,
        prediction: Float[Tensor, "batch ..."],
        noisy_sample: Float[Tensor, "batch ..."],
        timesteps: Int[Tensor, " batch"],
        source: PredictionType,
    ) -> Float[Tensor, "batch ..."]:
        """Express another network's prediction in this one's type, so that teacher and student may differ in it.

        Args:
            prediction: what a network of type `source` predicts for `noisy_sample`.
            noisy_sample: the network's input.
            timesteps: `[B]`.
            source: type of `prediction`.

        Returns:
            The same statement about the sample, float32. It is not finite where `check_convertible` refuses.
        """
        prediction = prediction.float()
        if source == self.prediction_type:
            return prediction
        alpha, sigma = self._at(timesteps, prediction.ndim)
        (a, b), (c, d) = _parts(source, alpha, sigma), _parts(self.prediction_type, alpha, sigma)
        # The two equations for sample and noise (the noisy sample and the prediction), solved and put together again.
        along = (alpha * d - sigma * c) * prediction
        return (along + (c * b - a * d) * noisy_sample.float()) / (alpha * b - sigma * a)

    def check_convertible(self, source: PredictionType) -> None:
        """Check once, before training, that `convert` is finite on the whole schedule.

        Raises:
            ValueError: if the schedule ends in pure noise (zero terminal SNR) and an epsilon would have to be
                converted, or begins without noise and a sample would have to be.
        """
        if source == self.prediction_type:
            return
        if source == "epsilon" and (self.alpha == 0).any():
            raise ValueError(
                f"an epsilon prediction cannot be expressed as {self.prediction_type} where the schedule leaves no "
                "signal (zero terminal SNR); use a student of the teacher's prediction type"
            )
        if source == "sample" and (self.sigma == 0).any():
            raise ValueError(
                f"a sample prediction cannot be expressed as {self.prediction_type} where the schedule adds no noise; "
                "use a student of the teacher's prediction type"
            )

    def signal_to_noise_ratio(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """`alpha_t^2 / sigma_t^2`, float32."""
        alpha, sigma = self._at(timesteps, 1)
        return (alpha / sigma) ** 2

    def weights(
        self, timesteps: Int[Tensor, " batch"], weighting: TimestepWeighting, snr_gamma: float = 5.0
    ) -> Float[Tensor, " batch"] | None:
        """Weight of each sample's loss terms; None for uniform weighting.

        Args:
            timesteps: `[B]`.
            weighting: `uniform`, or `min_snr`: the squared error of the implied sample weighs min(SNR, gamma)
                (Hang et al., 2023, arXiv 2303.09556), expressed for the prediction type in use.
            snr_gamma: the bound gamma on the signal-to-noise ratio, above 0.
        """
        if weighting == "uniform":
            return None
        if weighting != "min_snr":
            raise ValueError(f"unknown timestep weighting {weighting!r}; choose uniform or min_snr")
        if not snr_gamma > 0:
            raise ValueError(f"snr_gamma must be above 0, not {snr_gamma}")
        snr = self.signal_to_noise_ratio(timesteps)
        bounded = snr.clamp(max=snr_gamma)
        match self.prediction_type:
            case "epsilon":
                # Where no signal is left the ratio is 0/0; its limit is one.
                return torch.where(snr > 0, bounded / snr.clamp(min=1e-20), torch.ones_like(snr))
            case "v_prediction":
                return bounded / (snr + 1)
        return bounded

    def _at(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (ndim - 1))
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)


def _parts(kind: PredictionType, alpha: Tensor, sigma: Tensor) -> tuple[Tensor | int, Tensor | int]:
    """How much of sample and noise a prediction is."""
    match kind:
        case "epsilon":
            return 0, 1
        case "sample":
            return 1, 0
        case "v_prediction":
            return -sigma, alpha
    raise ValueError(f"unknown prediction type {kind!r}")
