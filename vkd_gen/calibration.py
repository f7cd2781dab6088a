"""Statistics of the frozen teacher's features over (image, noise, timestep), taken once before training.

The teacher does not change, so neither do its statistics: no running averages, nothing that depends on the batch.
B batch, N positions, C channels, M timestep bins.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vkd_gen.features import to_rows
from vkd_gen.normalization import FeatureStatistics, timestep_bins
from vkd_gen.schedule import Schedule


class _Moments:
    """Sums of one layer's rows, float64."""

    def __init__(self, channels: int, num_bins: int, device: torch.device):
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros(num_bins, **options)
        self.sum = torch.zeros(num_bins, channels, **options)
        self.product = torch.zeros(channels, channels, **options)
        self.layer_norm_sum = torch.zeros(channels, **options)
        self.layer_norm_product = torch.zeros(channels, channels, **options)

    def add(self, rows: Tensor, bins: Tensor) -> None:
        """Rows `[B, N, C]` and each sample's bin `[B]`."""
        rows = rows.double()
        self.count.index_add_(0, bins, torch.full_like(bins, rows.shape[1], dtype=torch.float64))
        self.sum.index_add_(0, bins, rows.sum(1))
        normed = F.layer_norm(rows, rows.shape[-1:]).flatten(0, 1)
        rows = rows.flatten(0, 1)
        self.product += rows.T @ rows
        self.layer_norm_sum += normed.sum(0)
        self.layer_norm_product += normed.T @ normed

    def statistics(self, num_train_timesteps: int) -> FeatureStatistics:
        total = self.count.sum()
        mean = self.sum / self.count.clamp(min=1)[:, None]
        share = self.count / total
        between = (mean * share[:, None]).T @ mean
        layer_norm_mean = self.layer_norm_sum / total
        return FeatureStatistics(
            mean=mean.cpu(),
            share=share.cpu(),
            covariance=(self.product / total - between).cpu(),
            layer_norm_covariance=(
                self.layer_norm_product / total - torch.outer(layer_norm_mean, layer_norm_mean)
            ).cpu(),
            num_train_timesteps=num_train_timesteps,
        )


@torch.no_grad()
def calibrate(
    teacher: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    batches: Iterable[Mapping[str, Any]],
    schedule: Schedule,
    *,
    num_timestep_bins: int = 10,
) -> dict[str, FeatureStatistics]:
    """Mean per timestep bin and covariance of every layer that the teacher captures.

    Args:
        teacher: a `FrozenTeacher`.
        batches: each with `sample` and `noise` `[B, C, H, W]`, `timesteps` `[B]` and, if the teacher needs it,
            `conditioning`. Every process must be given the same ones. A few thousand images are plenty.
        schedule: that the student is trained on.
        num_timestep_bins: M, bins of equal width in the timestep.

    Returns:
        Teacher layer -> statistics, float64, on the CPU.

    Raises:
        ValueError: if a bin gets no sample at all, or for a count below 1.
    """
    if num_timestep_bins < 1:
        raise ValueError(f"num_timestep_bins must be at least 1, not {num_timestep_bins}")
    moments: dict[str, _Moments] = {}
    for batch in batches:
        timesteps = batch["timesteps"]
        noisy_sample = schedule.noisy(batch["sample"], batch["noise"], timesteps)
        _, features = teacher(noisy_sample, timesteps, batch.get("conditioning"))
        if not features:
            raise ValueError("the teacher hands over no features; name its layers when building FrozenTeacher")
        bins = timestep_bins(timesteps, num_timestep_bins, len(schedule))
        for layer, feature in features.items():
            rows = to_rows(feature)
            if layer not in moments:
                moments[layer] = _Moments(rows.shape[-1], num_timestep_bins, rows.device)
            moments[layer].add(rows, bins)
    statistics = {layer: moment.statistics(len(schedule)) for layer, moment in moments.items()}
    if any(bool((entry.share == 0).any()) for entry in statistics.values()) or not statistics:
        raise ValueError(f"too few samples to calibrate on: not every one of {num_timestep_bins} timestep bins has one")
    return statistics
