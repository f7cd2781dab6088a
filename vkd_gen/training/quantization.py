"""A frozen teacher whose weights are kept in 8 bits."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from vkd_gen.distillation import FrozenTeacher
from vkd_gen.schedule import Schedule
from vkd_gen.text import reason

PER_OUTPUT = 5
"""Bytes that torchao keeps for each output of a linear layer beside its weights: factor and zero point."""


@torch.no_grad()
def quantize_teacher(teacher: FrozenTeacher, schedule: Schedule, batch: Mapping[str, Any]) -> str:
    """Put a teacher's weights into 8 bits, see `quantize`, and say what that saves and changes.

    Args:
        teacher: in the precision that it is asked in, on its device.
        schedule: of its training, on the device.
        batch: draws that its predictions before and after are compared on.

    Raises:
        ValueError: in one line, see `quantize`.
    """
    noisy = schedule.noisy(batch["sample"], batch["noise"], batch["timesteps"])
    size, left = sum(value.nbytes for value in teacher.unet.parameters()), quantized_bytes(teacher.unet)

    def predict() -> Tensor:
        return teacher(noisy, batch["timesteps"], batch.get("conditioning"), with_features=False)[0]

    whole = predict()
    quantize(teacher.unet)
    error = (predict() - whole).square().mean() / whole.square().mean()
    return (
        f"the teacher's linear layers are in 8 bits: {left / 1e6:,.1f} MB of weights in place of {size / 1e6:,.1f}; "
        f"its prediction is off by {error:.1e} of its power"
    )


def quantize(network: ModelMixin) -> None:
    """Keep the weights of a network's linear layers in 8 bits, each output's with a factor of its own, by torchao.

    They are multiplied out where they are used, in the precision that the network has. Convolutions stay as they are,
    which torchao has no such form for. The network trains no more, and cannot be saved.

    Raises:
        ValueError: in one line, where torchao is not installed, or not for this version of torch.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(network, Int8WeightOnlyConfig(set_inductor_config=False))
    except Exception as error:  # what does not fit this version of torch fails in all kinds of ways
        raise ValueError(
            f"--teacher_quantization int8 needs a torchao for torch {torch.__version__} ({reason(error)}): pip install "
            "torchao, or leave it out"
        ) from error


def quantized_bytes(network: nn.Module) -> int:
    """Bytes that the parameters of a network take once its linear layers are in 8 bits; it may be without weights."""
    kept = sum(value.nbytes for value in network.parameters())
    linear = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    return kept - sum(weight.nbytes - weight.numel() - PER_OUTPUT * len(weight) for weight in linear)
