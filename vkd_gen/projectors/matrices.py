"""Orthonormal matrices: the closest to a cross-covariance, random ones."""

import torch
from jaxtyping import Float
from torch import Tensor


def procrustes(cross_covariance: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The orthonormal matrix P that maximises trace(P^T C): U V^T for C = U S V^T (Schoenemann, 1966).

    For rows S and T with cross-covariance C = S^T T / n it minimises ||S P - T|| over all P with orthonormal rows
    (S narrower than T) and over all rotations (equal widths).
    """
    matrix = cross_covariance.double()  # a product in TF32 would be orthonormal to 1e-3 only
    if matrix.shape[0] > matrix.shape[1]:
        return procrustes(cross_covariance.T).T.contiguous()
    # (C C^T)^(-1/2) C: a third of a decomposition's time. It squares the condition, which float64 bears up to a point.
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    if not values[0] > 1e-12 * values[-1]:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return (left @ right).to(cross_covariance.dtype)
    solution = (vectors * values.rsqrt()) @ (vectors.T @ matrix)
    # One step of Newton and Schulz leaves of the distance from orthonormal its square.
    solution = 1.5 * solution - 0.5 * (solution @ solution.T) @ solution
    return solution.to(cross_covariance.dtype)


def random_orthonormal(rows: int, columns: int, seed: int = 0) -> Float[Tensor, "rows columns"]:
    """A uniformly random matrix with orthonormal rows (or columns, if there are more rows), the same for a seed."""
    gaussian = torch.randn(max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed))
    orthonormal, triangle = torch.linalg.qr(gaussian)
    orthonormal = orthonormal * triangle.diagonal().sign()
    return orthonormal if rows >= columns else orthonormal.T.contiguous()


def orthonormality_error(matrix: Float[Tensor, "rows columns"]) -> float:
    """Largest entry of |P P^T - I| (of |P^T P - I| if there are more rows than columns), in float64."""
    matrix = matrix.detach().double()
    if not matrix.numel():
        return 0.0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def completed(rows: Float[Tensor, "narrow wide"]) -> Float[Tensor, "wide wide"]:
    """An orthogonal matrix whose first columns are the given orthonormal rows."""
    columns = rows.double().T
    full, _ = torch.linalg.qr(columns, mode="complete")
    full[:, : columns.shape[1]] = columns
    return full.float()
