"""Muon: its update, what it moves, and that it goes on as it was."""

import copy

import pytest
import torch
from torch import nn

import vkd_gen as vkd
from tests.conftest import tiny_unet
from vkd_gen.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8), (2, 1, 5)])
def test_singular_vectors_stay_and_values_come_near_to_one(shape):
    """Against torch's singular value decomposition, in double precision."""
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    turned = u.mT @ orthogonalize(matrices).double() @ vh.mT  # diagonal: the singular vectors are the same
    values = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_update_of_torchs_own():
    """torch.optim.Muon's steps on matrices, but for its bfloat16."""
    theirs_class = getattr(torch.optim, "Muon", None)
    if theirs_class is None:
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    network = nn.Linear(24, 12, bias=False)
    other = copy.deepcopy(network)
    ours = Muon([{"params": [network.weight], "weight_decay": 0.1}], network, 1e-2)
    theirs = theirs_class([other.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = network.weight.detach().clone()
    for _ in range(5):
        network.weight.grad = torch.randn(12, 24)
        other.weight.grad = network.weight.grad.clone()
        ours.step()
        theirs.step()
    moved = (network.weight - start).norm()
    assert (network.weight - other.weight).norm() < 0.02 * moved


def test_convolutions_are_matrices():
    torch.manual_seed(0)
    layer, flat = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(27, 8, bias=False)
    gradient = torch.randn(8, 3, 3, 3)
    flat.weight.data.copy_(layer.weight.flatten(1))
    layer.weight.grad, flat.weight.grad = gradient, gradient.flatten(1)
    for network in (layer, flat):
        Muon([{"params": [network.weight], "weight_decay": 0.0}], network, 1e-2).step()
    torch.testing.assert_close(layer.weight.flatten(1), flat.weight)


def test_who_moves_what():
    """AdamW: biases, norms, the layers next to input, output and time, and what is no part of the network."""
    network, projector = tiny_unet(), nn.Linear(4, 4)
    groups = vkd.parameter_groups(network, [projector], 0.1)
    optimizer = Muon(groups, network, 1e-3)
    names = {parameter: name for name, parameter in network.named_parameters()}
    mine = {names[value] for group in optimizer.param_groups if group["muon"] for value in group["params"]}
    others = {names.get(value) for group in optimizer.param_groups if not group["muon"] for value in group["params"]}
    assert "mid_block.resnets.0.conv1.weight" in mine
    assert "mid_block.resnets.0.time_emb_proj.weight" in mine
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", None} <= others
    assert "mid_block.resnets.0.conv1.bias" in others
    assert len(mine) + len(others) == len(names) + 1  # None twice: both of the projector's
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_what_adamw_moves_it_moves_as_adamw():
    network = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    other = copy.deepcopy(network)
    ours = Muon([{"params": list(network.parameters()), "weight_decay": 0.1}], network, 1e-2)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(3):
        for one, two in zip(network.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(network[0].bias, other[0].bias)
    assert torch.equal(network[1].weight, other[1].weight)
    assert not torch.equal(network[0].weight, other[0].weight)


def test_goes_on_from_its_state():
    torch.manual_seed(0)
    network = tiny_unet()
    optimizer = Muon(vkd.parameter_groups(network, [], 0.1), network, 1e-3)
    gradients = [[torch.randn_like(value) for value in network.parameters()] for _ in range(4)]

    def steps(network, optimizer, some):
        for step in some:
            for value, gradient in zip(network.parameters(), step, strict=True):
                value.grad = gradient.clone()
            optimizer.step()

    steps(network, optimizer, gradients[:2])
    copied = copy.deepcopy(network)
    resumed = Muon(vkd.parameter_groups(copied, [], 0.1), copied, 1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(network, optimizer, gradients[2:])
    steps(copied, resumed, gradients[2:])
    assert all(torch.equal(one, two) for one, two in zip(network.parameters(), copied.parameters(), strict=True))


def test_a_gradient_that_differs_by_rounding_moves_it_by_rounding():
    """What bfloat16 does not give: two processes equal one."""
    torch.manual_seed(0)
    matrices = torch.randn(1, 32, 64)
    near = matrices * (1 + 1e-7 * torch.randn_like(matrices))
    assert (orthogonalize(matrices) - orthogonalize(near)).abs().max() < 1e-5
