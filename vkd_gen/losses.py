"""The loss terms: pure functions, tensors in, a scalar out, float32 inside.

B batch, N positions, K channels of the space that student and teacher are compared in.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FeatureLoss = Literal["mse", "smooth_l1", "cka"]


def weighted_mean(
    values: Float[Tensor, "batch ..."], weights: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean over everything, each sample's share multiplied by its weight (not divided by the weights' sum).

    The mean of equal parts' means is then the mean of the whole: processes and accumulation steps add up.
    """
    if weights is None:
        return values.mean()
    return (values.reshape(len(values), -1).mean(1) * weights).mean()


def prediction_loss(
    prediction: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error between predictions: the denoising and the output-distillation term.

    Args:
        prediction: the student's prediction, `[B, C, H, W]`.
        target: of the same shape; gradients do not flow into it.
        weights: one weight per sample.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_same_shape(prediction, target)
    return _squared_error(prediction.float(), target.detach().float(), weights)


def feature_loss(
    prediction: Float[Tensor, "batch positions channels"],
    target: Float[Tensor, "batch positions channels"],
    kind: FeatureLoss = "mse",
    weights: Float[Tensor, " batch"] | None = None,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Distance between projected student rows and normalised teacher rows, averaged over all entries or samples.

    `mse` and `smooth_l1` compare rows. `cka` compares relations between the rows of one sample: 1 - linear CKA of their
    Gram matrices over positions (Kornblith et al., 2019, arXiv 1905.00414), from 0 to 1. Isometries and gains leave it
    as it is, so an orthogonal projector decides nothing there.

    Args:
        prediction: projected student rows, `[B, N, K]`.
        target: normalised teacher rows, `[B, N, K]`. Not cut off here: for a student wider than the teacher a learned
            projector stands on this side. Projectors cut off what they are given.
        kind: `mse`; `smooth_l1`, as the published VkD code uses (Miles et al., 2024, arXiv 2403.06213); or `cka`.
        weights: one weight per sample.
        beta: where smooth-L1 turns from quadratic to linear, in units of the target.

    Raises:
        ValueError: if the shapes differ, or for an unknown kind.
    """
    _check_same_shape(prediction, target)
    prediction, target = prediction.float(), target.float()
    match kind:
        case "mse":
            return _squared_error(prediction, target, weights)
        case "smooth_l1":
            return weighted_mean(F.smooth_l1_loss(prediction, target, reduction="none", beta=beta), weights)
        case "cka":
            return weighted_mean(1 - linear_cka(prediction, target), weights)
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


def _squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        # Keeps no difference for the backward pass. A copy, since torch's mean stands in memory for all the squares.
        return F.mse_loss(prediction, target).clone()
    return weighted_mean(F.mse_loss(prediction, target, reduction="none"), weights)


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
