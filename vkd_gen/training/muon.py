"""Muon: matrices and convolutions are moved by orthogonal updates, everything else by AdamW."""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

OUTER_LAYERS = frozenset(
    {"conv_in", "conv_out", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj"}
)
"""Parts of a denoiser next to its inputs and outputs, which stay with AdamW (Jordan et al., 2024)."""
MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of a Newton-Schulz step that brings small singular values near to 1 fast (Jordan et al., 2024)."""
NUM_ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) with AdamW for what it is not made for.

    The update of a matrix is its Nesterov momentum with all singular values brought near to 1, times
    0.2 sqrt(max(rows, columns)), after which it is as large as AdamW's and takes AdamW's learning rates and weight
    decay (Liu et al., 2025, arXiv 2502.16982). A convolution is a matrix with a row for each output channel.

    By hand, since torch's takes matrices only, and torch's and timm's iterate in bfloat16: a difference of 1e-7 in a
    gradient, as between one process and two, would then change the update by some tenths of a per cent.

    Args:
        groups: parameter groups, with `params` and `weight_decay`.
        network: whose matrices and convolutions Muon moves, but for `OUTER_LAYERS`; all other parameters are AdamW's.
        learning_rate: of both.
    """

    def __init__(self, groups: list[dict[str, Any]], network: nn.Module, learning_rate: float):
        inner = set(inner_matrices(network))
        split = [
            {**group, "params": [value for value in group["params"] if (value in inner) == is_inner], "muon": is_inner}
            for group in groups
            for is_inner in (True, False)
        ]
        super().__init__([group for group in split if group["params"]], lr=learning_rate, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._move(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _move(self, group: dict[str, Any]) -> None:
        by_shape = defaultdict(list)  # orthogonalized together: a network has few shapes and many small matrices
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for parameters in by_shape.values():
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["step"] = torch.tensor(0.0)  # AdamW looks for it wherever there is a state
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            updates = orthogonalize(torch.stack([update.flatten(1) for update in nesterov]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            size = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
            torch._foreach_add_(parameters, list(updates.view(-1, *parameters[0].shape)), alpha=-size)


def inner_matrices(network: nn.Module) -> list[nn.Parameter]:
    """What Muon moves of a network."""
    return [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.ndim >= 2 and not OUTER_LAYERS & set(name.split("."))
    ]


def orthogonalize(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Matrices with the same singular vectors and singular values between 0.7 and 1.2, but for values near 0.

    Five Newton-Schulz steps in float32: each multiplies the matrix by a polynomial of its gram matrix. Where the matrix
    is long, as convolutions are, the steps are made on the gram matrix, and their product is applied once.
    """
    x = matrices.float()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    rows, columns = x.shape[1:]
    is_long = columns > 1.875 * rows  # 4 r^2 c + 40 r^3 operations in place of 20 r^2 c + 10 r^3
    a, b, c = QUINTIC
    identity, factor, product = torch.eye(rows, device=x.device), None, None
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT if factor is None or not is_long else factor @ gram @ factor
        factor = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        if is_long:
            product = factor if product is None else factor @ product
        else:
            x = factor @ x
    x = x if product is None else product @ x
    return x.mT if is_tall else x
