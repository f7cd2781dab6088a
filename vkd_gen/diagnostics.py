"""What the feature loss does to a student, seen on a fixed probe: figures for a log, none of them trained on.

    diagnostics = Diagnostics(projected, teacher, probe, schedule=schedule)
    values = diagnostics(LossWeights(feature=0.3))

B batch, N positions, C channels.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vkd_gen.distillation import FrozenTeacher, LossWeights, ProjectedStudent, distillation_losses
from vkd_gen.families import family_of
from vkd_gen.features import FeatureCapture, to_rows
from vkd_gen.losses import FeatureLoss
from vkd_gen.normalization import timestep_bins, width_floor
from vkd_gen.schedule import Schedule, TimestepWeighting


def effective_rank(rows: Float[Tensor, "rows channels"]) -> float:
    """Effective number of directions that rows vary in: exp of the entropy of their covariance's spectrum.

    From 1 to the smaller of both sizes; 0 for rows that do not vary. Roy and Vetterli, 2007.
    """
    rows = rows.double()
    rows = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0)
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


class Diagnostics:
    """Gradients, feature losses by timestep and spectra of a projected student, on the same few draws each time.

    The draws should be those that no step trains on, the same on every process. Build it before the student is wrapped:
    it attaches hooks.

    Args:
        projected: the student with its layer pairs.
        teacher: with the features that the pairs name.
        batches: as for `distillation_losses`, a hundred draws or so in all.
        schedule: the student's.
        feature_loss_kind: as in training, like the two after it.
        timestep_weighting: see `Schedule.weights`.
        snr_gamma: of `min_snr`.
        num_timestep_bins: bins of equal width that the feature losses are told apart by.
    """

    def __init__(
        self,
        projected: ProjectedStudent,
        teacher: FrozenTeacher,
        batches: Iterable[Mapping[str, Any]],
        *,
        schedule: Schedule,
        feature_loss_kind: FeatureLoss = "mse",
        timestep_weighting: TimestepWeighting = "uniform",
        snr_gamma: float = 5.0,
        num_timestep_bins: int = 5,
    ):
        self._projected, self._teacher, self._batches = projected, teacher, list(batches)
        self._schedule, self._kind = schedule, feature_loss_kind
        self._weighting: dict[str, Any] = {"timestep_weighting": timestep_weighting, "snr_gamma": snr_gamma}
        if not self._batches:
            raise ValueError("no batches to look at")
        if num_timestep_bins < 1:
            raise ValueError(f"num_timestep_bins must be at least 1, not {num_timestep_bins}")
        self._num_bins = num_timestep_bins
        student, layers = projected.student, [pair.student for pair in projected.layer_pairs]
        self._capture = FeatureCapture(student, layers, family_of(student).feature)
        self._teacher_ranks: dict[str, float] = {}

    def __call__(self, weights: LossWeights) -> dict[str, float]:
        """Measure once, with the weights of this step; the student and its statistics stay as they are.

        Returns:
            Figures by name, gradients of the terms that have a weight:
            `gradient/TERM`: norm of the gradient of each term, times its weight, over the student's weights;
            `gradient_cosine/feature-TERM`: between the feature loss' gradient and those of the others;
            `gradient_ratio`: norm of the feature loss' weighted gradient over that of the other terms' sum;
            `feature/LAYER/tFIRST-LAST`: a student layer's loss in a bin of timesteps;
            `floor/LAYER`: what the student's width leaves of that loss at best, over all timesteps;
            `rank/student/LAYER`, `rank/teacher/LAYER`: effective ranks of their features;
            `gain/LAYER`: of an orthogonal projector.
        """
        modes = [(module, module.training) for module in self._projected.modules()]
        self._projected.eval()  # so that no projector takes these rows in
        try:
            return {**self._gradients(weights), **self._features()}
        finally:
            for module, was_training in modes:
                module.training = was_training

    def _gradients(self, weights: LossWeights) -> dict[str, float]:
        parameters = [parameter for parameter in self._projected.student.parameters() if parameter.requires_grad]
        terms = {name: weight for name, weight in vars(weights).items() if weight > 0}
        size = sum(parameter.numel() for parameter in parameters)
        gradients = {name: torch.zeros(size, dtype=torch.float64, device=parameters[0].device) for name in terms}
        num_draws = sum(len(batch["timesteps"]) for batch in self._batches)
        for batch in self._batches:
            losses = distillation_losses(
                self._projected,
                batch,
                schedule=self._schedule,
                teacher=self._teacher,
                weights=weights,
                feature_loss_kind=self._kind,
                **self._weighting,
            )
            share = len(batch["timesteps"]) / num_draws
            for name, weight in terms.items():
                term = weight * share * losses[name]
                found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
                gradients[name] += torch.cat([part.flatten() for part in parts])
        values = {f"gradient/{name}": float(gradient.norm()) for name, gradient in gradients.items()}
        feature = gradients.pop("feature", None)
        if feature is not None and gradients:
            together = torch.stack(list(gradients.values())).sum(0)
            values["gradient_ratio"] = float(feature.norm() / together.norm())
            for name, gradient in gradients.items():
                cosine = torch.nn.functional.cosine_similarity(feature, gradient, dim=0)
                values[f"gradient_cosine/feature-{name}"] = float(cosine)
        return values

    @torch.no_grad()
    def _features(self) -> dict[str, float]:
        seen: dict[tuple[str, str], list[Tensor]] = defaultdict(list)  # (what, layer) -> a tensor for each batch
        for batch in self._batches:
            timesteps, conditioning = batch["timesteps"], batch.get("conditioning")
            noisy_sample = self._schedule.noisy(batch["sample"], batch["noise"], timesteps)
            _, teacher_features = self._teacher(noisy_sample, timesteps, conditioning)
            self._capture.start()
            _, losses = self._projected(noisy_sample, timesteps, conditioning, teacher_features, self._kind)
            found = {"student": self._capture.stop(), "loss": losses, "timestep": {"": timesteps}}
            if not self._teacher_ranks:
                found["teacher"] = teacher_features
            for what, by_layer in found.items():
                for layer, value in by_layer.items():
                    seen[what, layer].append(value if value.ndim == 1 else to_rows(value).flatten(0, 1))
        ranks = {key: effective_rank(torch.cat(seen[key])) for key in seen if key[0] in ("student", "teacher")}
        self._teacher_ranks |= {layer: rank for (what, layer), rank in ranks.items() if what == "teacher"}
        bins = timestep_bins(torch.cat(seen["timestep", ""]), self._num_bins, len(self._schedule))
        edges = [-(-number * len(self._schedule) // self._num_bins) for number in range(self._num_bins + 1)]
        values: dict[str, float] = {}
        projected = self._projected
        for pair, projector, normalizer in zip(
            projected.layer_pairs, projected.projectors, projected.normalizers, strict=True
        ):
            layer = pair.student
            by_sample = torch.cat(seen["loss", layer])
            for number in bins.unique().tolist():
                name = f"feature/{layer}/t{edges[number]}-{edges[number + 1] - 1}"
                values[name] = float(by_sample[bins == number].mean())
            values[f"floor/{layer}"] = width_floor(normalizer.target_covariance(), pair.student_channels, self._kind)
            values[f"rank/student/{layer}"] = ranks["student", layer]
            values[f"rank/teacher/{layer}"] = self._teacher_ranks[pair.teacher]
            if hasattr(projector, "gain"):
                values[f"gain/{layer}"] = projector.gain.item()
        return values


@torch.no_grad()
def guidance_gap_ratio(
    projected: ProjectedStudent,
    teacher: FrozenTeacher,
    batches: Iterable[Mapping[str, Any]],
    nothing: Callable[[dict[str, Any]], Mapping[str, Any]],
    schedule: Schedule,
) -> float:
    """What guidance has to multiply in the student, over what it has in the teacher; 1 is ideal (arXiv 2606.00798).

    The mean over draws of the norm of a network's prediction with the draw's conditioning minus that without, of the
    student, divided by that of the teacher, both in the student's prediction type. NaN for a teacher without a gap.

    Args:
        projected: the student; its mode is restored.
        teacher: that it learns from.
        batches: as for `distillation_losses`, of draws that are told what they are.
        nothing: conditioning of a batch -> that of the same draws, told nothing.
        schedule: the student's.
    """
    was_training, gaps = projected.training, torch.zeros(2, dtype=torch.float64)
    projected.eval()
    for batch in batches:
        timesteps, conditioning = batch["timesteps"], batch["conditioning"]
        noisy = schedule.noisy(batch["sample"], batch["noise"], timesteps)
        students, teachers = [], []
        for told in (conditioning, nothing(conditioning)):
            students.append(projected(noisy, timesteps, told)[0].double())
            prediction, _ = teacher(noisy, timesteps, told, with_features=False)
            teachers.append(schedule.convert(prediction, noisy, timesteps, teacher.prediction_type).double())
        found = [torch.linalg.vector_norm((one - other).flatten(1), dim=1) for one, other in (students, teachers)]
        gaps += torch.stack(found).sum(1).cpu()
    projected.train(was_training)
    return float(gaps[0] / gaps[1])
