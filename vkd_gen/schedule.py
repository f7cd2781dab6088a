"""How much noise each timestep has, and what a network is asked to predict of it.

A noisy sample is `alpha * sample + sigma * noise`, and whatever a network predicts is linear in the same two:
`a * sample + b * noise`. Diffusion (`alpha^2 + sigma^2` = 1) and flow matching (`alpha + sigma` = 1) differ in nothing
else. All of it is computed in float32: in bfloat16 the first steps of a schedule round to "no noise added".

B batch, T timesteps.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from jaxtyping import Float, Int
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TimestepWeighting = Literal["uniform", "min_snr"]


@dataclass(frozen=True)
class Schedule:
    """Noise by timestep, and what a network predicts.

    Timesteps are indices, 0 to T - 1, the noise growing with them.

    Attributes:
        alpha: what is left of the sample, `[T]` float32.
        sigma: how much noise there is, `[T]` float32.
        prediction_type: `epsilon` (the noise), `sample`, `v_prediction` (`alpha * noise - sigma * sample`, Salimans
            and Ho, 2022, arXiv 2202.00512), or `flow_prediction` (`noise - sample`, the velocity of flow matching,
            Lipman et al., 2022, arXiv 2210.02747).
        times: what the network is told of each timestep, `[T]` float32; None where it is told the timestep itself.
        first: timestep with the least noise that is drawn.
        last: timestep with the most; None for T - 1.
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: PredictionType
    times: Tensor | None = None
    first: int = 0
    last: int | None = None

    @classmethod
    def of(cls, noise_scheduler: SchedulerMixin) -> "Schedule":
        """The schedule of a diffusers scheduler: made from betas (DDPM, DDIM, DPM-Solver, ...), or of flow matching.

        The latter is FlowMatchEulerDiscreteScheduler's, or another's with `use_flow_sigmas`. Where the shift depends on
        the size of the image (`use_dynamic_shifting`) there is none in training, as in diffusers' scripts.

        Raises:
            ValueError: for a scheduler of another kind, or a prediction type that is not known.
        """
        name, config = type(noise_scheduler).__name__, noise_scheduler.config
        if is_flow(config):
            flow = flow_scheduler(config, name)
            sigma, kind = flow.sigmas.flip(0), config.get("prediction_type", "flow_prediction")
            return cls(1 - sigma, sigma, kind, times=flow.timesteps.flip(0))
        if not hasattr(noise_scheduler, "alphas_cumprod"):
            raise ValueError(f"a {name} has no betas; a scheduler such as DDPMScheduler has")
        if (kind := config.get("prediction_type")) == "flow_prediction":
            raise ValueError(f"a {name} of prediction type 'flow_prediction' needs use_flow_sigmas in its config")
        alphas_cumprod = noise_scheduler.alphas_cumprod.float()
        return cls(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, kind)

    def __post_init__(self) -> None:
        """Refuse what no network here predicts."""
        known = get_args(PredictionType)
        if self.prediction_type not in known:
            raise ValueError(f"prediction type {self.prediction_type!r} is not one of {', '.join(known)}")

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule on a device: where its timesteps lie."""
        times = None if self.times is None else self.times.to(device)
        return replace(self, alpha=self.alpha.to(device), sigma=self.sigma.to(device), times=times)

    def has_noise_of(self, other: "Schedule") -> bool:
        """Whether another schedule has the same noise at the same timesteps, on the same scale, and tells the same."""
        is_told_the_same = (self.times is None) == (other.times is None)
        return is_told_the_same and torch.equal(self.alpha, other.alpha) and torch.equal(self.sigma, other.sigma)

    def timesteps(self, time: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Timesteps for times in [0, 1], each of equal width; those before `first` and after `last` become these."""
        last = len(self) - 1 if self.last is None else self.last
        return (time * len(self)).long().clamp(min=self.first, max=last)

    def told(self, timesteps: Int[Tensor, " batch"]) -> Tensor:
        """What the network is told of timesteps: these, or `times` `[B]` float32."""
        return timesteps if self.times is None else self.times.to(timesteps.device)[timesteps]

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
            case "flow_prediction":
                return noise.float() - sample.float()
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
        """Check once, before training, that `convert` is finite on all of the schedule that is drawn.

        Raises:
            ValueError: if the schedule ends in pure noise (zero terminal SNR) and an epsilon would have to be
                converted, or begins without noise and a sample would have to be.
        """
        if source == self.prediction_type:
            return
        drawn = slice(self.first, None if self.last is None else self.last + 1)
        if source == "epsilon" and (self.alpha[drawn] == 0).any():
            raise ValueError(
                f"an epsilon prediction cannot be expressed as {self.prediction_type} where the schedule leaves no "
                "signal (zero terminal SNR); use a student of the teacher's prediction type"
            )
        if source == "sample" and (self.sigma[drawn] == 0).any():
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
            case "sample":
                return bounded
            case "v_prediction" if self.times is None:
                return bounded / (snr + 1)
        # An error in the prediction is one of the sample, times this; sigma^2 where alpha + sigma = 1.
        alpha, sigma = self._at(timesteps, 1)
        a, b = _parts(self.prediction_type, alpha, sigma)
        return bounded * (sigma / (alpha * b - sigma * a)) ** 2

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
        case "flow_prediction":
            return -1, 1
    raise ValueError(f"unknown prediction type {kind!r}")


def is_flow(config: Any) -> bool:
    """Whether the configuration of a diffusers scheduler, in memory or as a file holds it, is one of flow matching."""
    is_euler = config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__
    return is_euler or {"shift", "base_image_seq_len"} <= config.keys() or bool(config.get("use_flow_sigmas"))


def flow_samplers(num_train_timesteps: int) -> tuple[SchedulerMixin, SchedulerMixin]:
    """What samples a network of flow matching in a pipeline made for diffusion, and what it is trained on."""
    return (
        DPMSolverMultistepScheduler(
            num_train_timesteps=num_train_timesteps, prediction_type="flow_prediction", use_flow_sigmas=True
        ),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps),
    )


def flow_scheduler(config: Any, name: str) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that a network of flow matching is trained on, of the configuration of any that samples it.

    Args:
        config: of FlowMatchEulerDiscreteScheduler, or with `use_flow_sigmas`, whose shift is `flow_shift`.
        name: of its class, for messages.

    Raises:
        ValueError: for one whose time runs the other way.
    """
    if config.get("invert_sigmas"):
        raise ValueError(f"a {name} with invert_sigmas, whose time runs the other way, is not supported here")
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        shift=config.get("shift", config.get("flow_shift", 1.0)),
        use_dynamic_shifting=bool(config.get("use_dynamic_shifting")),
    )


@dataclass(frozen=True)
class Crossing:
    """Where a student's noisy samples lie on its teacher's schedule: at the same signal-to-noise ratio.

    They are the same samples but for their scale. The teacher is told a time between two of its own.

    Attributes:
        times: what the teacher is told of each of the student's timesteps, `[T]` float32.
        scale: of the teacher's noisy sample to the student's, `[T]` float32.
        first: the student's timestep with the least noise that the teacher's schedule has too.
        last: the one with the most.
    """

    times: Tensor
    scale: Tensor
    first: int
    last: int

    @classmethod
    def between(cls, student: Schedule, teacher: Schedule) -> "Crossing | None":
        """The crossing from one schedule to another; None where it changes nothing: equal ones, told their timesteps.

        Raises:
            ValueError: for schedules that have no noise level in common.
        """
        if student.times is None and student.has_noise_of(teacher):
            return None
        own, others = (_noise_share(schedule) for schedule in (student, teacher))
        known = np.arange(len(teacher)) if teacher.times is None else teacher.times.double().numpy()
        (inside,) = np.nonzero((own >= others[0]) & (own <= others[-1]))
        if not len(inside):
            raise ValueError("student and teacher have no noise level in common: their schedules do not overlap")
        times = torch.from_numpy(np.interp(own, others, known)).float()
        scale = torch.from_numpy(_sum_at(own, teacher) / _sum_at(own, student)).float()
        return cls(times, scale, first=int(inside[0]), last=int(inside[-1]))

    def to(self, device: torch.device | str) -> "Crossing":
        """The same on a device."""
        return replace(self, times=self.times.to(device), scale=self.scale.to(device))

    def enter(self, noisy_sample: Tensor, timesteps: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The student's noisy sample `[B, ...]` on the teacher's schedule, float32, and its time there, `[B]`."""
        return noisy_sample.float() * self._scale(timesteps, noisy_sample.ndim), self.times[timesteps]

    def leave(self, prediction: Tensor, timesteps: Int[Tensor, " batch"], kind: PredictionType) -> Tensor:
        """The teacher's prediction of `kind`, `[B, ...]` float32, as one of this kind on the student's schedule."""
        # Noise, sample and their difference are the same on any schedule; this one alone is weighed by alpha and sigma.
        return prediction / self._scale(timesteps, prediction.ndim) if kind == "v_prediction" else prediction

    def _scale(self, timesteps: Tensor, ndim: int) -> Tensor:
        return self.scale[timesteps].view(-1, *[1] * (ndim - 1))


def _noise_share(schedule: Schedule) -> np.ndarray:
    """`sigma / (alpha + sigma)`: the noise level whatever the scale, from 0 to 1, float64 `[T]`."""
    alpha, sigma = schedule.alpha.double().numpy(), schedule.sigma.double().numpy()
    return sigma / (alpha + sigma)


def _sum_at(noise_share: np.ndarray, schedule: Schedule) -> np.ndarray:
    """`alpha + sigma` where a schedule, between its timesteps too, has these noise shares."""
    if schedule.times is not None:
        return np.ones_like(noise_share)
    return 1 / np.hypot(1 - noise_share, noise_share)


@dataclass(frozen=True, kw_only=True)
class TimestepDensity:
    """How often times are drawn that are not drawn uniformly (Esser et al., 2024, arXiv 2403.03206, section 3.1).

    Attributes:
        kind: `logit_normal`, more often in the middle, or `mode`, which reaches the ends.
        logit_mean: of `logit_normal`; above 0 for less noise.
        logit_std: of `logit_normal`.
        mode_scale: of `mode`; 0 is uniform.
    """

    kind: Literal["logit_normal", "mode"]
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def time(self, share: float) -> float:
        """A time in [0, 1], the noise growing with it, by diffusers' own function.

        Args:
            share: of a uniform draw, in [0, 1); the same one gives the same time.
        """
        from diffusers.training_utils import compute_density_for_timestep_sampling  # imports transformers

        drawn = compute_density_for_timestep_sampling(
            self.kind,
            batch_size=1,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            generator=torch.Generator().manual_seed(int(share * 2**53)),
        )
        return 1 - drawn.item()  # diffusers counts from the noisy end
