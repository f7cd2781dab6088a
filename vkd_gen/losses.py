"""The loss terms: pure functions, tensors in, a scalar out, float32 inside.

B batch, N positions, K channels of the space that student and teacher are compared in.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FeatureLoss = Literal["mse", "smooth_l1"]


def weighted_mean(
    values: Float[Tensor, "batch ..."], weights: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean over everything, each sample's share multiplied by its weight (not divided by the weights' sum).

    The mean of equal parts' means is then the mean of the whole: processes and accumulation steps add up.
    """
    if weights is None:
        return values.mean()
    return (values.flatten(1).mean(1) * weights).mean()


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
    """Distance between projected student rows and normalised teacher rows, averaged over all entries.

    Args:
        prediction: projected student rows, `[B, N, K]`.
        target: normalised teacher rows, `[B, N, K]`. Not cut off here: for a student wider than the teacher a learned
            projector stands on this side. Projectors cut off what they are given.
        kind: `mse`, or `smooth_l1` as the published VkD code uses (Miles et al., 2024, arXiv 2403.06213).
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
    raise ValueError(f"unknown feature loss {kind!r}; choose mse or smooth_l1")


def _squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return F.mse_loss(prediction, target)  # keeps no difference for the backward pass
    return weighted_mean(F.mse_loss(prediction, target, reduction="none"), weights)


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
