"""What every projector is and does."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vkd_gen.choices import FeatureLoss
from vkd_gen.losses import feature_losses


class Projector(nn.Module):
    """A module whose forward brings student rows `[B, N, Ds]` and target rows `[B, N, Dt]` into one space.

    Args:
        student_channels: Ds.
        target_channels: Dt.
    """

    def __init__(self, student_channels: int, target_channels: int):
        super().__init__()
        if student_channels < 1 or target_channels < 1:
            raise ValueError(f"a projector needs at least 1 channel, not {student_channels} and {target_channels}")
        self.student_channels, self.target_channels = student_channels, target_channels

    def losses(self, student: Tensor, target: Tensor, kind: FeatureLoss = "mse") -> Tensor:
        """Each sample's feature loss `[B]` between student and target rows; see `feature_losses`."""
        student, target = self(student, target)
        return feature_losses(student, target, kind)

    def initialize(self) -> None:
        """Start from the closed form for the rows of forward passes made in training mode so far, if there is one."""

    def after_step(self, step: int) -> None:
        """Bring what is solved up to date: once per optimizer step, with the number made so far, outside any graph."""

    def check_rows(self, student: Tensor, target: Tensor) -> None:
        """Raise a ValueError if the rows do not fit this projector or each other."""
        if (
            student.shape[:-1] != target.shape[:-1]
            or student.shape[-1] != self.student_channels
            or target.shape[-1] != self.target_channels
        ):
            raise ValueError(
                f"expected student rows [..., {self.student_channels}] and target rows [..., "
                f"{self.target_channels}], got {list(student.shape)} and {list(target.shape)}"
            )

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.student_channels} -> {self.target_channels}"


def parameter_groups(network: nn.Module, projectors: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the student's network decayed, projectors never."""
    groups = [{"params": list(network.parameters()), "weight_decay": weight_decay}]
    projector_parameters = [parameter for projector in projectors for parameter in projector.parameters()]
    if projector_parameters:
        groups.append({"params": projector_parameters, "weight_decay": 0.0})
    return groups
