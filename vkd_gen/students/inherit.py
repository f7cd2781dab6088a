"""Weights that a student takes over from its teacher."""

import torch
from torch import nn


@torch.no_grad()
def copy_matching_weights(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy every teacher weight that has the name and the shape of one of the student's.

    For a student with the teacher's widths and fewer layers this keeps the first layers of each block.

    Args:
        student: changed in place.
        teacher: left as it is.

    Returns:
        Names of the copied weights; the others keep the values they had.
    """
    source, target = teacher.state_dict(), student.state_dict()
    copied = [name for name, value in target.items() if name in source and source[name].shape == value.shape]
    for name in copied:
        target[name].copy_(source[name])
    return copied
