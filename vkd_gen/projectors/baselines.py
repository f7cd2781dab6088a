"""Projectors to compare the orthogonal ones with: free linear maps, solved or trained, and none."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd_gen.projectors.base import Projector, check_refresh
from vkd_gen.projectors.statistics import RunningCrossCovariance, same_everywhere


class LeastSquaresProjector(Projector):
    """A free linear map in closed form: the regression of the target rows on the student's, from running statistics.

    What `LinearProjector` learns, solved as `OrthogonalProjector` solves its rotation: nothing is trained, and the map
    stretches and squeezes directions as the regression wants. `(S - mean) W` is compared to `T - mean`.

    Args:
        student_channels: Ds.
        target_channels: Dt.
        momentum: of the running statistics.
        refresh_every_steps: optimizer steps between two solutions.
        ridge: share of the student rows' mean variance added to every direction's before it is inverted.

    Raises:
        ValueError: for a value outside its range.
    """

    solution: Tensor

    def __init__(
        self,
        student_channels: int,
        target_channels: int,
        *,
        momentum: float = 0.99,
        refresh_every_steps: int = 10,
        ridge: float = 1e-3,
    ):
        super().__init__(student_channels, target_channels)
        check_refresh(refresh_every_steps)
        if not 0 < ridge < math.inf:
            raise ValueError(f"the ridge must be above 0 and finite, not {ridge}")
        self.refresh_every_steps, self.ridge = refresh_every_steps, ridge
        # Against student and target rows side by side: the student's own covariance is the left part.
        self.statistics = RunningCrossCovariance(student_channels, student_channels + target_channels, momentum)
        self.register_buffer("solution", torch.eye(student_channels, target_channels))

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Regressed student rows and centred target rows, float32, both `[B, N, Dt]`.

        In training mode the rows also enter the running statistics. No gradient flows into the target.
        """
        self.check_rows(student, target)
        with torch.autocast(student.device.type, enabled=False):
            student, target = student.float(), target.detach().float()
            if self.training:
                both = torch.cat([student.detach(), target], dim=-1)
                self.statistics.accumulate(student.flatten(0, -2), both.flatten(0, -2))
            target_mean = self.statistics.target_mean[self.student_channels :]
            return (student - self.statistics.student_mean) @ self.solution, target - target_mean

    def after_step(self, step: int) -> None:
        """Fold the rows in, and after the first step and every `refresh_every_steps` solve anew."""
        self.statistics.merge()
        if step == 1 or step % self.refresh_every_steps == 0:
            self._solve()

    def initialize(self) -> None:
        """Start from the closed form for the rows of forward passes made in training mode so far, without any step."""
        self.statistics.restart()
        self._solve()

    @torch.no_grad()
    def _solve(self) -> None:
        own, cross = self.statistics.cross_covariance.double().split([self.student_channels, self.target_channels], 1)
        own = (own + own.T) / 2
        amount = self.ridge * own.diagonal().mean().clamp(min=1e-12)
        factor, failed = torch.linalg.cholesky_ex(
            own + amount * torch.eye(len(own), dtype=own.dtype, device=own.device)
        )
        solution = same_everywhere(torch.cholesky_solve(cross, factor).float())
        keep = (failed > 0) | ~solution.isfinite().all() | (self.statistics.num_merges == 0)
        self.solution.copy_(torch.where(keep, self.solution, solution))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{super().extra_repr()}, ridge {self.ridge}"


class LinearProjector(Projector):
    """A free linear map with bias, trained: the 1x1 convolution of FitNets (Romero et al., 2015, arXiv 1412.6550).

    Args:
        student_channels: Ds.
        target_channels: Dt.
    """

    def __init__(self, student_channels: int, target_channels: int):
        super().__init__(student_channels, target_channels)
        self.linear = nn.Linear(student_channels, target_channels)

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Projected student rows and the target, both `[B, N, Dt]`."""
        self.check_rows(student, target)
        if not torch.is_autocast_enabled(student.device.type):  # which chooses the precision itself
            student = student.to(self.linear.weight.dtype)
        return self.linear(student), target.detach()


class IdentityProjector(Projector):
    """No projection: student and target are compared as they are, as BK-SDM does (Kim et al., 2023, arXiv 2305.15798).

    Raises:
        ValueError: if the widths differ.
    """

    def __init__(self, student_channels: int, target_channels: int):
        super().__init__(student_channels, target_channels)
        if student_channels != target_channels:
            raise ValueError(
                f"without a projector student and target need equal widths, not {student_channels} and "
                f"{target_channels}; use another projector"
            )

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Both as they came."""
        self.check_rows(student, target)
        return student, target.detach()
