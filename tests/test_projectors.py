import io
import math
from contextlib import suppress

import numpy as np
import pytest
import scipy.linalg
import torch
from jaxtyping import TypeCheckError
from torch import nn

from vkd_gen.losses import feature_losses
from vkd_gen.projectors import (
    IdentityProjector,
    LearnedProjector,
    LinearProjector,
    OrthogonalProjector,
    RunningCrossCovariance,
    orthonormality_error,
    parameter_groups,
    procrustes,
    random_orthonormal,
    sampling_stride,
)

# Student and target channels.
WIDTHS = pytest.mark.parametrize("widths", [(3, 6), (4, 4), (6, 3)], ids=lambda widths: f"{widths[0]}to{widths[1]}")
METHODS = pytest.mark.parametrize("method", ["solved", "cayley", "matrix_exp", "fixed"])
LEARNED = pytest.mark.parametrize("method", ["cayley", "matrix_exp"])
# With --jaxtyping-packages the type checker is faster than the library's own check.
REFUSED = (ValueError, TypeCheckError)


def double(tensor):
    return tensor.detach().double().numpy()


def make_rows(widths, shape=(8, 16), *, seed=0, noise=0.5):
    """Student and target rows that share a part, with unequal scales and means that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    student_channels, target_channels = widths
    common = torch.randn(*shape, 5, generator=generator)
    fixed = torch.Generator().manual_seed(99)
    student_map = torch.randn(5, student_channels, generator=fixed)
    target_map = torch.randn(5, target_channels, generator=fixed)
    student = common @ student_map + noise * torch.randn(*shape, student_channels, generator=generator) + 1.5
    target = 0.7 * common @ target_map + noise * torch.randn(*shape, target_channels, generator=generator) - 0.5
    return student, target


def random_projector(widths, method, seed=0):
    """A projector away from its trivial start: some P, some gain, and means or bias."""
    start = random_orthonormal(min(widths), max(widths), seed)
    projector = OrthogonalProjector(*widths, method=method, start=start).train()
    if isinstance(projector, LearnedProjector):
        with torch.no_grad():
            projector.tangent.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
            projector.gain.fill_(0.8)
            projector.bias.normal_(generator=torch.Generator().manual_seed(seed))
    else:
        projector(*make_rows(widths, seed=seed))
        projector.initialize()
    return projector


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# The trap: why torch's own parametrization is not used


def one_adamw_step(parameters, loss, weight_decay):
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=weight_decay)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.01, 0.05])
@pytest.mark.parametrize("widths", [(3, 6), (6, 3)], ids=["narrower", "wider"])
def test_torch_default_orthogonal_map_turns_to_zero_under_weight_decay(widths, weight_decay):
    """torch.nn.utils.parametrizations.orthogonal picks householder for a rectangle and keeps its signs, -1.0, as
    decayed parameters that are cut off to integers: -0.999975 becomes 0, and P with it, for ever."""
    student, target = make_rows(widths)
    linear = torch.nn.utils.parametrizations.orthogonal(nn.Linear(*widths, bias=False))
    assert linear.weight.norm().item() == pytest.approx(math.sqrt(min(widths)), rel=1e-5)
    one_adamw_step(linear.parameters(), (linear(student) - target).square().mean(), weight_decay)
    assert linear.weight.abs().max() == 0


@pytest.mark.parametrize("weight_decay", [0.01, 0.05])
@pytest.mark.parametrize("method", ["solved", "cayley", "matrix_exp"])
@WIDTHS
def test_ours_stays_orthonormal_under_weight_decay(widths, method, weight_decay):
    projector = OrthogonalProjector(*widths, method=method, refresh_every_steps=1).train()
    backbone = nn.Linear(widths[0], widths[0])
    for step in range(1, 6):
        student, target = make_rows(widths, seed=step)
        projected, target = projector(backbone(student), target)
        parameters = [*backbone.parameters(), *projector.parameters()]  # everything decayed, as a careless user would
        one_adamw_step(parameters, (projected - target).square().mean(), weight_decay)
        projector.after_step(step)
        matrix = projector.matrix()
        assert matrix.shape == (min(widths), max(widths))
        assert orthonormality_error(matrix) < 1e-5
        assert matrix.norm().item() == pytest.approx(math.sqrt(min(widths)), rel=1e-5)
    assert not torch.equal(projector.matrix(), torch.eye(min(widths), max(widths)))  # and it moved


@pytest.mark.parametrize("method", ["solved", "cayley", "matrix_exp"])
@pytest.mark.parametrize("widths", [(3, 6), pytest.param((6, 3), marks=pytest.mark.slow)], ids=["narrower", "wider"])
def test_orthonormal_over_many_bf16_autocast_steps(widths, method):
    projector = OrthogonalProjector(*widths, method=method).train()
    backbone = nn.Linear(5, widths[0])
    parameters = [*backbone.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(4, 8, 5, generator=generator)
    target = sample @ torch.randn(5, widths[1], generator=generator)
    start = projector.matrix().detach().clone()
    errors = []
    for step in range(1, 301):
        with torch.autocast("cpu", torch.bfloat16):
            rows = backbone(sample)
            projected, wanted = projector(rows, target)
            loss = (projected - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        projector.after_step(step)
        if step % 20 == 0:
            errors.append(orthonormality_error(projector.matrix()))
    assert rows.dtype == torch.bfloat16
    assert projected.dtype == wanted.dtype == torch.float32
    assert len(errors) == 15
    assert max(errors) < 1e-5
    assert (projector.matrix() - start).norm() > 0.1


# procrustes and other closed forms


def test_procrustes_known_value():
    """C = [[0, 2], [-3, 0]] is diag(2, 3) times a rotation by 90 degrees, its polar factor."""
    expected = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(procrustes(torch.tensor([[0.0, 2.0], [-3.0, 0.0]])), expected)


@pytest.mark.parametrize("shape", [(3, 7), (5, 5), (7, 3)])
def test_procrustes_reaches_the_nuclear_norm(shape):
    """max over orthonormal P of trace(P^T C) is the sum of C's singular values (von Neumann's trace inequality)."""
    cross_covariance = torch.randn(shape)
    matrix = procrustes(cross_covariance)
    optimum = np.linalg.svd(double(cross_covariance), compute_uv=False).sum()
    assert np.trace(double(matrix).T @ double(cross_covariance)) == pytest.approx(optimum, rel=1e-5)
    assert orthonormality_error(matrix) < 1e-5


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5, 1e7, 1e20])
def test_procrustes_bears_any_condition(shape, condition):
    """Orthonormal, and as good as the singular value decomposition, near where one way is left for the other too."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 5, generator=generator, dtype=torch.float64))[0] for side in shape)
    values = torch.logspace(0, -np.log10(condition), 5, dtype=torch.float64)
    cross_covariance = left * values @ right.T  # of rank 5: singular if 6 x 6
    found = procrustes(cross_covariance)
    assert orthonormality_error(found) < 1e-7
    best = torch.linalg.svdvals(cross_covariance).sum()
    assert (found * cross_covariance).sum() == pytest.approx(float(best), rel=1e-9)
    if condition <= 1e3 and shape != (6, 6):  # what is determined is the same matrix
        torch.testing.assert_close(found, left @ right.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 7), (5, 5), (7, 3)])
def test_random_orthonormal(shape):
    matrix = random_orthonormal(*shape, seed=1)
    assert matrix.shape == shape
    assert matrix.dtype == torch.float32
    assert orthonormality_error(matrix) < 1e-6
    assert torch.equal(matrix, random_orthonormal(*shape, seed=1))
    assert not torch.allclose(matrix, random_orthonormal(*shape, seed=2), atol=0.01)


def test_random_orthonormal_is_uniform():
    """Entries have mean 0 and variance 1 / wide (Haar measure); QR alone gives first entries of one sign."""
    matrices = torch.stack([random_orthonormal(2, 4, seed) for seed in range(1000)])
    bound = 4 / math.sqrt(4 * 1000)  # four standard errors
    assert matrices.mean(0).abs().max() < bound
    torch.testing.assert_close(matrices.square().mean(0), torch.full((2, 4), 0.25), rtol=0, atol=0.03)


def test_orthonormality_error_known_values():
    assert orthonormality_error(torch.eye(2, 3)) == 0
    assert orthonormality_error(2 * torch.eye(2, 3)) == 3  # 4 - 1
    assert orthonormality_error(2 * torch.eye(3, 2)) == 3
    assert orthonormality_error(torch.zeros(2, 2)) == 1
    assert orthonormality_error(torch.tensor([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(0.6, rel=1e-6)


# RunningCrossCovariance


class ReferenceStatistics:
    """Every row ever seen, with the weight that an exponential average without start-up bias gives its step."""

    def __init__(self, momentum):
        self.momentum, self.steps = momentum, []

    def add(self, student, target):
        self.steps.append((double(student), double(target)))

    def moments(self):
        age = np.arange(len(self.steps))[::-1]
        weights = self.momentum ** age.astype(np.float64)
        weights /= weights.sum()
        student_mean = sum(w * s.mean(0) for w, (s, _) in zip(weights, self.steps, strict=True))
        target_mean = sum(w * t.mean(0) for w, (_, t) in zip(weights, self.steps, strict=True))
        cross, student_variance, target_variance = 0, 0, 0
        for weight, (student, target) in zip(weights, self.steps, strict=True):
            s, t = student - student_mean, target - target_mean
            cross = cross + weight * np.einsum("ns,nt->st", s, t) / len(s)
            student_variance += weight * np.square(s).sum() / len(s)
            target_variance += weight * np.square(t).sum() / len(t)
        return {
            "student_mean": student_mean,
            "target_mean": target_mean,
            "cross_covariance": cross,
            "student_variance": student_variance,
            "target_variance": target_variance,
        }


def assert_statistics(statistics, expected, tolerance):
    """Errors relative to the size of what is estimated; of means, to the standard deviation."""
    deviation = {
        "student_mean": math.sqrt(expected["student_variance"]),
        "target_mean": math.sqrt(expected["target_variance"]),
    }
    for name, value in expected.items():
        scale = deviation.get(name, np.abs(value).max())
        error = np.abs(double(getattr(statistics, name)) - value).max() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def uneven_steps(num_steps, offset=0.0, drift=0.0):
    """Row counts differ from step to step; the means may be far from zero, and may move."""
    for step, count in zip(range(num_steps), [40, 7, 200, 1, 64, 33], strict=False):
        student, target = make_rows((3, 5), (count,), seed=step)
        yield student + offset + step * drift, target - 2 * offset + step * drift


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_running_statistics_equal_a_weighted_average(momentum, num_steps):
    statistics, reference = RunningCrossCovariance(3, 5, momentum), ReferenceStatistics(momentum)
    for student, target in uneven_steps(num_steps, drift=0.5):
        statistics.accumulate(student, target)
        statistics.merge()
        reference.add(student, target)
    assert int(statistics.num_merges) == num_steps
    assert_statistics(statistics, reference.moments(), 2e-5)


@pytest.mark.parametrize("shape", [(5, 8), (40, 1), (1, 40)], ids=str)  # with products of samples, and of all rows
@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_statistics_of_deviations_equal_those_of_rows(shape, offset):
    statistics, reference = RunningCrossCovariance(3, 5, 0.9), ReferenceStatistics(0.9)
    assert not statistics.has_means
    for step in range(4):
        student, target = (rows + offset for rows in make_rows((3, 5), shape, seed=step))
        if step == 0:
            statistics.accumulate(student.flatten(0, 1), target.flatten(0, 1))
        else:
            as_map = (student - statistics.student_mean).mT.contiguous().mT  # channels one after another in memory
            statistics.accumulate_deviations(as_map, target - statistics.target_mean)
        statistics.merge()
        assert statistics.has_means
        reference.add(student.flatten(0, 1), target.flatten(0, 1))
    assert_statistics(statistics, reference.moments(), 1e-3 if offset else 2e-5)


@pytest.mark.parametrize("num_merges", [0, 1])
def test_loaded_statistics_know_whether_they_have_means(num_merges):
    saved, loaded = RunningCrossCovariance(3, 5, 0.9), RunningCrossCovariance(3, 5, 0.9)
    for _ in range(num_merges):
        saved.accumulate(*make_rows((3, 5), (20,)))
        saved.merge()
    loaded.load_state_dict(saved.state_dict())
    assert loaded.has_means == bool(num_merges)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_running_statistics_are_stable_far_from_zero(num_steps):
    """Mean / standard deviation of about 1000: the naive E[xy] - E[x]E[y] has no correct digit left in float32."""
    statistics, reference = RunningCrossCovariance(3, 5, 0.9), ReferenceStatistics(0.9)
    for student, target in uneven_steps(num_steps, offset=2000.0):
        statistics.accumulate(student, target)
        statistics.merge()
        reference.add(student, target)
    moments = reference.moments()
    assert moments["student_mean"].min() / math.sqrt(moments["student_variance"] / 3) > 500
    assert_statistics(statistics, moments, 1e-3)


# OrthogonalProjector: the matrix


@pytest.mark.parametrize(
    ("method", "angle"),
    # exp([[0, -a], [a, 0]]) rotates by a; the Cayley transform of the same by 2 atan(a / 2).
    [("matrix_exp", 0.7), ("cayley", 2 * math.atan(0.35))],
)
def test_learned_matrix_known_value(method, angle):
    projector = OrthogonalProjector(2, 2, method=method)
    with torch.no_grad():
        projector.tangent[1, 0] = 0.7
    expected = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(projector.matrix().detach(), expected)
    narrow = OrthogonalProjector(1, 2, method=method)
    with torch.no_grad():
        narrow.tangent[1, 0] = 0.7
    torch.testing.assert_close(narrow.matrix().detach(), expected[:1])


@LEARNED
@WIDTHS
def test_learned_matrix_equals_a_float64_reference(method, widths):
    projector = random_projector(widths, method)
    narrow, wide = min(widths), max(widths)
    skew = np.zeros((wide, wide))
    for i in range(wide):
        for j in range(narrow):
            value = projector.tangent[i, j].item()
            skew[i, j] += value
            skew[j, i] -= value
    if method == "matrix_exp":
        rotation = scipy.linalg.expm(skew)
    else:
        rotation = np.linalg.inv(np.eye(wide) - skew / 2) @ (np.eye(wide) + skew / 2)
    expected = (double(projector.base) @ rotation)[:, :narrow].T
    np.testing.assert_allclose(double(projector.matrix()), expected, atol=2e-6)


@METHODS
@WIDTHS
def test_identity_start_pads_the_narrower_side_with_zeros(method, widths):
    projector = OrthogonalProjector(*widths, method=method).eval()
    student, target = make_rows(widths)
    projected, wanted = projector(student, target)
    pad = abs(widths[0] - widths[1])
    padded_student = nn.functional.pad(student, (0, pad if widths[0] < widths[1] else 0))
    padded_target = nn.functional.pad(target, (0, pad if widths[0] > widths[1] else 0))
    torch.testing.assert_close(projected, padded_student)
    torch.testing.assert_close(wanted, padded_target)


# OrthogonalProjector: forward


@METHODS
@WIDTHS
def test_forward_equals_its_formula(method, widths):
    """g (S - mean) P against T - mean, for a wider student g (S - mean) against (T - mean) P; learned: with a bias."""
    projector = random_projector(widths, method).eval()
    student, target = make_rows(widths, seed=5)
    projected, wanted = projector(student, target)
    s, t, matrix, gain = double(student), double(target), double(projector.matrix()), double(projector.gain)
    bias = double(projector.bias) if isinstance(projector, LearnedProjector) else 0
    if not isinstance(projector, LearnedProjector):
        s = s - double(projector.statistics.student_mean)
        t = t - double(projector.statistics.target_mean)
    if widths[0] > widths[1]:
        t = np.einsum("bnk,kw->bnw", t, matrix)
    else:
        s = np.einsum("bnk,kw->bnw", s, matrix)
    np.testing.assert_allclose(double(projected), gain * s + bias, atol=1e-5)
    np.testing.assert_allclose(double(wanted), t, atol=1e-5)


@pytest.mark.parametrize("method", ["solved", "fixed"])
@pytest.mark.parametrize("widths", [(3, 6), (4, 4)])
@pytest.mark.parametrize("as_map", [False, True])
def test_the_narrow_comparison_is_the_wide_one(method, widths, as_map):
    """Value of each sample, gradient and what the statistics take in, against `forward` and a plain mean of squares."""
    found = []
    for is_narrow in (True, False):
        projector = random_projector(widths, method)
        student, target = (rows.mT.contiguous().mT if as_map else rows for rows in make_rows(widths, seed=5))
        student.requires_grad_()
        target.requires_grad_()
        if is_narrow:
            losses = projector.losses(student, target)
        else:
            projected, wanted = projector(student, target)
            losses = (projected - wanted).square().mean((1, 2))
        (losses * torch.arange(8)).sum().backward()
        assert target.grad is None
        found.append((losses, student.grad, projector.statistics.sums))
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-5)


@METHODS
@WIDTHS
@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cka"])
def test_losses_compare_what_forward_gives(method, widths, kind):
    projector = random_projector(widths, method).eval()
    rows = make_rows(widths, seed=5)
    torch.testing.assert_close(projector.losses(*rows, kind), feature_losses(*projector(*rows), kind))


@METHODS
@WIDTHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_result_is_float32_in_any_precision(method, widths, dtype):
    projector = random_projector(widths, method).eval()
    student, target = (rows.to(dtype) for rows in make_rows(widths))
    expected = projector(student.float(), target.float())
    with torch.autocast("cpu", torch.bfloat16):
        actual = projector(student, target)
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted)  # not one product in bfloat16


@METHODS
@WIDTHS
def test_gradients_reach_student_and_parameters_never_the_target(method, widths):
    projector = random_projector(widths, method)
    student, target = (rows.requires_grad_() for rows in make_rows(widths))
    projected, wanted = projector(student, target)
    # P is trained on the target's side for a wider student; everything else there is cut off
    assert wanted.requires_grad == (isinstance(projector, LearnedProjector) and widths[0] > widths[1])
    upstream = torch.randn_like(projected)
    (projected * upstream).sum().backward()
    assert target.grad is None
    # dL/dS = g dL/dY P^T: neither amplified nor hidden in some direction
    expected = double(projector.gain) * double(upstream)
    if widths[0] <= widths[1]:
        expected = expected @ double(projector.matrix()).T
    np.testing.assert_allclose(double(student.grad), expected, atol=1e-5)
    if method in ("solved", "fixed"):
        assert not list(projector.parameters())
        assert not any(value.requires_grad for value in projector.buffers())
    else:
        assert sorted(dict(projector.named_parameters())) == ["bias", "gain", "tangent"]
        for name, parameter in projector.named_parameters():
            # a wider student is not multiplied by P; there the target is
            is_reached = name != "tangent" or widths[0] <= widths[1]
            assert (parameter.grad is not None and parameter.grad.abs().max() > 1e-3) == is_reached, name


# OrthogonalProjector: closed forms


@METHODS
@WIDTHS
def test_initialize_equals_a_float64_least_squares_solution(method, widths):
    """Several batches; `fixed` keeps its P and takes the best gain and means, the others take the best P as well."""
    narrow, wide = min(widths), max(widths)
    given = random_orthonormal(narrow, wide, seed=2)
    projector = OrthogonalProjector(*widths, method=method, start=given if method == "fixed" else "procrustes").train()
    batches = [make_rows(widths, seed=seed, shape=(seed + 1, 20)) for seed in range(3)]
    for batch in batches:
        projector(*batch)
    projector.initialize()

    student, target = (np.concatenate([double(batch[i].flatten(0, 1)) for batch in batches]) for i in (0, 1))
    s, t = student - student.mean(0), target - target.mean(0)
    cross = s.T @ t if widths[0] <= widths[1] else t.T @ s
    if method == "fixed":
        matrix = double(given)
    else:
        left, _, right = np.linalg.svd(cross, full_matrices=False)
        matrix = left @ right
    gain = (matrix * cross).sum() / np.square(s).sum()
    np.testing.assert_allclose(double(projector.matrix()), matrix, atol=1e-4)
    assert projector.gain.item() == pytest.approx(gain, rel=1e-4)
    residual = gain * s @ matrix - t if widths[0] <= widths[1] else gain * s - t @ matrix
    projected, wanted = projector.eval()(*(torch.from_numpy(rows).float()[None] for rows in (student, target)))
    np.testing.assert_allclose(double(projected - wanted)[0], residual, atol=1e-3)


@LEARNED
def test_initialize_leaves_a_learned_projector_with_a_given_start_alone(method):
    projector = OrthogonalProjector(3, 6, method=method, start=random_orthonormal(3, 6)).train()
    before = state_of(projector)
    projector(*make_rows((3, 6)))
    projector.initialize()
    projector.after_step(10)
    assert_same_state(state_of(projector), before)


@LEARNED
def test_learned_projector_accumulates_only_until_it_is_initialized(method):
    projector = OrthogonalProjector(3, 6, method=method, start="procrustes").train()
    projector(*make_rows((3, 6)))
    assert projector.statistics.sums[0] == 8 * 16  # rows
    projector.initialize()
    before = state_of(projector)
    projector(*make_rows((3, 6), seed=1))
    projector.after_step(10)
    assert projector.statistics.sums.abs().max() == 0
    assert_same_state(state_of(projector), before)


@pytest.mark.parametrize("call", ["initialize", "after_step"])
@pytest.mark.parametrize(
    ("method", "start"),
    [("solved", "identity"), ("fixed", "identity"), ("cayley", "procrustes"), ("matrix_exp", "procrustes")],
)
def test_without_rows_the_start_stays(method, start, call):
    """A refusal in words would do as well; a gain of 0 that silently cuts the student off would not."""
    projector = OrthogonalProjector(3, 6, method=method, start=start).train()
    before = state_of(projector)
    with suppress(ValueError, RuntimeError):
        projector.initialize() if call == "initialize" else projector.after_step(10)
    assert_same_state(state_of(projector), before)


def test_initialize_forgets_what_came_before():
    """Rows seen since the last step count as the first one of the running statistics."""
    projector = OrthogonalProjector(3, 6, momentum=0.9).train()
    projector(*make_rows((3, 6), seed=1))
    projector.after_step(1)
    student, target = make_rows((3, 6), seed=2)
    projector(student + 1, target)
    projector.initialize()
    reference = ReferenceStatistics(0.9)
    seen = slice(None, None, sampling_stride(16))  # once there are means
    reference.add((student + 1)[:, seen].flatten(0, 1), target[:, seen].flatten(0, 1))
    assert_statistics(projector.statistics, reference.moments(), 1e-5)
    student, target = make_rows((3, 6), seed=3)
    projector(student, target)
    projector.after_step(1)
    reference.add(student[:, seen].flatten(0, 1), target[:, seen].flatten(0, 1))
    assert_statistics(projector.statistics, reference.moments(), 1e-5)


@pytest.mark.parametrize("num_positions", [1, 2, 7, 16, 49, 77, 196, 1024, 4096])
def test_sampling_visits_every_column_of_a_map(num_positions):
    seen = range(0, num_positions, sampling_stride(num_positions))
    assert min(num_positions, math.sqrt(num_positions)) <= len(seen) <= 3 * math.sqrt(num_positions)
    side = math.isqrt(num_positions)
    if side**2 == num_positions:
        assert {position % side for position in seen} == set(range(side))


def test_solved_matrix_is_refreshed_when_due_and_the_gain_at_every_step():
    projector = OrthogonalProjector(3, 6, refresh_every_steps=3).train()
    matrices, gains = [projector.matrix().clone()], [projector.gain.item()]
    for step in range(1, 8):
        projector(*make_rows((3, 6), seed=step))
        projector.after_step(step)
        matrices.append(projector.matrix().clone())
        gains.append(projector.gain.item())
    changed = [step for step in range(1, 8) if not torch.equal(matrices[step], matrices[step - 1])]
    assert changed == [1, 3, 6]  # after the first step, then at every multiple
    assert all(gains[step] != gains[step - 1] for step in range(1, 8))


def test_fixed_matrix_never_changes():
    start = random_orthonormal(3, 6, seed=2)
    projector = OrthogonalProjector(3, 6, method="fixed", start=start, refresh_every_steps=1).train()
    for step in range(1, 4):
        projector(*make_rows((3, 6), seed=step))
        projector.after_step(step)
        assert torch.equal(projector.matrix(), start)
    assert projector.gain != 1


@METHODS
def test_evaluation_accumulates_nothing(method):
    projector = random_projector((3, 6), method).eval()
    before, sums = state_of(projector), projector.statistics.sums.clone()
    projected, wanted = projector(*make_rows((3, 6), seed=7))
    assert torch.equal(projector.statistics.sums, sums)
    assert_same_state(state_of(projector), before)
    training_projected, training_wanted = projector.train()(*make_rows((3, 6), seed=7))
    assert torch.equal(projected, training_projected)  # the rows count from the next step on
    assert torch.equal(wanted, training_wanted)
    num_seen = 8 * -(-16 // sampling_stride(16))
    assert (projector.statistics.sums[0] == num_seen) == (method in ("solved", "fixed"))


# Saving and resuming


def train_steps(projector, backbone, steps):
    losses = []
    for step in steps:
        student, target = make_rows((projector.student_channels, projector.target_channels), seed=step)
        projected, wanted = projector(backbone(student), target)
        loss = (projected - wanted).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in (*backbone.parameters(), *projector.parameters()):
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        projector.after_step(step)
        losses.append(loss.item())
    return losses


def assert_resumes_as_straight(make, widths):
    """Saved after 4 steps and loaded into new modules, 5 more steps are those that go on without it."""
    projector, backbone = make()
    projector(backbone(make_rows(widths)[0]), make_rows(widths)[1])
    projector.initialize()
    train_steps(projector, backbone, range(1, 5))
    file = io.BytesIO()
    torch.save([projector.state_dict(), backbone.state_dict()], file)
    straight = train_steps(projector, backbone, range(5, 10))

    file.seek(0)
    resumed_projector, resumed_backbone = make()
    for module, state in zip((resumed_projector, resumed_backbone), torch.load(file), strict=True):
        module.load_state_dict(state)
    assert train_steps(resumed_projector, resumed_backbone, range(5, 10)) == straight
    assert_same_state(state_of(resumed_projector), state_of(projector))


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("solved", "identity"),
        ("fixed", "identity"),
        ("cayley", "identity"),
        ("matrix_exp", "identity"),
        ("cayley", "procrustes"),
        ("fixed", "procrustes"),
    ],
)
@WIDTHS
def test_resumed_run_equals_the_straight_one(method, start, widths):
    def make():
        projector = OrthogonalProjector(*widths, method=method, start=start, momentum=0.8, refresh_every_steps=3)
        return projector.train(), nn.Linear(widths[0], widths[0])

    assert_resumes_as_straight(make, widths)


@LEARNED
def test_resumed_learned_projector_accumulates_nothing(method):
    """It was initialized before it was saved; on resuming there is nothing left to collect, at every step, for."""
    projector = OrthogonalProjector(3, 6, method=method, start="procrustes").train()
    projector(*make_rows((3, 6)))
    projector.initialize()
    resumed = OrthogonalProjector(3, 6, method=method, start="procrustes").train()
    resumed.load_state_dict(projector.state_dict())
    resumed(*make_rows((3, 6), seed=1))
    assert resumed.statistics.sums.abs().max() == 0


# Errors


@pytest.mark.parametrize("widths", [(0, 4), (4, 0)])
def test_no_channels(widths):
    with pytest.raises(ValueError, match="at least 1 channel"):
        LinearProjector(*widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "householder"}, "householder"),
        ({"refresh_every_steps": 0}, "refresh_every_steps must be at least 1, not 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"start": torch.eye(6, 3)}, "3 x 6 matrix with orthonormal rows"),
        ({"start": 1.01 * torch.eye(3, 6)}, "3 x 6 matrix with orthonormal rows"),
        ({"start": torch.zeros(3, 6)}, "3 x 6 matrix with orthonormal rows"),
        ({"start": "principal"}, "principal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_orthogonal_projector_refuses(options, message):
    with pytest.raises(REFUSED, match=message):
        OrthogonalProjector(3, 6, **options)


@pytest.mark.parametrize(
    ("student", "target"),
    [((2, 9, 3), (2, 9, 4)), ((2, 9, 4), (2, 9, 3)), ((2, 9, 4), (2, 8, 4)), ((2, 9, 4), (1, 9, 4))],
)
def test_rows_that_do_not_fit(student, target):
    with pytest.raises(REFUSED, match=r"student"):
        OrthogonalProjector(4, 4)(torch.zeros(student), torch.zeros(target))


def test_identity_projector_needs_equal_widths():
    with pytest.raises(ValueError, match="equal widths, not 3 and 6"):
        IdentityProjector(3, 6)


# The baselines


@WIDTHS
@METHODS
def test_maps_as_they_lie_in_memory_equal_rows(widths, method):
    """Channels one after another, as convolutions leave them: two steps, the second one with means to centre on."""
    results = []
    for as_map in (False, True):
        projector = random_projector(widths, method)
        for step in (1, 2):
            student, target = make_rows(widths, seed=step)
            if as_map:
                student, target = student.mT.contiguous().mT, target.mT.contiguous().mT
            projected, wanted = projector(student.requires_grad_(), target)
            (projected - wanted).square().mean().backward()
            projector.after_step(step)
        results.append([projected, wanted, student.grad, *projector.state_dict().values()])
        if as_map and not isinstance(projector, LearnedProjector):
            copied = [name for name, rows in (("student", projected), ("target", wanted)) if rows.is_contiguous()]
            assert not copied
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_linear_projector_is_a_1x1_convolution():
    """FitNets' regressor."""
    projector = LinearProjector(3, 6)
    feature = torch.randn(2, 3, 4, 4)
    target = torch.randn(2, 16, 6, requires_grad=True)
    weight, bias = projector.linear.weight, projector.linear.bias
    expected = nn.functional.conv2d(feature, weight[:, :, None, None], bias)
    projected, wanted = projector(feature.flatten(2).transpose(1, 2), target)
    torch.testing.assert_close(projected, expected.flatten(2).transpose(1, 2))
    assert torch.equal(wanted, target)
    assert not wanted.requires_grad


def test_identity_projector_changes_nothing():
    student, target = make_rows((4, 4))
    projected, wanted = IdentityProjector(4, 4)(student, target.requires_grad_())
    assert not wanted.requires_grad
    assert torch.equal(projected, student)
    assert torch.equal(wanted, target)
    assert not list(IdentityProjector(4, 4).parameters())


# parameter_groups


def test_projectors_are_not_decayed():
    network = nn.Linear(4, 4)
    projectors = [
        OrthogonalProjector(4, 8, method="cayley"),
        OrthogonalProjector(4, 8),
        LinearProjector(4, 8),
        IdentityProjector(4, 4),
    ]
    with torch.no_grad():
        projectors[0].tangent.normal_()
    groups = parameter_groups(network, iter(projectors), 0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert list(map(id, groups[0]["params"])) == list(map(id, network.parameters()))
    expected = [*projectors[0].parameters(), *projectors[2].parameters()]
    assert len(expected) == 5
    assert list(map(id, groups[1]["params"])) == list(map(id, expected))

    before = [parameter.detach().clone() for parameter in (*network.parameters(), *expected)]
    for parameter in (*network.parameters(), *expected):
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3).step()
    for old, new in zip(before[:2], network.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.95 * old)  # 1 - lr * weight_decay
    for old, new in zip(before[2:], expected, strict=True):
        assert torch.equal(new.detach(), old)


@pytest.mark.parametrize("projectors", [[], [OrthogonalProjector(4, 8)], [IdentityProjector(4, 4)]])
def test_projectors_without_parameters_make_no_group(projectors):
    groups = parameter_groups(nn.Linear(4, 4), projectors, 0.1)
    assert len(groups) == 1
    torch.optim.AdamW(groups)
