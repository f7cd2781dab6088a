"""Projectors to compare the orthogonal ones with: a free linear map, and none."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd_gen.projectors.base import Projector


class LinearProjector(Projector):
    """A free linear map with bias, trained: the 1x1 convolution of FitNets (Romero et al., 2015, arXiv 1412.6550)."""

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
    """No projection, for equal widths: compared as they are, as BK-SDM does (Kim et al., 2023, arXiv 2305.15798)."""

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
