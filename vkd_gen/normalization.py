"""Normalise the teacher's features: what the student's features are asked to look like.

B batch, N positions, C teacher channels, K channels of the normalised target, M timestep bins. Statistics are made in
float64 and applied in float32, never under autocast.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vkd_gen.choices import FeatureLoss, Normalization


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of one teacher layer's rows, from `calibrate`, float64.

    Attributes:
        mean: per timestep bin, `[M, C]`.
        share: each bin's share of the rows, `[M]`.
        covariance: within the bins, pooled over them, `[C, C]`.
        layer_norm_covariance: of the layer-normed rows, over all timesteps, `[C, C]`.
        num_train_timesteps: of the schedule, which the bins divide.
    """

    mean: Float[Tensor, "bins channels"]
    share: Float[Tensor, " bins"]
    covariance: Float[Tensor, "channels channels"]
    layer_norm_covariance: Float[Tensor, "channels channels"]
    num_train_timesteps: int = 1000

    @property
    def total_covariance(self) -> Float[Tensor, "channels channels"]:
        """Covariance over all timesteps: within the bins, and between their means."""
        offset = self.mean - self.share @ self.mean
        return self.covariance + (offset * self.share[:, None]).T @ offset


def timestep_bins(
    timesteps: Int[Tensor, " batch"], num_bins: int, num_train_timesteps: int | Tensor
) -> Int[Tensor, " batch"]:
    """Index of the bin that each timestep falls into; bins are of equal width in the timestep."""
    return (timesteps * num_bins).div(num_train_timesteps, rounding_mode="floor").clamp(0, num_bins - 1)


def shrink(covariance: Float[Tensor, "channels channels"], amount: float) -> Float[Tensor, "channels channels"]:
    """Move a covariance towards the multiple of the identity that has its trace; `amount` 0 keeps it, 1 replaces it.

    The target is that of Ledoit and Wolf, 2004; it bounds how far whitening amplifies nearly empty directions.
    """
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return (1 - amount) * covariance + amount * covariance.diagonal().mean() * identity


def descending_eigh(covariance: Float[Tensor, "channels channels"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues from the largest down, none below 0, and their eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def whitening_matrix(
    covariance: Float[Tensor, "channels channels"], rank: int, exponent: float = 1.0, shrinkage: float = 1e-3
) -> Float[Tensor, "channels rank"]:
    """Matrix W that (partly) whitens centred rows, `rows @ W`, keeping the leading directions.

    With eigenvectors U and eigenvalues l of the shrunk covariance, W = U_rank diag(l^(-exponent / 2)), scaled so that
    the kept directions have mean variance one: exponent 0 only rotates (and scales all alike), 1 whitens.
    """
    values, vectors = descending_eigh(shrink(covariance, shrinkage))
    values, vectors = values[:rank], vectors[:, :rank]
    if values[0] <= 0 or (exponent and values[-1] <= 1e-14 * values[0]):
        raise ValueError(
            f"the teacher's features do not vary in {rank} directions; whiten fewer (rank) or raise the shrinkage"
        )
    scale = values.pow(-exponent / 2)
    return vectors * (scale / (values * scale.square()).mean().sqrt())


def whiten_batch(rows: Float[Tensor, "rows channels"], shrinkage: float = 1e-3) -> Float[Tensor, "rows channels"]:
    """Whiten rows by their own statistics, over all processes: the paper's literal form.

    Cholesky whitening, which depends smoothly on the batch: rows @ L^-T for the shrunk covariance L L^T, float32.

    Raises:
        ValueError: if the covariance is singular: fewer rows than channels, or dead channels, and no shrinkage. Inside
            torch.compile the result is NaN instead.
    """
    rows = rows.double()
    count = _all_reduce(torch.full((), len(rows), dtype=rows.dtype, device=rows.device))
    centred = rows - _all_reduce(rows.sum(0)) / count
    covariance = shrink(_all_reduce(centred.T @ centred) / count, shrinkage)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    # In an empty direction rounding may leave a pivot just above zero.
    is_singular = (failed > 0) | (factor.diagonal().square() <= 1e-12 * covariance.diagonal()).any()
    if torch.compiler.is_compiling():
        factor = torch.where(is_singular, torch.nan, factor)  # a graph cannot stop at what it computes
    elif is_singular:
        raise ValueError(
            f"the batch's {int(count)} rows do not determine a {len(covariance)}-channel covariance; "
            "raise the batch size or the whitening shrinkage"
        )
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T.float()


def _all_reduce(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


class FeatureNormalizer(nn.Module):
    """Apply one normalisation to a teacher layer's rows. Holds buffers only; nothing is learned here.

    Kinds:
        none: the rows as they are.
        layer_norm: each row to mean 0 and variance 1 over its channels; needs no statistics.
        center: minus the timestep bin's mean, all channels divided by one number: mean variance 1, geometry kept.
        standardize: minus the bin's mean, each channel to variance 1.
        whiten: minus the bin's mean, then `whitening_matrix`; keeps `rank` directions.
        batch_whiten: `whiten_batch`, by the statistics of one forward pass over all processes, not over accumulation.

    It is empty until `fill`, or `load_state_dict` of one that was filled. Before that `center`, `standardize` and
    `whiten` cannot be used, and `target_covariance` is not known.

    Args:
        kind: see above.
        statistics: to fill it with at once; channels and bins are then theirs.
        channels: teacher channels.
        rank: directions that `whiten` keeps; default: all.
        exponent: of `whiten`, from 0 (rotate) to 1 (whiten).
        shrinkage: of the covariance that `standardize`, `whiten` and `batch_whiten` invert.
        num_timestep_bins: M, that `calibrate` takes means in.

    Attributes:
        target_channels: K, the channels of the result.
        is_filled: whether the teacher's statistics are here.
        discarded: share of the teacher layer's variance that truncated whitening leaves out, a scalar.
    """

    mean: Tensor
    matrix: Tensor
    covariance: Tensor
    discarded: Tensor
    num_train_timesteps: Tensor

    def __init__(
        self,
        kind: Normalization = "none",
        statistics: FeatureStatistics | None = None,
        *,
        channels: int | None = None,
        rank: int | None = None,
        exponent: float = 1.0,
        shrinkage: float = 1e-3,
        num_timestep_bins: int = 10,
    ):
        super().__init__()
        if statistics is not None:
            num_timestep_bins, channels = statistics.mean.shape
        if channels is None:
            raise ValueError("a normalizer needs the teacher's channels, or the statistics that calibrate() gives")
        self.kind, self.channels, self.target_channels = kind, channels, channels
        self.exponent, self.shrinkage = exponent, shrinkage
        self.num_timestep_bins: int = num_timestep_bins
        for name, value in (("exponent", exponent), ("shrinkage", shrinkage)):
            if not 0 <= value <= 1:
                raise ValueError(f"whitening {name} must lie between 0 and 1, not {value}")
        bins = (num_timestep_bins, channels)
        match kind:
            case "none" | "layer_norm" | "batch_whiten":
                shapes = (1, 1), (1, 1)
            case "center":
                shapes = bins, (1, 1)
            case "standardize":
                shapes = bins, (1, channels)
            case "whiten":
                self.target_channels = channels if rank is None else rank
                if not 1 <= self.target_channels <= channels:
                    raise ValueError(
                        f"whitening rank must lie between 1 and the teacher layer's {channels} channels, not {rank}"
                    )
                shapes = bins, (channels, self.target_channels)
            case _:
                raise ValueError(f"unknown normalization {kind!r}")
        self.register_buffer("mean", torch.zeros(shapes[0], dtype=torch.float32))
        self.register_buffer("matrix", torch.ones(shapes[1], dtype=torch.float32))
        size = (self.target_channels, self.target_channels)
        self.register_buffer("covariance", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("discarded", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_train_timesteps", torch.zeros((), dtype=torch.long))  # 0 until it is filled
        self.is_filled = False
        self.register_load_state_dict_post_hook(_note_filled)
        if statistics is not None:
            self.fill(statistics)

    @torch.no_grad()
    def fill(self, statistics: FeatureStatistics) -> None:
        """Take over what a calibration has found.

        Raises:
            ValueError: for statistics of other sizes, or of features that do not vary.
        """
        if statistics.mean.shape != (self.num_timestep_bins, self.channels):
            raise ValueError(
                f"a normalizer of {self.num_timestep_bins} bins and {self.channels} channels cannot take statistics of "
                f"{len(statistics.mean)} bins and {statistics.mean.shape[1]} channels"
            )
        within = statistics.covariance
        match self.kind:
            case "none":
                covariance = statistics.total_covariance
            case "layer_norm":
                covariance = statistics.layer_norm_covariance
            case "batch_whiten":
                covariance = torch.eye(self.channels)
            case "whiten":
                matrix = whitening_matrix(within, self.target_channels, self.exponent, self.shrinkage)
                matrix = self._take(statistics.mean, matrix)
                covariance = matrix.T @ within @ matrix
                values = descending_eigh(within)[0]
                self.discarded.copy_(1 - values[: self.target_channels].sum() / values.sum())
            case "center" | "standardize":
                is_center = self.kind == "center"
                variances = within.diagonal().mean() if is_center else shrink(within, self.shrinkage).diagonal()
                scale = self._take(statistics.mean, variances.rsqrt().view(1, -1)).expand(1, self.channels)
                covariance = scale.T * within * scale
        self.covariance.copy_(covariance)
        self.num_train_timesteps.fill_(statistics.num_train_timesteps)
        self.is_filled = True

    def _take(self, mean: Tensor, matrix: Tensor) -> Tensor:
        """Keep what rows are centred and multiplied by; the matrix as it is kept, in float64."""
        if not matrix.isfinite().all():
            raise ValueError("the teacher's features do not vary at all in this layer; pair another one")
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)
        return matrix.float().double()

    def forward(
        self, rows: Float[Tensor, "batch positions channels"], timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch positions target_channels"]:
        """The teacher's rows normalised, float32, cut off from the graph; a ValueError while statistics are missing."""
        rows = rows.detach().float()
        if self.kind == "none":
            return rows
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            match self.kind:
                case "layer_norm":
                    return F.layer_norm(rows, rows.shape[-1:])
                case "batch_whiten":
                    return whiten_batch(rows.flatten(0, 1), self.shrinkage).view_as(rows)
            self._check_filled()
            bins = timestep_bins(timesteps, len(self.mean), self.num_train_timesteps)
            centred = rows - self.mean[bins].unsqueeze(1)
            return centred @ self.matrix if self.kind == "whiten" else centred * self.matrix

    def target_covariance(self) -> Float[Tensor, "target_channels target_channels"]:
        """Covariance of the normalised rows that the statistics imply, float64; a ValueError before it is filled."""
        self._check_filled()
        return self.covariance.cpu()

    def _check_filled(self) -> None:
        if not self.is_filled:
            raise ValueError(
                f"normalization {self.kind!r} has no statistics of the teacher yet: call ProjectedStudent.calibrate() "
                "first, or load a checkpoint"
            )

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.kind}, {self.channels} -> {self.target_channels}"


def _note_filled(normalizer: FeatureNormalizer, _incompatible_keys: Any) -> None:
    """After loading."""
    normalizer.is_filled = bool(normalizer.num_train_timesteps > 0)


def width_floor(
    target_covariance: Float[Tensor, "channels channels"],
    student_channels: int,
    loss: FeatureLoss,
    beta: float = 1.0,
) -> float:
    """The feature loss that a student of this width cannot get below with an isometric projector.

    At best the projected student fills the leading `student_channels` directions of the targets; what lies in the
    others remains. For `mse` this is exact; for `smooth_l1` the remainder is taken to be Gaussian. For `cka`, with any
    linear projector, it is 1 - sqrt(q), q the leading directions' share of the summed squared eigenvalues: exact for
    samples whose own rows have this covariance, while others, which vary in fewer directions, can get below it.
    """
    if loss not in ("mse", "smooth_l1", "cka"):
        raise ValueError(f"unknown feature loss {loss!r}; choose mse, smooth_l1 or cka")
    values, vectors = descending_eigh(target_covariance)
    if loss == "cka":  # of rows that agree in the leading directions and are empty in the others
        squares = values.square()
        return float(1 - (squares[:student_channels].sum() / squares.sum()).sqrt())
    # The mean runs over the wider space's channels; variance that remains per channel:
    variance = vectors[:, student_channels:].square() @ values[student_channels:]
    if loss == "mse":
        return float(variance.mean())
    deviation = variance.clamp(min=1e-30).sqrt()
    bound = beta / deviation
    tail = 0.5 * torch.erfc(bound / math.sqrt(2))  # P(z > bound) of a standard normal z
    density = torch.exp(-bound.square() / 2) / math.sqrt(2 * math.pi)
    quadratic = variance / (2 * beta) * (1 - 2 * tail - 2 * bound * density)
    return float((quadratic + 2 * deviation * density - beta * tail).mean())
