"""What moves the weights, and what averages them: torch's and diffusers' own, or smaller ones where asked for."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from vkd_gen.training.muon import Muon
from vkd_gen.training.options import TrainingOptions, eight_bit_library


def make_optimizer(
    options: TrainingOptions, parameter_groups: list[dict[str, Any]], network: nn.Module
) -> torch.optim.Optimizer:
    """As the options say: torch's AdamW, that of 8 bits of the library that is installed, or Muon.

    Args:
        options: of the run.
        parameter_groups: all that trains.
        network: of it, whose matrices Muon moves.
    """
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameter_groups, lr=options.learning_rate, fused=True)
    if options.optimizer == "muon":
        return Muon(parameter_groups, network, options.learning_rate)
    name = "bitsandbytes.optim" if eight_bit_library() == "bitsandbytes" else "torchao.optim"
    return importlib.import_module(name).AdamW8bit(parameter_groups, lr=options.learning_rate)


def make_average(options: TrainingOptions, parameters: Iterable[nn.Parameter], device: torch.device) -> EMAModel | None:
    """Diffusers' moving average, where the options say that it is kept; None for a run without one.

    Args:
        options: of the run.
        parameters: to average.
        device: of the steps.
    """
    if not options.ema_max_decay:
        return None
    average = EMAModel(parameters, decay=options.ema_max_decay, use_ema_warmup=True, power=0.75, foreach=True)
    average.to(average_device(options, device))
    return average


def average_device(options: TrainingOptions, device: torch.device) -> torch.device:
    """Where the moving average is kept, in a run on a device."""
    return torch.device("cpu") if options.ema_device == "cpu" else device


def average_step(average: EMAModel, parameters: Iterable[nn.Parameter]) -> None:
    """A step of diffusers' moving average, wherever it is kept."""
    device = average.shadow_params[0].device
    # Copies that require gradients as the parameters do: others diffusers copies into the average.
    average.step([value.detach().to(device).requires_grad_(value.requires_grad) for value in parameters])
