"""Projectors that hold an orthonormal matrix P, solved or learned: no direction is stretched or squeezed (VkD)."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd_gen.choices import FeatureLoss
from vkd_gen.losses import squared_errors
from vkd_gen.projectors.base import Projector
from vkd_gen.projectors.matrices import completed, orthonormality_error
from vkd_gen.projectors.statistics import RunningCrossCovariance, sampling_stride

ProjectorMethod = Literal["solved", "cayley", "matrix_exp", "fixed"]
Start = Tensor | Literal["identity", "procrustes"]


def OrthogonalProjector(
    student_channels: int,
    target_channels: int,
    *,
    method: ProjectorMethod = "solved",
    start: Start = "identity",
    momentum: float = 0.99,
    refresh_every_steps: int = 10,
) -> "SolvedProjector | LearnedProjector":
    """Compare student and target through an orthonormal matrix P: no direction is stretched or squeezed (VkD).

    A student narrower than the target is embedded, `g (S - mean) P` against `T - mean`, P P^T = I, so the similarities
    between its rows are kept up to the gain g. A wider student stays and the target is embedded, `g (S - mean)` against
    `(T - mean) P`. P is float32 and orthonormal at every step, whatever the optimizer does.

    The constraint, and the matrix exponential, are of Miles, Elezi, Deng, "VkD", CVPR 2024, arXiv 2403.06213; the
    closed form and the gain are ours.

    Args:
        student_channels: Ds.
        target_channels: Dt, as the normaliser gives them.
        method: `solved`: P, gain and means in closed form, refreshed every few optimizer steps. `cayley`, `matrix_exp`:
            trained by the optimizer. `fixed`: P stays where it starts; gain and means in closed form.
        start: orthonormal rows `[narrow, wide]` that P starts from; `identity`; or `procrustes`: the solution for the
            rows seen before `initialize`, which `solved` always starts from.
        momentum: of the running statistics.
        refresh_every_steps: optimizer steps between two solutions of P.

    Example:
        >>> projector = OrthogonalProjector(4, 8)
        >>> student, target = projector(torch.randn(2, 9, 4), torch.randn(2, 9, 8))
        >>> student.shape, target.shape
        (torch.Size([2, 9, 8]), torch.Size([2, 9, 8]))
    """
    if refresh_every_steps < 1:
        raise ValueError(f"refresh_every_steps must be at least 1, not {refresh_every_steps}")
    match method:
        case "solved" | "fixed":
            return SolvedProjector(student_channels, target_channels, method, start, momentum, refresh_every_steps)
        case "cayley" | "matrix_exp":
            return LearnedProjector(student_channels, target_channels, method, start, momentum)
    raise ValueError(f"unknown projector method {method!r}; choose solved, cayley, matrix_exp or fixed")


class SolvedProjector(Projector):
    """P, gain and means in closed form from running statistics (orthogonal Procrustes); nothing is trained.

    Gradients flow through the projected rows. Arguments are those of `OrthogonalProjector`.
    """

    gain: Tensor
    solution: Tensor

    def __init__(
        self,
        student_channels: int,
        target_channels: int,
        method: Literal["solved", "fixed"],
        start: Start,
        momentum: float,
        refresh_every_steps: int,
    ):
        super().__init__(student_channels, target_channels)
        self.method, self.refresh_every_steps = method, refresh_every_steps
        self.is_wider = student_channels > target_channels
        self._solves_at_start = method == "solved" or (isinstance(start, str) and start == "procrustes")
        self.statistics = RunningCrossCovariance(student_channels, target_channels, momentum)
        self.register_buffer("solution", _first_matrix(start, student_channels, target_channels))
        self.register_buffer("gain", torch.ones(()))

    def matrix(self) -> Float[Tensor, "narrow wide"]:
        """P, with orthonormal rows; a ValueError if it was put into half precision, where it has none."""
        _refuse_half(self.solution)
        return self.solution

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Student and target rows in the wider one's space, float32, both `[B, N, wide]`.

        In training mode rows also enter the running statistics: all until there are means, then some of each sample's
        (`sampling_stride`). No gradient flows into the target.
        """
        self.check_rows(student, target)
        with torch.autocast(student.device.type, enabled=False):
            student, target = self._centred(student, target)
            return _project(student, target, self.matrix(), self.gain, self.is_wider)

    def losses(
        self,
        student: Float[Tensor, "batch positions student"],
        target: Float[Tensor, "batch positions target"],
        kind: FeatureLoss = "mse",
    ) -> Float[Tensor, " batch"]:
        """Each sample's feature loss; where P embeds S, a mean squared error at half of the cost.

        P is an isometry, so ||g S P - T||^2 = ||g S - T P^T||^2 + ||T||^2 - ||T P^T||^2, and only the first of these
        moves the student: nothing as wide as the target has to be made, kept and differentiated.
        """
        if kind != "mse" or self.is_wider:
            return super().losses(student, target, kind)
        self.check_rows(student, target)
        with torch.autocast(student.device.type, enabled=False):
            student, target = self._centred(student, target)
            scale = math.sqrt(self.student_channels / self.target_channels)
            reached = _map_rows(target, scale * self.matrix().T)
            outside = _sample_squares(target) - _sample_squares(reached) / scale**2
            outside = outside.clamp(min=0) / (target.shape[1] * target.shape[2])
            return squared_errors((scale * self.gain) * student, reached) + outside

    def _centred(self, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in float32, about the running means, once the statistics have taken them in."""
        student, target = student.float(), target.detach().float()
        statistics = self.statistics
        if self.training and not statistics.has_means:
            statistics.accumulate(student.flatten(0, -2), target.flatten(0, -2))
        student, target = student - statistics.student_mean, target - statistics.target_mean
        if self.training and statistics.has_means:
            stride = sampling_stride(student.shape[1])
            statistics.accumulate_deviations(student[:, ::stride], target[:, ::stride])
        return student, target

    def after_step(self, step: int) -> None:
        """Bring statistics and gain up to date, and P after the first step and every `refresh_every_steps`."""
        self.statistics.merge()
        self._update(self.method == "solved" and (step == 1 or step % self.refresh_every_steps == 0))

    def initialize(self) -> None:
        """Start from the closed form for the rows seen so far, which count as the statistics' first step."""
        self.statistics.restart()
        self._update(self._solves_at_start)

    @torch.no_grad()
    def _update(self, solves: bool) -> None:
        """Take over the statistics' P, if it is to be solved, and the gain that fits it; without rows, neither."""
        statistics, has_rows = self.statistics, self.statistics.num_merges > 0
        matrix = statistics.solve() if solves else self.solution
        self.gain.copy_(torch.where(has_rows, statistics.gain(matrix), self.gain))
        if solves:
            self.solution.copy_(torch.where(has_rows, matrix, self.solution))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{super().extra_repr()}, {self.method}"


class LearnedProjector(Projector):
    """P = leading rows of base * map(A), A skew and trained, with gain and bias. The base is where it starts: A = 0.

    Weight decay pulls A to 0 and so P to where it started. (torch's own map for rectangular weights turns to zero under
    weight decay: its signs are stored as decayed parameters.) Arguments are those of `OrthogonalProjector`.
    """

    base: Tensor

    def __init__(
        self,
        student_channels: int,
        target_channels: int,
        method: Literal["cayley", "matrix_exp"],
        start: Start,
        momentum: float,
    ):
        super().__init__(student_channels, target_channels)
        self.method = method
        self.is_wider = student_channels > target_channels
        narrow, wide = sorted((student_channels, target_channels))
        self.statistics = RunningCrossCovariance(student_channels, target_channels, momentum)
        self.register_buffer("base", completed(_first_matrix(start, student_channels, target_channels)))
        self.tangent = nn.Parameter(torch.zeros(wide, narrow))
        self.gain = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(wide))
        self._accumulates = isinstance(start, str) and start == "procrustes"  # until it has started there
        self.register_load_state_dict_post_hook(_stop_accumulating)

    def matrix(self) -> Float[Tensor, "narrow wide"]:
        """P, as `SolvedProjector.matrix`."""
        _refuse_half(self.base)
        with torch.autocast(self.tangent.device.type, enabled=False):
            wide, narrow = self.tangent.shape
            # In float64: the exponential drifts to 1e-4 off in float32, and products to 1e-3 in TF32.
            half = torch.cat([self.tangent, self.tangent.new_zeros(wide, wide - narrow)], dim=1).double()
            skew = half - half.T
            if self.method == "matrix_exp":
                rotation = torch.matrix_exp(skew)
            else:
                identity = torch.eye(wide, device=skew.device, dtype=skew.dtype)
                # Never singular, since a skew matrix has no real eigenvalues: a check would wait for the GPU in vain.
                rotation = torch.linalg.solve_ex(identity - skew / 2, identity + skew / 2)[0]
            return (self.base.double() @ rotation[:, :narrow]).T.float()

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Student and target rows in the wider one's space, float32, both `[B, N, wide]`.

        In training mode, before `initialize`, rows also enter the statistics that a start from `procrustes` needs.
        """
        self.check_rows(student, target)
        with torch.autocast(student.device.type, enabled=False):
            student, target = student.float(), target.detach().float()
            if self.training and self._accumulates:
                self.statistics.accumulate(student.flatten(0, -2), target.flatten(0, -2))
            student, target = _project(student, target, self.matrix(), self.gain, self.is_wider)
            return student + self.bias, target

    @torch.no_grad()
    def initialize(self) -> None:
        """From `procrustes`, start from the closed form for the rows seen so far; from elsewhere, stay there."""
        if not self._accumulates:
            return
        statistics = self.statistics
        statistics.restart()
        matrix = statistics.solve()
        self.base.copy_(completed(matrix))
        self.gain.copy_(statistics.gain(matrix))
        if self.is_wider:
            self.bias.copy_(statistics.target_mean @ matrix - self.gain * statistics.student_mean)
        else:
            self.bias.copy_(statistics.target_mean - self.gain * statistics.student_mean @ matrix)
        self._accumulates = False

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{super().extra_repr()}, {self.method}"


def _first_matrix(start: Start, student_channels: int, target_channels: int) -> Float[Tensor, "narrow wide"]:
    """The P to begin with, a copy of the given one."""
    narrow, wide = sorted((student_channels, target_channels))
    if isinstance(start, str) and start not in ("identity", "procrustes"):
        raise ValueError(f"unknown start {start!r}; choose identity or procrustes, or give a matrix")
    matrix = start.detach().float() if isinstance(start, Tensor) else torch.eye(narrow, wide)
    if matrix.shape != (narrow, wide):
        raise ValueError(
            f"start must be a {narrow} x {wide} matrix with orthonormal rows, not one of shape {list(matrix.shape)}"
        )
    if not orthonormality_error(matrix) <= 1e-4:
        raise ValueError(
            f"start must be a {narrow} x {wide} matrix with orthonormal rows; those of the given one are "
            f"{orthonormality_error(matrix):.1g} off"
        )
    return matrix.clone()


def _refuse_half(stored: Tensor) -> None:
    if stored.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the projector is in {stored.dtype}: keep it in float32 (projector.float()), and train under autocast"
        )


def _project(student: Tensor, target: Tensor, matrix: Tensor, gain: Tensor, is_wider: bool) -> tuple[Tensor, Tensor]:
    """Rows in the wider one's space: the narrower ones by way of the matrix, the student's times the gain."""
    if is_wider:
        return gain * student, _map_rows(target, matrix)
    return _map_rows(student, gain * matrix), target


def _stop_accumulating(projector: LearnedProjector, _incompatible_keys: Any) -> None:
    """After loading: a projector that was initialized before it was saved collects nothing more."""
    if projector.statistics.num_merges > 0:
        projector._accumulates = False


def _sample_squares(rows: Float[Tensor, "batch positions channels"]) -> Float[Tensor, " batch"]:
    """Sum of squares of each sample."""
    return torch.linalg.vector_norm(rows, dim=(1, 2)).square()


def _map_rows(
    rows: Float[Tensor, "batch positions channels"], matrix: Float[Tensor, "channels mapped"]
) -> Float[Tensor, "batch positions mapped"]:
    """`rows @ matrix`, in the rows' order in memory: maps have channels one after another, and are not copied."""
    if rows.stride(-1) == 1 or matrix.requires_grad:  # a trained matrix is better multiplied once by all rows
        return rows @ matrix
    return torch.bmm(matrix.T.expand(len(rows), -1, -1), rows.mT).mT
