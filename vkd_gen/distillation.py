"""The step that every recipe shares: a frozen teacher, a projected student, and their losses by name.

    losses = distillation_losses(student, batch, schedule=schedule, teacher=teacher)
    losses["total"].backward()

B batch, C channels, H height, W width, N positions, K channels of the compared space.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn

from vkd_gen.calibration import calibrate
from vkd_gen.families import family_of
from vkd_gen.families.family import cast
from vkd_gen.features import FeatureCapture, to_rows
from vkd_gen.losses import FeatureLoss, prediction_loss, weighted_mean
from vkd_gen.normalization import FeatureNormalizer, width_floor
from vkd_gen.pairing import LayerPair, pair_table
from vkd_gen.projectors import Projector
from vkd_gen.schedule import Crossing, PredictionType, Schedule, TimestepWeighting


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the loss; 0 removes a term with its cost.

    Attributes:
        denoising: of the error against the noise (or sample, or velocity) that was drawn.
        output: of the error against the teacher's prediction.
        feature: of the feature loss, summed over the layer pairs.
    """

    denoising: float = 1.0
    output: float = 1.0
    feature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what would train on nothing or away from the goal."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"the {name} weight must be at least 0 and finite, not {value}")
        if not any(vars(self).values()):
            raise ValueError("all weights are 0: nothing is left to train on")


class FrozenTeacher:
    """A teacher that is only ever asked: eval mode, no gradients, outside of every optimizer and wrapper.

    Args:
        unet: a denoiser of a known family, bare; it is put into eval mode, its parameters require gradients no more.
        layers: names of the layers whose features are wanted, as for `FeatureCapture`.
        prediction_type: what the network predicts.
        crossing: from the student's schedule, which noisy samples, timesteps and predictions are of; None where the
            teacher's is the same.
    """

    def __init__(
        self,
        unet: ModelMixin,
        layers: Iterable[str] = (),
        *,
        prediction_type: PredictionType = "epsilon",
        crossing: Crossing | None = None,
    ):
        self.unet = unet.eval().requires_grad_(False)
        self.prediction_type = prediction_type
        self.crossing = None if crossing is None else crossing.to(next(unet.parameters()).device)
        self._family = family_of(unet)
        self._capture = FeatureCapture(unet, dict.fromkeys(layers), self._family.feature)
        self._compiled: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None

    @torch.no_grad()
    def __call__(
        self,
        noisy_sample: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Any] | None = None,
        *,
        with_features: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's prediction `[B, C, H, W]`, float32, and its features by layer name, in its own precision."""
        run = self._compiled or self._predict
        return run(noisy_sample, timesteps, conditioning or {}, with_features)

    def _predict(
        self, noisy_sample: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any], with_features: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if with_features:
            self._capture.start()
        dtype = next(self.unet.parameters()).dtype  # its own property walks through all modules
        crossing, times = self.crossing, timesteps
        if crossing is not None:
            noisy_sample, times = crossing.enter(noisy_sample, timesteps)
        prediction = self._family.call(self.unet, noisy_sample.to(dtype), times, cast(conditioning, dtype)).float()
        if crossing is not None:
            prediction = crossing.leave(prediction, timesteps, self.prediction_type)
        return prediction, self._capture.stop() if with_features else {}

    def compiled(
        self,
        *,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        options: dict[str, Any] | None = None,
    ) -> "FrozenTeacher":
        """The same teacher through torch.compile, whose arguments these are. This one, and `.unet`, stay as they are.

        A graph is of one batch size: ask the compiled teacher for training batches, this one for all others.
        """
        teacher = copy.copy(self)
        teacher._compiled = torch.compile(
            self._predict, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic, options=options
        )
        return teacher


class ProjectedStudent(nn.Module):
    """The one module that trains: the student with a normaliser and a projector for each layer pair.

    Its forward does all trainable work, so it is right under DDP, gradient accumulation and compile, as one graph. What
    is exported is `.student`, a plain diffusers model. Keep the module in float32 and use autocast for half precision.
    Compile the DDP wrapper, not the module inside it.

    Args:
        student: a denoiser of a known family, bare.
        layer_pairs: from `pair_layers`; may be empty.
        projectors: one per pair.
        normalizers: one per pair; empty ones are filled by `calibrate` or by loading a checkpoint.
        schedule: of the student; needed where that is told other times than the schedule's timesteps (flow matching).

    Raises:
        ValueError: if their numbers or widths do not match.
    """

    def __init__(
        self,
        student: ModelMixin,
        layer_pairs: Sequence[LayerPair] = (),
        projectors: Sequence[Projector] = (),
        normalizers: Sequence[FeatureNormalizer] = (),
        *,
        schedule: Schedule | None = None,
    ):
        super().__init__()
        if not len(layer_pairs) == len(projectors) == len(normalizers):
            raise ValueError(
                f"{len(layer_pairs)} layer pairs need as many projectors ({len(projectors)}) and "
                f"normalizers ({len(normalizers)})"
            )
        for pair, projector, normalizer in zip(layer_pairs, projectors, normalizers, strict=True):
            expected = (pair.student_channels, normalizer.target_channels, pair.teacher_channels)
            if (projector.student_channels, projector.target_channels, normalizer.channels) != expected:
                raise ValueError(
                    f"pair {pair.student} {pair.student_shape} <- {pair.teacher} {pair.teacher_shape} does not fit a "
                    f"projector {projector.student_channels} -> {projector.target_channels} and a normalizer "
                    f"{normalizer.channels} -> {normalizer.target_channels}"
                )
        self.student = student
        self._family = family_of(student)
        self._family.prepare(student)
        self._times: Tensor | None
        self.register_buffer("_times", None if schedule is None else schedule.times, persistent=False)
        self.layer_pairs = tuple(layer_pairs)
        self.projectors = nn.ModuleList(projectors)
        self.normalizers = nn.ModuleList(normalizers)
        self._capture = FeatureCapture(student, [pair.student for pair in layer_pairs], self._family.feature)
        self._has_compared = False
        # Statistics are kept equal by their own reductions; DDP would overwrite them by the first process' sums.
        parts = {"projectors": self.projectors, "normalizers": self.normalizers}
        self._ddp_params_and_buffers_to_ignore = [
            f"{part}.{name}" for part, module in parts.items() for name, _ in module.named_buffers()
        ]

    def _predict(self, noisy_sample: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        times = timesteps if self._times is None else self._times[timesteps]
        return self._family.call(self.student, noisy_sample, times, conditioning)

    def forward(
        self,
        noisy_sample: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Any] | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
        feature_loss_kind: FeatureLoss = "mse",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the student and compare its features to the teacher's, each pair in one space.

        Args:
            noisy_sample: `[B, C, H, W]`.
            timesteps: `[B]`.
            conditioning: further arguments of the student by name.
            teacher_features: teacher layer -> feature; None captures and compares nothing.
            feature_loss_kind: see `feature_losses`.

        Returns:
            The prediction `[B, C, H, W]`, and student layer -> feature loss of each sample, `[B]`.

        Raises:
            RuntimeError: if a captured feature carries no gradient although the student trains, as happens inside
                reentrant gradient checkpointing.
        """
        dtype = next(self.student.parameters()).dtype  # noise is added in float32 whatever the student's precision
        noisy_sample, conditioning = noisy_sample.to(dtype), cast(conditioning or {}, dtype)
        if teacher_features is None:
            return self._predict(noisy_sample, timesteps, conditioning), {}
        missing = [pair.teacher for pair in self.layer_pairs if pair.teacher not in teacher_features]
        if missing:
            raise ValueError(f"the teacher does not capture {', '.join(missing)}; name them in FrozenTeacher's layers")
        if self.training:
            self._has_compared = True
        self._capture.start()
        prediction = self._predict(noisy_sample, timesteps, conditioning)
        features = self._capture.stop()
        losses = {}
        for pair, projector, normalizer in zip(self.layer_pairs, self.projectors, self.normalizers, strict=True):
            feature = features[pair.student]
            if prediction.requires_grad and not feature.requires_grad:
                raise RuntimeError(
                    f"the feature of {pair.student} carries no gradient; checkpoint with use_reentrant=False"
                )
            try:
                target = normalizer(to_rows(teacher_features[pair.teacher]), timesteps)
            except ValueError as error:
                raise ValueError(f"layer {pair.teacher}: {error}") from error
            losses[pair.student] = projector.losses(to_rows(feature), target, feature_loss_kind)
        return prediction, losses

    def after_step(self, step: int) -> None:
        """Once per optimizer step: let solved projectors take in what they saw, if it compared features."""
        if not self._has_compared:
            return
        self._has_compared = False
        for projector in self.projectors:
            projector.after_step(step)

    def calibrate(
        self,
        teacher: FrozenTeacher,
        batches: Iterable[Mapping[str, Any]],
        schedule: Schedule,
        *,
        start_batches: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """Before the first step: give the normalisers the teacher's statistics, and the projectors their start.

        All of it is in the module's buffers, so a module that is loaded from a checkpoint needs no calibration.

        Args:
            teacher: with the features that the pairs name.
            batches: as for `distillation_losses`, the same on every process; a few thousand samples are plenty.
            schedule: the student's.
            start_batches: fewer batches for the projectors' start; by default the same.

        Raises:
            ValueError: for features that a normaliser can make nothing of, with the layer's name.
        """
        if not self.layer_pairs:
            return
        if start_batches is None:
            start_batches = batches = list(batches)
        normalizers: list[FeatureNormalizer] = list(self.normalizers)  # type: ignore[arg-type]
        statistics = calibrate(teacher, batches, schedule, num_timestep_bins=normalizers[0].num_timestep_bins)
        for pair, normalizer in zip(self.layer_pairs, normalizers, strict=True):
            try:
                normalizer.fill(statistics[pair.teacher])
            except ValueError as error:
                raise ValueError(f"layer {pair.teacher}: {error}") from error
        self.initialize_projectors(teacher, start_batches, schedule)

    @torch.no_grad()
    def initialize_projectors(
        self, teacher: FrozenTeacher, batches: Iterable[Mapping[str, Any]], schedule: Schedule
    ) -> None:
        """The second half of `calibrate`: start the projectors from closed-form solutions for a few batches."""
        self.train()
        for batch in batches:
            noisy_sample = schedule.noisy(batch["sample"], batch["noise"], batch["timesteps"])
            conditioning = batch.get("conditioning")
            _, features = teacher(noisy_sample, batch["timesteps"], conditioning)
            self(noisy_sample, batch["timesteps"], conditioning, features)
        for projector in self.projectors:
            projector.initialize()


def matching_table(projected: ProjectedStudent, loss: FeatureLoss) -> str:
    """`pair_table` with each projector, the floor that the student's width implies, and what whitening discards."""
    columns: dict[str, list[str]] = {"projector": [], f"floor ({loss})": [], "discarded": []}
    for pair, normalizer in zip(projected.layer_pairs, projected.normalizers, strict=True):
        width, floor = pair.student_channels, width_floor(normalizer.target_covariance(), pair.student_channels, loss)
        entries = f"{width} -> {normalizer.target_channels} ({normalizer.kind})", f"{floor:.4f}"
        for column, entry in zip(columns.values(), (*entries, f"{normalizer.discarded:.1%}"), strict=True):
            column.append(entry)
    return pair_table(projected.layer_pairs, columns)


def distillation_losses(
    student: nn.Module,
    batch: Mapping[str, Any],
    *,
    schedule: Schedule | None = None,
    noise_scheduler: SchedulerMixin | None = None,
    teacher: FrozenTeacher | None = None,
    weights: LossWeights = LossWeights(),
    feature_loss_kind: FeatureLoss = "mse",
    timestep_weighting: TimestepWeighting = "uniform",
    snr_gamma: float = 5.0,
) -> dict[str, Tensor]:
    """The losses of one batch: denoising, output distillation and features, all with the same timestep weights.

    Args:
        student: a `ProjectedStudent`, bare or wrapped by DDP, compile or accelerate.
        batch: `sample` and `noise` `[B, C, H, W]`, `timesteps` `[B]`, and where it is needed `conditioning`, further
            arguments of both networks by name.
        schedule: the student's: what it predicts, and what the teacher's prediction is expressed in.
        noise_scheduler: a diffusers scheduler instead, whose schedule is read in each call.
        teacher: may be None where neither output nor features are asked for.
        weights: of the terms.
        feature_loss_kind: see `feature_losses`.
        timestep_weighting: see `Schedule.weights`.
        snr_gamma: of `min_snr`.

    Returns:
        Scalars: `total`, to differentiate, and, unweighted, those that are asked for of `denoising`, `output`,
        `feature` (the sum over layers) and `feature/LAYER`.
    """
    _check_batch(batch)
    sample, noise, timesteps = batch["sample"], batch["noise"], batch["timesteps"]
    conditioning = batch.get("conditioning")
    schedule = _one_schedule(schedule, noise_scheduler, sample.device)
    _check_timesteps(timesteps, len(schedule))
    noisy_sample = schedule.noisy(sample, noise, timesteps)
    features = None
    if weights.output > 0 or weights.feature > 0:
        if teacher is None:
            raise ValueError("output and feature losses need a teacher; pass one or set their weights to 0")
        teacher_prediction, features = teacher(noisy_sample, timesteps, conditioning, with_features=weights.feature > 0)
    compared = features if weights.feature > 0 else None
    prediction, matched = student(noisy_sample, timesteps, conditioning, compared, feature_loss_kind)
    _check_trains(student, prediction)
    per_sample = schedule.weights(timesteps, timestep_weighting, snr_gamma)
    losses: dict[str, Tensor] = {}
    if weights.denoising > 0:
        target = schedule.target(sample, noise, timesteps)
        losses["denoising"] = prediction_loss(prediction, target, per_sample)
    if weights.output > 0:
        target = schedule.convert(teacher_prediction, noisy_sample, timesteps, teacher.prediction_type)
        losses["output"] = prediction_loss(prediction, target, per_sample)
    if weights.feature > 0:
        if not matched:
            raise ValueError("a feature loss is asked for, but the student has no layer pairs")
        layers = {f"feature/{layer}": weighted_mean(values, per_sample) for layer, values in matched.items()}
        losses["feature"] = torch.stack(list(layers.values())).sum()
        losses |= layers
    terms = [weight * losses[name] for name, weight in vars(weights).items() if name in losses]
    return {"total": torch.stack(terms).sum(), **losses}


def _one_schedule(schedule: Schedule | None, noise_scheduler: SchedulerMixin | None, device: torch.device) -> Schedule:
    if (schedule is None) == (noise_scheduler is None):
        raise ValueError("pass either a schedule or a diffusers noise_scheduler")
    return Schedule.of(noise_scheduler).to(device) if schedule is None else schedule


def _check_batch(batch: Mapping[str, Any]) -> None:
    if missing := [name for name in ("sample", "noise", "timesteps") if name not in batch]:
        raise ValueError(f"the batch has no {' and no '.join(missing)}; it needs sample, noise and timesteps")
    sample, noise = batch["sample"], batch["noise"]
    if sample.shape != noise.shape or not len(sample):
        raise ValueError(
            f"sample and noise must have one shape, of at least one sample, not {list(sample.shape)} and "
            f"{list(noise.shape)}"
        )


def _check_timesteps(timesteps: Tensor, num_timesteps: int) -> None:
    timesteps = torch.as_tensor(timesteps)
    # On a GPU a look at the values would wait for it.
    is_outside = timesteps.device.type == "cpu" and not ((timesteps >= 0) & (timesteps < num_timesteps)).all()
    if timesteps.is_floating_point() or is_outside:
        raise ValueError(
            f"timesteps must be whole numbers from 0 to {num_timesteps - 1}, the schedule's, not {timesteps.dtype} "
            f"from {timesteps.min().item()} to {timesteps.max().item()}"
        )


def _check_trains(student: nn.Module, prediction: Tensor) -> None:
    if torch.is_grad_enabled() and student.training and not prediction.requires_grad:
        raise ValueError(
            "no parameter of the student requires gradients: is it the teacher's own UNet, which FrozenTeacher "
            "freezes? Give the student one of its own, as build_student makes"
        )
