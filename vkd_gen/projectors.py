"""Projectors between a student layer's channels and the teacher's targets.

Ds student channels, Dt target channels, wide = max, narrow = min of the two. B batch, N positions. A projector takes
student rows `[B, N, Ds]` and target rows `[B, N, Dt]` and returns both in one space, ready for the feature loss.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn

ProjectorMethod = Literal["solved", "cayley", "matrix_exp", "fixed"]


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


def principal_directions(covariance: Float[Tensor, "channels channels"], count: int) -> Float[Tensor, "count channels"]:
    """The `count` leading eigenvectors of a covariance, as rows, float32."""
    vectors = torch.linalg.eigh(covariance.double())[1]
    return vectors.flip(1)[:, :count].T.float().contiguous()


def orthonormality_error(matrix: Float[Tensor, "rows columns"]) -> float:
    """Largest entry of |P P^T - I| (of |P^T P - I| if there are more rows than columns), in float64."""
    matrix = matrix.detach().double()
    if not matrix.numel():
        return 0.0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def sampling_stride(num_positions: int) -> int:
    """Every how many positions of a sample statistics look at one, so that they see about 2 sqrt(N) of N.

    Neighbours say nearly the same, and samples are many. The stride has no divisor in common with the number of
    positions, so that it visits all columns of a map.

    Example:
        >>> [sampling_stride(side * side) for side in (1, 4, 8, 32, 64)]
        [1, 3, 5, 17, 33]
    """
    stride = max(1, math.isqrt(num_positions) // 2)
    while math.gcd(stride, num_positions) > 1:
        stride += 1
    return stride


class RunningCrossCovariance(nn.Module):
    """Exponential moving statistics of student rows and target rows, equal on every process.

    `accumulate` and `accumulate_deviations` add rows (inside the forward pass: matrix products, no communication);
    `merge` reduces the sums over all processes and folds them into the averages (after the optimizer step). The
    averages weigh steps as an exponential moving average without start-up bias does.

    Args:
        student_channels: Ds.
        target_channels: Dt.
        momentum: weight of the past, from 0 (the latest step alone) to below 1.

    Attributes:
        has_means: the running means are of rows, no longer the zeros that they begin with.
    """

    student_mean: Tensor
    target_mean: Tensor
    cross_covariance: Tensor
    student_variance: Tensor
    target_variance: Tensor
    num_merges: Tensor
    sums: Tensor

    def __init__(self, student_channels: int, target_channels: int, momentum: float):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
        self.momentum = momentum
        self.register_buffer("student_mean", torch.zeros(student_channels))
        self.register_buffer("target_mean", torch.zeros(target_channels))
        self.register_buffer("cross_covariance", torch.zeros(student_channels, target_channels))
        self.register_buffer("student_variance", torch.zeros(()))  # trace of the covariance
        self.register_buffer("target_variance", torch.zeros(()))
        self.register_buffer("num_merges", torch.zeros((), dtype=torch.long))
        # Sums since the last merge, about the running means: (count, mean offsets, second moments) in one vector,
        # so that one reduction carries them all.
        size = 3 + student_channels + target_channels + student_channels * target_channels
        self.register_buffer("sums", torch.zeros(size, dtype=torch.float64), persistent=False)
        self.has_means = False
        self.register_load_state_dict_post_hook(_note_means)

    @torch.no_grad()
    def accumulate(self, student: Float[Tensor, "rows student"], target: Float[Tensor, "rows target"]) -> None:
        """Add rows to the sums.

        The large products are taken of rows centred on themselves, where float32 is exact enough however far from zero
        they lie, and moved to the running means in float64.
        """
        student, target = student.detach().float(), target.detach().float()
        count = len(student)
        student_centre, target_centre = student.sum(0) / max(count, 1), target.sum(0) / max(count, 1)
        student, target = student - student_centre, target - target_centre
        student_shift = student_centre.double() - self.student_mean
        target_shift = target_centre.double() - self.target_mean
        student_offset, target_offset = count * student_shift, count * target_shift
        scalars = [
            torch.full_like(self.sums[0], count),  # filled on the device: nothing to wait for
            _squares(student) + student_shift @ student_offset,
            _squares(target) + target_shift @ target_offset,
        ]
        product = torch.addr((student.T @ target).double(), student_offset, target_shift)
        self.sums += torch.cat([torch.stack(scalars), student_offset, target_offset, product.flatten()])

    @torch.no_grad()
    def accumulate_deviations(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> None:
        """Add rows, given as deviations from the running means, to the sums: cheaper, where those are known.

        Args:
            student: float32, `[B, N, Ds]`, in any order in memory.
            target: float32, `[B, N, Dt]`.
        """
        student = student.detach()
        count, positions = student.shape[0] * student.shape[1], student.shape[1]
        scalars = [torch.full_like(self.sums[0], count), _squares(student), _squares(target)]
        offsets = [deviations.sum(1).sum(0) for deviations in (student, target)]
        channels = student.shape[2], target.shape[2]
        if channels[0] * channels[1] <= positions * sum(channels):  # smaller than a copy, row after row, would be
            product = torch.bmm(student.mT, target).sum(0)
        else:
            product = student.flatten(0, 1).T @ target.flatten(0, 1)
        self.sums += torch.cat([torch.stack(scalars), *offsets, product.flatten()])

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the sums of all processes into the averages and clear them; without new rows nothing changes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        widths = [3, len(self.student_mean), len(self.target_mean), self.cross_covariance.numel()]
        count = self.sums[0]
        # A step with a non-finite feature counts as one without rows: it must not poison the averages.
        has_rows = (count > 0) & self.sums.sum().isfinite()
        means = torch.where(has_rows, self.sums / count, 0.0)
        scalars, student_offset, target_offset, product = means.split(widths)
        self.num_merges += has_rows
        # (1 - m) / (1 - m^n): the n-th step's weight in the average of n steps
        weight = has_rows.double() * (1 - self.momentum) / (1 - self.momentum ** self.num_merges.clamp(min=1).double())
        # Second moments are about the old mean; the new one follows the rows by a share of the offset.
        product = torch.addr(product.view_as(self.cross_covariance), weight * student_offset, target_offset, alpha=-1)
        moved = torch.stack([student_offset @ student_offset, target_offset @ target_offset])
        student_variance, target_variance = (scalars[1:] - weight * moved).unbind()
        for average, value in (
            (self.cross_covariance, product),
            (self.student_variance, student_variance),
            (self.target_variance, target_variance),
        ):
            average.copy_(torch.lerp(average.double(), value, weight))
        self.student_mean += weight * student_offset
        self.target_mean += weight * target_offset
        self.sums.zero_()
        self.has_means = True


class OrthogonalProjector(nn.Module):
    """Compare student and target through an orthonormal matrix P: no direction is stretched or squeezed (VkD).

    A student narrower than the target is embedded, `g (S - mean) P` against `T - mean`, P P^T = I, so the similarities
    between its rows are kept up to the gain g. A wider student stays and the target is embedded, `g (S - mean)` against
    `(T - mean) P`: the roles swap. P is float32 and orthonormal at every step, whatever the optimizer does.

    Ways to hold the constraint:
        solved: P, gain and means in closed form from running student-target statistics (orthogonal Procrustes),
            refreshed every few optimizer steps; nothing is trained. Gradients flow through the projected rows.
        cayley, matrix_exp: P = leading rows of base * map(A), A skew and trained, with gain and bias. The base is where
            it starts: A = 0.
        fixed: P stays where it starts; gain and means in closed form.

    Weight decay pulls A to 0 and so P to where it started; it cannot make P anything but orthonormal. (torch's own
    default map for rectangular weights turns to zero under weight decay: its signs are stored as decayed parameters.)

    Miles, Elezi, Deng, "VkD", CVPR 2024, arXiv 2403.06213: the constraint, and the matrix exponential. The closed form
    and the gain are ours.

    Args:
        student_channels: Ds.
        target_channels: Dt, as the normaliser gives them.
        method: see above.
        start: orthonormal rows `[narrow, wide]` that P starts from; `identity`; or `procrustes`: the solution for the
            rows seen before `initialize`, which `solved` always starts from.
        momentum: of the running statistics.
        refresh_every_steps: optimizer steps between two solutions of P.

    Raises:
        ValueError: for a value outside its range or a `start` that is not orthonormal.

    Example:
        >>> projector = OrthogonalProjector(4, 8)
        >>> student, target = projector(torch.randn(2, 9, 4), torch.randn(2, 9, 8))
        >>> student.shape, target.shape
        (torch.Size([2, 9, 8]), torch.Size([2, 9, 8]))
    """

    gain: Tensor
    solution: Tensor
    base: Tensor
    bias: Tensor

    def __init__(
        self,
        student_channels: int,
        target_channels: int,
        *,
        method: ProjectorMethod = "solved",
        start: Tensor | Literal["identity", "procrustes"] = "identity",
        momentum: float = 0.99,
        refresh_every_steps: int = 10,
    ):
        super().__init__()
        _check_channels(student_channels, target_channels)
        if method not in ("solved", "cayley", "matrix_exp", "fixed"):
            raise ValueError(f"unknown projector method {method!r}; choose solved, cayley, matrix_exp or fixed")
        if refresh_every_steps < 1:
            raise ValueError(f"refresh_every_steps must be at least 1, not {refresh_every_steps}")
        self.student_channels, self.target_channels, self.method = student_channels, target_channels, method
        self.refresh_every_steps = refresh_every_steps
        narrow, wide = sorted((student_channels, target_channels))
        matrix = start.detach().float() if isinstance(start, Tensor) else torch.eye(narrow, wide)
        if isinstance(start, str) and start not in ("identity", "procrustes"):
            raise ValueError(f"unknown start {start!r}; choose identity or procrustes, or give a matrix")
        if matrix.shape != (narrow, wide):
            raise ValueError(
                f"start must be a {narrow} x {wide} matrix with orthonormal rows, not one of shape {list(matrix.shape)}"
            )
        if not orthonormality_error(matrix) <= 1e-4:
            raise ValueError(
                f"start must be a {narrow} x {wide} matrix with orthonormal rows; those of the given one are "
                f"{orthonormality_error(matrix):.1g} off"
            )
        self.is_learned = method in ("cayley", "matrix_exp")
        self.is_wider = student_channels > target_channels
        self._solves_at_start = method == "solved" or (isinstance(start, str) and start == "procrustes")
        self._accumulates = not self.is_learned or self._solves_at_start
        self.statistics = RunningCrossCovariance(student_channels, target_channels, momentum)
        if self.is_learned:
            self.register_buffer("base", _complete(matrix))
            self.tangent = nn.Parameter(torch.zeros(wide, narrow))
            self.gain = nn.Parameter(torch.ones(()))
            self.bias = nn.Parameter(torch.zeros(wide))
        else:
            self.register_buffer("solution", matrix.clone())
            self.register_buffer("gain", torch.ones(()))
        self.register_load_state_dict_post_hook(_stop_accumulating)

    def matrix(self) -> Float[Tensor, "narrow wide"]:
        """P, with orthonormal rows, float32.

        Raises:
            ValueError: if the projector was put into half precision, where rows are not orthonormal.
        """
        stored = self.base if self.is_learned else self.solution
        if stored.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"the projector is in {stored.dtype}: keep it in float32 (projector.float()), and train under autocast"
            )
        if not self.is_learned:
            return self.solution
        with torch.autocast(self.tangent.device.type, enabled=False):
            wide, narrow = self.tangent.shape
            # In float64: the exponential drifts to 1e-4 off in float32, and products to 1e-3 in TF32.
            half = torch.cat([self.tangent, self.tangent.new_zeros(wide, wide - narrow)], dim=1).double()
            skew = half - half.T
            if self.method == "matrix_exp":
                rotation = torch.matrix_exp(skew)
            else:
                identity = torch.eye(wide, device=skew.device, dtype=skew.dtype)
                # Never singular, since a skew matrix has no real eigenvalues: a check would wait for the GPU in vain.
                rotation = torch.linalg.solve_ex(identity - skew / 2, identity + skew / 2)[0]
            return (self.base.double() @ rotation[:, :narrow]).T.float()

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Student and target rows in the wider one's space, float32, both `[B, N, wide]`.

        In training mode rows also enter the running statistics: all until there are means, then some of each sample's
        (`sampling_stride`). No gradient flows into the target.
        """
        _check_rows(self, student, target)
        with _without_autocast(student.device.type):
            student, target = self._centred(student, target)
            matrix = self.matrix()
            if self.is_wider:
                student, target = self.gain * student, _map_rows(target, matrix)
            else:
                student = _map_rows(student, self.gain * matrix)
            return student + self.bias if self.is_learned else student, target

    def compare_narrow(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` does for a mean squared error, at half of the cost, where P is not trained and embeds S.

        P is an isometry, so ||g S P - T||^2 = ||g S - T P^T||^2 + ||T||^2 - ||T P^T||^2, and only the first of these
        moves the student: nothing as wide as the target has to be made, kept and differentiated.

        Returns:
            Student and target rows in the narrower one's space, float32, both `[B, N, Ds]`, scaled so that their mean
            squared error is that of `forward`'s rows but for the third: what the target has outside of P's reach,
            `[B]`, without gradient.
        """
        assert self.has_narrow_form
        _check_rows(self, student, target)
        with _without_autocast(student.device.type):
            student, target = self._centred(student, target)
            scale = math.sqrt(self.student_channels / self.target_channels)
            reached = _map_rows(target, scale * self.matrix().T)
            outside = _sample_squares(target) - _sample_squares(reached) / scale**2
            outside = outside.clamp(min=0) / (target.shape[1] * target.shape[2])
            return (scale * self.gain) * student, reached, outside

    @property
    def has_narrow_form(self) -> bool:
        """Whether `compare_narrow` can stand for `forward`."""
        return not self.is_learned and not self.is_wider

    def _centred(self, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in float32, about the running means where P is not trained, once the statistics have taken them in."""
        student, target = student.float(), target.detach().float()
        accumulates, statistics = self.training and self._accumulates, self.statistics
        if accumulates and (self.is_learned or not statistics.has_means):
            statistics.accumulate(student.flatten(0, -2), target.flatten(0, -2))
        if self.is_learned:
            return student, target
        student, target = student - statistics.student_mean, target - statistics.target_mean
        if accumulates and statistics.has_means:
            stride = sampling_stride(student.shape[1])
            statistics.accumulate_deviations(student[:, ::stride], target[:, ::stride])
        return student, target

    def after_step(self, step: int) -> None:
        """Once per optimizer step, outside any compiled graph: bring statistics, gain and, when due, P up to date.

        Args:
            step: optimizer steps made so far; P is solved after the first and at every multiple of
                `refresh_every_steps`.
        """
        if self.is_learned:
            return
        self.statistics.merge()
        matrix = self.solution
        if self.method == "solved" and (step == 1 or step % self.refresh_every_steps == 0):
            matrix = self._solve()
        self._set(matrix)

    def initialize(self) -> None:
        """Start from the closed form for the rows of forward passes made in training mode so far, without any step.

        Those rows count as the running statistics' first step.
        """
        if not self._accumulates:
            return
        self.statistics.num_merges.zero_()
        self.statistics.merge()
        if self.statistics.num_merges == 0:
            raise ValueError("no rows to start from: make forward passes in training mode before initialize()")
        self._set(self._solve() if self._solves_at_start else self.solution)
        self._accumulates = not self.is_learned

    @torch.no_grad()
    def _solve(self) -> Tensor:
        matrix = procrustes(self._oriented_cross_covariance())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(matrix, 0)  # unlike devices may round the same solution differently
        return matrix

    @torch.no_grad()
    def _set(self, matrix: Tensor) -> None:
        """Take over P, with the gain (and bias) that fit it in the least-squares sense."""
        statistics = self.statistics
        matched = (matrix * self._oriented_cross_covariance()).sum()
        has_rows = statistics.num_merges > 0
        gain = matched / statistics.student_variance.clamp(min=1e-12)
        self.gain.copy_(torch.where(has_rows, gain, self.gain))
        if not self.is_learned:
            if matrix is not self.solution:
                self.solution.copy_(torch.where(has_rows, matrix, self.solution))
            return
        self.base.copy_(_complete(matrix))
        student_mean, target_mean = statistics.student_mean, statistics.target_mean
        if self.is_wider:
            self.bias.copy_(target_mean @ matrix - self.gain * student_mean)
        else:
            self.bias.copy_(target_mean - self.gain * student_mean @ matrix)

    def _oriented_cross_covariance(self) -> Tensor:
        cross_covariance = self.statistics.cross_covariance
        return cross_covariance.T if self.is_wider else cross_covariance

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.student_channels} -> {self.target_channels}, {self.method}"


class LeastSquaresProjector(nn.Module):
    """A free linear map in closed form: the regression of the target rows on the student's, from running statistics.

    What `LinearProjector` learns, solved as `OrthogonalProjector` solves its rotation: nothing is trained, and the map
    stretches and squeezes directions as the regression wants. `(S - mean) W` is compared to `T - mean`.

    Args:
        student_channels: Ds.
        target_channels: Dt.
        momentum: of the running statistics.
        refresh_every_steps: optimizer steps between two solutions.
        ridge: share of the student rows' mean variance added to every direction's before it is inverted.

    Raises:
        ValueError: for a value outside its range.
    """

    solution: Tensor

    def __init__(
        self,
        student_channels: int,
        target_channels: int,
        *,
        momentum: float = 0.99,
        refresh_every_steps: int = 10,
        ridge: float = 1e-3,
    ):
        super().__init__()
        _check_channels(student_channels, target_channels)
        if refresh_every_steps < 1:
            raise ValueError(f"refresh_every_steps must be at least 1, not {refresh_every_steps}")
        if not 0 < ridge < math.inf:
            raise ValueError(f"the ridge must be above 0 and finite, not {ridge}")
        self.student_channels, self.target_channels = student_channels, target_channels
        self.refresh_every_steps, self.ridge = refresh_every_steps, ridge
        # Against student and target rows side by side: the student's own covariance is the left part.
        self.statistics = RunningCrossCovariance(student_channels, student_channels + target_channels, momentum)
        self.register_buffer("solution", torch.eye(student_channels, target_channels))

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Regressed student rows and centred target rows, float32, both `[B, N, Dt]`.

        In training mode the rows also enter the running statistics. No gradient flows into the target.
        """
        _check_rows(self, student, target)
        with torch.autocast(student.device.type, enabled=False):
            student, target = student.float(), target.detach().float()
            if self.training:
                both = torch.cat([student.detach(), target], dim=-1)
                self.statistics.accumulate(student.flatten(0, -2), both.flatten(0, -2))
            target_mean = self.statistics.target_mean[self.student_channels :]
            return (student - self.statistics.student_mean) @ self.solution, target - target_mean

    def after_step(self, step: int) -> None:
        """Once per optimizer step, outside any compiled graph: see `OrthogonalProjector.after_step`."""
        self.statistics.merge()
        if step == 1 or step % self.refresh_every_steps == 0:
            self._solve()

    def initialize(self) -> None:
        """Start from the closed form for the rows of forward passes made in training mode so far, without any step."""
        self.statistics.num_merges.zero_()
        self.statistics.merge()
        if self.statistics.num_merges == 0:
            raise ValueError("no rows to start from: make forward passes in training mode before initialize()")
        self._solve()

    @torch.no_grad()
    def _solve(self) -> None:
        own, cross = self.statistics.cross_covariance.double().split([self.student_channels, self.target_channels], 1)
        own = (own + own.T) / 2
        amount = self.ridge * own.diagonal().mean().clamp(min=1e-12)
        factor, failed = torch.linalg.cholesky_ex(
            own + amount * torch.eye(len(own), dtype=own.dtype, device=own.device)
        )
        solution = torch.cholesky_solve(cross, factor).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(solution, 0)  # unlike devices may round the same solution differently
        keep = (failed > 0) | ~solution.isfinite().all() | (self.statistics.num_merges == 0)
        self.solution.copy_(torch.where(keep, self.solution, solution))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.student_channels} -> {self.target_channels}, ridge {self.ridge}"


class LinearProjector(nn.Module):
    """A free linear map with bias, trained: the 1x1 convolution of FitNets (Romero et al., 2015, arXiv 1412.6550).

    Args:
        student_channels: Ds.
        target_channels: Dt.
    """

    def __init__(self, student_channels: int, target_channels: int):
        super().__init__()
        _check_channels(student_channels, target_channels)
        self.student_channels, self.target_channels = student_channels, target_channels
        self.linear = nn.Linear(student_channels, target_channels)

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Projected student rows and the target, both `[B, N, Dt]`."""
        _check_rows(self, student, target)
        if not torch.is_autocast_enabled(student.device.type):  # which chooses the precision itself
            student = student.to(self.linear.weight.dtype)
        return self.linear(student), target.detach()


class IdentityProjector(nn.Module):
    """No projection: student and target are compared as they are, as BK-SDM does (Kim et al., 2023, arXiv 2305.15798).

    Raises:
        ValueError: if the widths differ.
    """

    def __init__(self, student_channels: int, target_channels: int):
        super().__init__()
        _check_channels(student_channels, target_channels)
        if student_channels != target_channels:
            raise ValueError(
                f"without a projector student and target need equal widths, not {student_channels} and "
                f"{target_channels}; use another projector"
            )
        self.student_channels, self.target_channels = student_channels, target_channels

    def forward(
        self, student: Float[Tensor, "batch positions student"], target: Float[Tensor, "batch positions target"]
    ) -> tuple[Tensor, Tensor]:
        """Both as they came."""
        _check_rows(self, student, target)
        return student, target.detach()


Projector = OrthogonalProjector | LeastSquaresProjector | LinearProjector | IdentityProjector


def parameter_groups(network: nn.Module, projectors: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the network decayed, projectors never.

    Args:
        network: the student alone.
        projectors: may be without parameters; then there is one group.
        weight_decay: of the network.
    """
    groups = [{"params": list(network.parameters()), "weight_decay": weight_decay}]
    projector_parameters = [parameter for projector in projectors for parameter in projector.parameters()]
    if projector_parameters:
        groups.append({"params": projector_parameters, "weight_decay": 0.0})
    return groups


def _stop_accumulating(projector: OrthogonalProjector, _incompatible_keys: Any) -> None:
    """After loading: a learned projector that was initialized before it was saved collects nothing more."""
    if projector.is_learned and projector.statistics.num_merges > 0:
        projector._accumulates = False


def _complete(rows: Float[Tensor, "narrow wide"]) -> Float[Tensor, "wide wide"]:
    """An orthogonal matrix whose first columns are the given orthonormal rows."""
    columns = rows.double().T
    full, _ = torch.linalg.qr(columns, mode="complete")
    full[:, : columns.shape[1]] = columns
    return full.float()


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context without autocast; where there is none anyway it costs nothing."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _squares(rows: Float[Tensor, "... rows channels"]) -> Float[Tensor, ""]:
    """Sum of all squares, float64. By way of norms of parts: needs no copy, and is exact for any number of rows."""
    return torch.linalg.vector_norm(rows, dim=(-2, -1) if rows.ndim == 3 else -1).square().sum(dtype=torch.float64)


def _sample_squares(rows: Float[Tensor, "batch positions channels"]) -> Float[Tensor, " batch"]:
    """Sum of squares of each sample."""
    return torch.linalg.vector_norm(rows, dim=(1, 2)).square()


def _map_rows(
    rows: Float[Tensor, "batch positions channels"], matrix: Float[Tensor, "channels mapped"]
) -> Float[Tensor, "batch positions mapped"]:
    """`rows @ matrix`, in the rows' order in memory: maps have channels one after another, and are not copied."""
    if rows.stride(-1) == 1 or matrix.requires_grad:  # a trained matrix is better multiplied once by all rows
        return rows @ matrix
    return torch.bmm(matrix.T.expand(len(rows), -1, -1), rows.mT).mT


def _note_means(statistics: RunningCrossCovariance, _incompatible_keys: Any) -> None:
    """After loading."""
    statistics.has_means = bool(statistics.num_merges > 0)


def _check_channels(student_channels: int, target_channels: int) -> None:
    if student_channels < 1 or target_channels < 1:
        raise ValueError(f"a projector needs at least 1 channel, not {student_channels} and {target_channels}")


def _check_rows(projector: Any, student: Tensor, target: Tensor) -> None:
    if (
        student.shape[:-1] != target.shape[:-1]
        or student.shape[-1] != projector.student_channels
        or target.shape[-1] != projector.target_channels
    ):
        raise ValueError(
            f"expected student rows [..., {projector.student_channels}] and target rows [..., "
            f"{projector.target_channels}], got {list(student.shape)} and {list(target.shape)}"
        )
