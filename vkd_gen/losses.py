"""The loss terms: pure functions, tensors in, a scalar out, float32 inside.

B batch, N positions, K channels of the space that student and teacher are compared in.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vkd_gen.choices import FeatureLoss


def weighted_mean(
    values: Float[Tensor, "batch ..."], weights: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean over everything, each sample's share multiplied by its weight (not divided by the weights' sum).

    The mean of equal parts' means is then the mean of the whole: processes and accumulation steps add up.
    """
    if weights is None:
        return values.mean()
    per_sample = values.mean(tuple(range(1, values.ndim))) if values.ndim > 1 else values
    return (per_sample * weights).mean()


def prediction_loss(
    prediction: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error between predictions, with a weight per sample; gradients do not flow into the target."""
    return weighted_mean(squared_errors(prediction, target.detach()), weights)


def squared_errors(
    prediction: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """Each sample's mean squared error, float32."""
    _check_same_shape(prediction, target)
    prediction, target = prediction.float(), target.float()
    return _MeanSquares.apply(prediction - target) if prediction.ndim > 1 else (prediction - target).square()


def feature_losses(
    prediction: Float[Tensor, "batch positions channels"],
    target: Float[Tensor, "batch positions channels"],
    kind: FeatureLoss = "mse",
    beta: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Each sample's distance between projected student rows and normalised teacher rows, float32.

    Args:
        prediction: projected student rows, `[B, N, K]`.
        target: normalised teacher rows, `[B, N, K]`. Not cut off here: for a student wider than the teacher a learned
            projector is on this side. Projectors cut off what they are given.
        kind: `mse`; `smooth_l1`, as the published VkD code uses (Miles et al., 2024, arXiv 2403.06213); or `cka`: 1 -
            linear CKA of the sample's Gram matrices over positions (Kornblith et al., 2019, arXiv 1905.00414), from 0
            to 1, which isometries and gains leave as it is, so that an orthogonal projector decides nothing.
        beta: where smooth-L1 turns from quadratic to linear, in units of the target.

    Raises:
        ValueError: if the shapes differ, or for an unknown kind.
    """
    _check_same_shape(prediction, target)
    prediction, target = prediction.float(), target.float()
    match kind:
        case "mse":
            return squared_errors(prediction, target)
        case "smooth_l1":
            return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean((1, 2))
        case "cka":
            return 1 - linear_cka(prediction, target)
    raise ValueError(f"unknown feature loss {kind!r}; choose mse, smooth_l1 or cka")


def linear_cka(
    first: Float[Tensor, "batch positions first"], second: Float[Tensor, "batch positions second"]
) -> Float[Tensor, " batch"]:
    """Linear centred kernel alignment of each sample's rows, from 0 to 1: the cosine between their Gram matrices.

    Computed from the channels' products, which never holds a matrix of positions by positions. A sample whose rows do
    not vary by more than rounding, as with a single position, is aligned with nothing: 0.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = _centred_of_size_one(first), _centred_of_size_one(second)

        def alignment(left: Tensor, right: Tensor) -> Tensor:
            return (left.transpose(1, 2) @ right).square().sum((1, 2))

        norms = alignment(first, first) * alignment(second, second)
        return alignment(first, second) / norms.clamp(min=torch.finfo(norms.dtype).tiny).sqrt()


def _centred_of_size_one(rows: Float[Tensor, "batch positions channels"]) -> Float[Tensor, "batch positions channels"]:
    """Each sample's rows about their mean, divided by their norm: fourth powers of them neither overflow nor vanish."""
    centred = rows - rows.mean(1, keepdim=True)
    size, size_of_all = (torch.linalg.vector_norm(part, dim=(1, 2), keepdim=True) for part in (centred, rows))
    resolution = torch.finfo(rows.dtype)
    varies = size > 8 * resolution.eps * size_of_all
    return torch.where(varies, centred / size.clamp(min=resolution.tiny), 0.0)


class _MeanSquares(torch.autograd.Function):
    """Each sample's mean of squares; keeps nothing but its argument, and passes over that once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """By way of each sample's norm, which needs no copy and is exact for any number of entries."""
        ctx.save_for_backward(values)
        norms = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)))
        return norms.square() * (len(values) / values.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """2 values / n."""
        (values,) = ctx.saved_tensors
        share = gradient * (2 * len(values) / values.numel())
        return values * share.view(-1, *[1] * (values.ndim - 1))


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
