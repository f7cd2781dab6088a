"""Weights that a student takes over from its teacher."""

import torch
from diffusers import ModelMixin


@torch.no_grad()
def copy_matching_weights(student: ModelMixin, teacher: ModelMixin) -> list[str]:
    """Copy every teacher weight that has the name and the shape of one of the student's.

    For a student with the teacher's widths and fewer layers this keeps the first layers of each block.

    Args:
        student: changed in place.
        teacher: left as it is.

    Returns:
        Names of the copied weights; the others keep the values they had.

    Raises:
        ValueError: if the numbers of stages differ: equal names are then unlike stages.
    """
    stages = [len(unet.config.block_out_channels) for unet in (student, teacher)]
    if stages[0] != stages[1]:
        raise ValueError(f"a student of {stages[0]} stages cannot inherit by name from a teacher of {stages[1]}")
    source, target = teacher.state_dict(), student.state_dict()
    copied = [name for name, value in target.items() if name in source and source[name].shape == value.shape]
    for name in copied:
        target[name].copy_(source[name])
    return copied
