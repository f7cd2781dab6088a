"""The loss terms, against loops in numpy float64."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from vkd_gen.losses import (
    feature_losses,
    linear_cka,
    prediction_loss,
    squared_errors,
    weighted_mean,
)
from vkd_gen.projectors import random_orthonormal

REFUSED = (ValueError, TypeCheckError)  # the second one where the tests run with shapes and types checked
KINDS = ("mse", "smooth_l1")
ALL_KINDS = (*KINDS, "cka")


def feature_loss(prediction, target, kind="mse", weights=None, beta=1.0):
    return weighted_mean(feature_losses(prediction, target, kind, beta), weights)


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


def reference_cka(first, second):
    """Kornblith et al., 2019, eq. 1 to 3: HSIC of centred Gram matrices over positions, sample by sample, float64."""
    values = []
    for x, y in zip(first.double().numpy(), second.double().numpy(), strict=True):
        centring = np.eye(len(x)) - np.ones((len(x), len(x))) / len(x)
        k, m = (centring @ rows @ rows.T @ centring for rows in (x, y))
        values.append(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))
    return np.array(values)


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


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        # Of rows 1, -1, 0 and those of a plane: the cosine of their Gram matrices.
        ([[-3.0], [3.0], [0.0]], 1.0),
        ([[1.0], [1.0], [-2.0]], 0.0),
        ([[1.0], [0.0], [-1.0]], 0.25),  # (1 * 1)^2 / (2 * 2)
        ([[5.0], [5.0], [5.0]], 0.0),  # which do not vary
    ],
)
def test_linear_cka_known_values(second, expected):
    first = torch.tensor([[[1.0], [-1.0], [0.0]]])
    assert linear_cka(first, torch.tensor([second])).item() == pytest.approx(expected, abs=1e-6)


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


@pytest.mark.parametrize(("positions", "widths"), [(7, (3, 5)), (4, (6, 6)), (3, (8, 2)), (1, (4, 4))])
def test_linear_cka_equals_gram_matrices(positions, widths):
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(5, positions, 2, generator=generator)
    first, second = (
        torch.randn(5, positions, width, generator=generator) + common @ torch.randn(2, width, generator=generator) + 3
        for width in widths
    )
    found = linear_cka(first, second)
    assert found.shape == (5,)
    if positions == 1:
        assert found.tolist() == [0] * 5  # nothing to be aligned with
        return
    np.testing.assert_allclose(found.numpy(), reference_cka(first, second), rtol=1e-4)
    assert found.min() > 0.05


# ---- properties


@pytest.mark.parametrize("gain", [1e-9, 1e-6, 1.0, 1e6, 1e9])
def test_cka_does_not_know_rotations_gains_and_shifts(rows, gain):
    """Nor the size: fourth powers of it would leave float32's range."""
    prediction, target, _ = rows
    rotated = gain * (prediction @ random_orthonormal(5, 5, seed=1) + torch.randn(3, 1, 5))
    expected = linear_cka(prediction, target)
    torch.testing.assert_close(linear_cka(rotated, target), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(linear_cka(gain * prediction, gain * target), expected, rtol=1e-4, atol=1e-6)
    embedded = prediction @ random_orthonormal(5, 9, seed=2)
    torch.testing.assert_close(linear_cka(gain * embedded, target), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(linear_cka(prediction * torch.tensor([3.0, 1, 1, 1, 1]), target), expected, rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_rows_that_do_not_vary_are_aligned_with_nothing_and_get_no_gradient(value):
    """Nine equal numbers sum up to nine times the number but for rounding."""
    constant = torch.full((2, 9, 3), value, requires_grad=True)
    varying = torch.randn(2, 9, 3, requires_grad=True)
    feature_loss(constant, varying, "cka").backward()
    assert linear_cka(constant, varying).tolist() == linear_cka(varying, constant).tolist() == [0, 0]
    assert constant.grad.tolist() == varying.grad.tolist() == torch.zeros(2, 9, 3).tolist()


def test_small_variation_far_from_zero_counts(rows):
    prediction, target, _ = rows
    far = 1000 + prediction.double()
    torch.testing.assert_close(linear_cka(far.float(), target), linear_cka(prediction, target), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ALL_KINDS)
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
    relations = (1 - reference_cka(prediction, target)).mean()
    assert loss.item() == pytest.approx({"mse": squares.item(), "smooth_l1": smooth, "cka": relations}[kind], rel=1e-4)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_loss_is_a_number_in_memory_too(rows, kind):
    """torch's own mean over squares keeps all the squares' memory for as long as the loss lives."""
    prediction, target, _ = (tensor.clone().requires_grad_() for tensor in rows)
    for loss in (prediction_loss(prediction, target), feature_loss(prediction, target, kind)):
        assert loss.untyped_storage().nbytes() == 4


def test_squared_errors_known_values():
    prediction = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    torch.testing.assert_close(squared_errors(prediction, torch.zeros(2, 2)), torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(squared_errors(prediction[0], torch.ones(2)), torch.tensor([0.0, 4.0]))


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


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])  # of the axes in memory
def test_the_squared_error_is_torchs_whatever_the_order_in_memory(order):
    generator = torch.Generator().manual_seed(5)
    pair = [torch.randn([(4, 7, 3)[axis] for axis in order], generator=generator) for _ in range(2)]
    back = [order.index(axis) for axis in range(3)]
    prediction, target = (values.permute(back) for values in pair)
    ours, theirs = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    found, expected = feature_loss(ours, target), torch.nn.functional.mse_loss(theirs, target)
    torch.testing.assert_close(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.stride() == theirs.grad.stride()


def test_gradients_of_the_cka_loss(rows):
    """By finite differences, float64, on both sides; they shrink no row and move no mean."""
    prediction, target, _ = (tensor.double().requires_grad_() for tensor in rows)
    assert torch.autograd.gradcheck(linear_cka, (prediction, target))
    feature_loss(prediction, target, "cka").backward()
    for value in (prediction, target):
        torch.testing.assert_close(value.grad.sum(1), torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-7)
        torch.testing.assert_close(
            (value.grad * value).sum((1, 2)).detach(), torch.zeros(3).double(), rtol=0, atol=1e-7
        )
        assert value.grad.abs().max() > 1e-3


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
