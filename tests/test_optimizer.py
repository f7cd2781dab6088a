"""Optimizers and averages that take less memory on the device."""

import dataclasses
import sys
import types

import pytest
import torch
from diffusers.training_utils import EMAModel

from tests.conftest import tiny_unet
from vkd_gen.training import options as options_module
from vkd_gen.training.optimizer import average_device, average_step, make_average, make_optimizer
from vkd_gen.training.options import TrainingOptions

OPTIONS = TrainingOptions(output_dir="run", learning_rate=3e-4)
GROUPS = [{"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.1}]


@pytest.mark.parametrize(("library", "module"), [("bitsandbytes", "bitsandbytes.optim"), ("torchao", "torchao.optim")])
def test_eight_bits_come_from_the_library_that_is_installed(library, module, monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    monkeypatch.setattr(options_module, "eight_bit_library", lambda: library)
    monkeypatch.setattr("vkd_gen.training.optimizer.eight_bit_library", lambda: library)
    monkeypatch.setitem(sys.modules, library, types.ModuleType(library))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(AdamW8bit=AdamW8bit))
    optimizer = make_optimizer(dataclasses.replace(OPTIONS, optimizer="adamw8bit"), GROUPS, tiny_unet())
    assert type(optimizer) is AdamW8bit
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-4, 0.1)
    assert type(make_optimizer(OPTIONS, GROUPS, tiny_unet())) is torch.optim.AdamW


def test_a_step_of_the_average_is_that_of_diffusers():
    """Also of parameters that do not train."""
    network = tiny_unet()
    network.conv_in.requires_grad_(False)
    ours, theirs = (EMAModel(network.parameters(), use_ema_warmup=True, power=0.75, foreach=True) for _ in range(2))
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average_step(ours, network.parameters())
        theirs.step(network.parameters())
    assert all(torch.equal(one, other) for one, other in zip(ours.shadow_params, theirs.shadow_params, strict=True))


def test_where_the_average_is_kept():
    device = torch.device("meta")  # in place of a GPU
    assert average_device(OPTIONS, device) == device
    kept = make_average(dataclasses.replace(OPTIONS, ema_device="cpu"), tiny_unet().parameters(), device)
    assert kept.shadow_params[0].device.type == "cpu"
    assert make_average(dataclasses.replace(OPTIONS, ema_max_decay=0.0), [], device) is None
