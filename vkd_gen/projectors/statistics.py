"""Running statistics of student and target rows, which closed forms are solved from."""

import math
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn

from vkd_gen.projectors.matrices import procrustes


def sampling_stride(num_positions: int) -> int:
    """Every how many positions of a sample statistics take one, about 2 sqrt(N) of N: neighbours say nearly the same.

    The stride has no divisor in common with the number of positions, so that it visits all columns of a map.

    Example:
        >>> [sampling_stride(side * side) for side in (1, 4, 8, 32, 64)]
        [1, 3, 5, 17, 33]
    """
    stride = max(1, math.isqrt(num_positions) // 2)
    while math.gcd(stride, num_positions) > 1:
        stride += 1
    return stride


class RunningCrossCovariance(nn.Module):
    """Exponential moving statistics of student rows and target rows, equal on every process.

    `accumulate` and `accumulate_deviations` add rows (inside the forward pass: matrix products, no communication);
    `merge` reduces the sums over all processes and folds them into the averages (after the optimizer step). The
    averages weigh steps as an exponential moving average without start-up bias does.

    Args:
        student_channels: Ds.
        target_channels: Dt.
        momentum: weight of the past, from 0 (the latest step alone) to below 1.

    Attributes:
        has_means: the running means are of rows, no longer the zeros that they begin with.
    """

    student_mean: Tensor
    target_mean: Tensor
    cross_covariance: Tensor
    student_variance: Tensor
    target_variance: Tensor
    num_merges: Tensor
    sums: Tensor

    def __init__(self, student_channels: int, target_channels: int, momentum: float):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
        self.momentum = momentum
        self._is_narrow = student_channels <= target_channels
        self.register_buffer("student_mean", torch.zeros(student_channels))
        self.register_buffer("target_mean", torch.zeros(target_channels))
        self.register_buffer("cross_covariance", torch.zeros(student_channels, target_channels))
        self.register_buffer("student_variance", torch.zeros(()))  # trace of the covariance
        self.register_buffer("target_variance", torch.zeros(()))
        self.register_buffer("num_merges", torch.zeros((), dtype=torch.long))
        # Sums since the last merge, about the running means: (count, mean offsets, second moments) in one vector,
        # so that one reduction carries them all.
        size = 3 + student_channels + target_channels + student_channels * target_channels
        self.register_buffer("sums", torch.zeros(size, dtype=torch.float64), persistent=False)
        self.has_means = False
        self.register_load_state_dict_post_hook(_note_means)

    @torch.no_grad()
    def accumulate(self, student: Float[Tensor, "rows student"], target: Float[Tensor, "rows target"]) -> None:
        """Add rows to the sums.

        The large products are taken of rows centred on themselves, where float32 is exact enough however far from zero
        they lie, and moved to the running means in float64.
        """
        student, target = student.detach().float(), target.detach().float()
        count = len(student)
        student_centre, target_centre = student.sum(0) / max(count, 1), target.sum(0) / max(count, 1)
        student, target = student - student_centre, target - target_centre
        student_shift = student_centre.double() - self.student_mean
        target_shift = target_centre.double() - self.target_mean
        student_offset, target_offset = count * student_shift, count * target_shift
        scalars = [
            torch.full_like(self.sums[0], count),  # filled on the device: nothing to wait for
            _squares(student) + student_shift @ student_offset,
            _squares(target) + target_shift @ target_offset,
        ]
        product = torch.addr((student.T @ target).double(), student_offset, target_shift)
        self.sums += torch.cat([torch.stack(scalars), student_offset, target_offset, product.flatten()])

    @torch.no_grad()
    def accumulate_deviations(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> None:
        """Add float32 rows, given as deviations from the running means, to the sums: cheaper, where those are known."""
        student = student.detach()
        count, positions = student.shape[0] * student.shape[1], student.shape[1]
        scalars = [torch.full_like(self.sums[0], count), _squares(student), _squares(target)]
        offsets = [deviations.sum(1).sum(0) for deviations in (student, target)]
        channels = student.shape[2], target.shape[2]
        if channels[0] * channels[1] <= positions * sum(channels):  # smaller than a copy, row after row, would be
            product = torch.bmm(student.mT, target).sum(0)
        else:
            product = student.flatten(0, 1).T @ target.flatten(0, 1)
        self.sums += torch.cat([torch.stack(scalars), *offsets, product.flatten()])

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the sums of all processes into the averages and clear them; without new rows nothing changes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        widths = [3, len(self.student_mean), len(self.target_mean), self.cross_covariance.numel()]
        count = self.sums[0]
        # A step with a non-finite feature counts as one without rows: it must not poison the averages.
        has_rows = (count > 0) & self.sums.sum().isfinite()
        means = torch.where(has_rows, self.sums / count, 0.0)
        scalars, student_offset, target_offset, product = means.split(widths)
        self.num_merges += has_rows
        # (1 - m) / (1 - m^n): the n-th step's weight in the average of n steps
        weight = has_rows.double() * (1 - self.momentum) / (1 - self.momentum ** self.num_merges.clamp(min=1).double())
        # Second moments are about the old mean; the new one follows the rows by a share of the offset.
        product = torch.addr(product.view_as(self.cross_covariance), weight * student_offset, target_offset, alpha=-1)
        moved = torch.stack([student_offset @ student_offset, target_offset @ target_offset])
        student_variance, target_variance = (scalars[1:] - weight * moved).unbind()
        for average, value in (
            (self.cross_covariance, product),
            (self.student_variance, student_variance),
            (self.target_variance, target_variance),
        ):
            average.copy_(torch.lerp(average.double(), value, weight))
        self.student_mean += weight * student_offset
        self.target_mean += weight * target_offset
        self.sums.zero_()
        self.has_means = True

    def restart(self) -> None:
        """Forget the averages: rows added since the last merge count as the first step; without any, a ValueError."""
        self.num_merges.zero_()
        self.merge()
        if self.num_merges == 0:
            raise ValueError("no rows to start from: make forward passes in training mode before initialize()")

    def narrow_to_wide(self) -> Float[Tensor, "narrow wide"]:
        """The cross-covariance with the narrower side's channels as rows, as orthonormal P has them."""
        return self.cross_covariance if self._is_narrow else self.cross_covariance.T

    @torch.no_grad()
    def solve(self) -> Float[Tensor, "narrow wide"]:
        """The P that brings student and target rows closest, equal on every process."""
        return same_everywhere(procrustes(self.narrow_to_wide()))

    @torch.no_grad()
    def gain(self, matrix: Float[Tensor, "narrow wide"]) -> Float[Tensor, ""]:
        """The factor of the student's centred rows that fits P in the least-squares sense."""
        return (matrix * self.narrow_to_wide()).sum() / self.student_variance.clamp(min=1e-12)


def same_everywhere(matrix: Tensor) -> Tensor:
    """The first process' values on all: unlike devices may round the same solution differently."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(matrix, 0)
    return matrix


def _squares(rows: Float[Tensor, "... rows channels"]) -> Float[Tensor, ""]:
    """Sum of all squares, float64. By way of norms of parts: needs no copy, and is exact for any number of rows."""
    return torch.linalg.vector_norm(rows, dim=(-2, -1) if rows.ndim == 3 else -1).square().sum(dtype=torch.float64)


def _note_means(statistics: RunningCrossCovariance, _incompatible_keys: Any) -> None:
    """After loading."""
    statistics.has_means = bool(statistics.num_merges > 0)
