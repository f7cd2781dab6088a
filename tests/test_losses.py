"""The loss terms, against loops in numpy float64."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from vkd_gen.losses import feature_loss, prediction_loss, weighted_mean

REFUSED = (ValueError, TypeCheckError)  # the second one where the tests run with shapes and types checked
KINDS = ("mse", "smooth_l1")


def reference_loss(prediction, target, kind="mse", weights=None, beta=1.0):
    """Entry by entry, float64."""
    prediction, target = prediction.double().numpy(), target.double().numpy()
    total = 0.0
    for index in np.ndindex(prediction.shape):
        error = abs(prediction[index] - target[index])
        smooth = error**2 / (2 * beta) if error < beta else error - beta / 2
        value = error**2 if kind == "mse" else smooth
        total += value * (1.0 if weights is None else weights[index[0]].item())
    return total / prediction.size


@pytest.fixture
def rows():
    """Prediction and target, `[B, N, K]`, and a weight per sample; errors on both sides of smooth-L1's bend."""
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, 3, 4, 5, generator=generator)
    return prediction, target, torch.tensor([0.0, 0.5, 3.0])


# ---- known values


def test_prediction_loss_known_value():
    # errors 1, 3, 0, 2: squares 1, 9, 0, 4; mean 14 / 4
    prediction, target = torch.tensor([[[[1.0, 4.0], [2.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0], [2.0, 2.0]]]])
    assert prediction_loss(prediction, target).item() == pytest.approx(3.5)


def test_smooth_l1_known_values():
    # Girshick, 2015, "Fast R-CNN", eq. 3: 0.5 x^2 below 1, |x| - 0.5 above; at 0.5 and 3: 0.125 and 2.5
    prediction, target = torch.tensor([[[0.5, -3.0]]]), torch.zeros(1, 1, 2)
    assert feature_loss(prediction, target, "smooth_l1").item() == pytest.approx((0.125 + 2.5) / 2)


def test_weighted_mean_known_value():
    # sample means 1 and 3, weights 2 and 1/3: (2 + 1) / 2; divided by the number of samples, not the weights' sum
    values = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert weighted_mean(values, torch.tensor([2.0, 1 / 3])).item() == pytest.approx(1.5)
    assert weighted_mean(values).item() == pytest.approx(2.0)


# ---- references


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_feature_loss_reference(rows, kind, beta, weighted):
    prediction, target, weights = rows
    weights = weights if weighted else None
    loss = feature_loss(prediction, target, kind, weights, beta)
    assert loss.item() == pytest.approx(reference_loss(prediction, target, kind, weights, beta), rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_prediction_loss_reference(weighted):
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, 3, 2, 4, 4, generator=generator)
    weights = torch.tensor([0.0, 0.5, 3.0]) if weighted else None
    loss = prediction_loss(prediction, target, weights)
    assert loss.item() == pytest.approx(reference_loss(prediction, target, "mse", weights), rel=1e-5)


# ---- properties


@pytest.mark.parametrize("kind", KINDS)
def test_equal_parts_add_up_to_the_whole(rows, kind):
    """What makes processes and accumulation steps agree with one big batch."""
    prediction, target, weights = (torch.cat([tensor, tensor.flip(0) / 2]) for tensor in rows)
    whole = feature_loss(prediction, target, kind, weights)
    parts = [
        feature_loss(*part[:2], kind, part[2])
        for part in zip(prediction.split(2), target.split(2), weights.split(2), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_change_nothing(rows, kind):
    prediction, target, _ = rows
    torch.testing.assert_close(
        feature_loss(prediction, target, kind, torch.ones(3)), feature_loss(prediction, target, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_weight_zero_does_not_count(rows, kind):
    prediction, target, weights = rows
    changed = prediction.clone()
    changed[0] += 100
    assert torch.equal(feature_loss(changed, target, kind, weights), feature_loss(prediction, target, kind, weights))


def test_smooth_l1_is_half_the_square_near_and_linear_far():
    target = torch.zeros(1, 4, 4)
    near = torch.full((1, 4, 4), 0.9)
    torch.testing.assert_close(feature_loss(near, target, "smooth_l1"), feature_loss(near, target, "mse") / 2)
    far = feature_loss(torch.full((1, 4, 4), 1e4), target, "smooth_l1")
    assert far.item() == pytest.approx(1e4 - 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_computed_in_float32(kind):
    """In bfloat16 the sum over 10,000 entries would be off by percents."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 100, 50, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = feature_loss(prediction, target, kind)
        squares = prediction_loss(prediction, target)
    assert loss.dtype == squares.dtype == torch.float32
    error = (prediction.double() - target.double()).abs()
    smooth = torch.where(error < 1, error.square() / 2, error - 0.5).mean().item()
    assert squares.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx({"mse": squares.item(), "smooth_l1": smooth}[kind], rel=1e-4)


# ---- gradient routing


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_feature_loss(rows, kind):
    """On both sides: a wider student's projector stands on the target's. Projectors cut the teacher off."""
    prediction, target, _ = (tensor.clone().requires_grad_() for tensor in rows)
    feature_loss(prediction, target, kind).backward()
    error = (prediction - target).detach()
    expected = (2 * error if kind == "mse" else error.clamp(-1, 1)) / error.numel()
    torch.testing.assert_close(prediction.grad, expected)
    torch.testing.assert_close(target.grad, -expected)


def test_gradients_of_the_prediction_loss_do_not_reach_the_target(rows):
    prediction, target, weights = rows
    prediction, target = prediction.clone().requires_grad_(), target.clone().requires_grad_()
    prediction_loss(prediction, target, weights).backward()
    assert target.grad is None
    expected = 2 * (prediction - target).detach() * weights[:, None, None] / prediction.numel()
    torch.testing.assert_close(prediction.grad, expected)


# ---- errors


@pytest.mark.parametrize("loss", [prediction_loss, feature_loss])
def test_unlike_shapes_are_refused_instead_of_broadcast(loss):
    with pytest.raises(REFUSED, match=r"differ in shape|target"):
        loss(torch.zeros(2, 4, 3), torch.zeros(2, 1, 3))


def test_unknown_feature_loss():
    with pytest.raises(REFUSED, match="huber"):
        feature_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), "huber")
