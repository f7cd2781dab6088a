import math

import numpy as np
import pytest
import scipy.integrate
import torch
from jaxtyping import TypeCheckError

from vkd_gen.losses import linear_cka
from vkd_gen.normalization import (
    FeatureNormalizer,
    FeatureStatistics,
    descending_eigh,
    shrink,
    timestep_bins,
    whiten_batch,
    whitening_matrix,
    width_floor,
)

CHANNELS = 6
KINDS = ["none", "layer_norm", "center", "standardize", "whiten", "batch_whiten"]
# With --jaxtyping-packages the type checker is faster than the library's own check.
REFUSED = (ValueError, TypeCheckError)


def double(tensor):
    return tensor.detach().double().numpy()


def random_covariance(channels=CHANNELS, seed=0):
    """Well conditioned, eigenvalues 1, 1/2, ... 1/C times 3, in random directions."""
    directions = np.linalg.qr(np.random.default_rng(seed).standard_normal((channels, channels)))[0]
    return torch.from_numpy(directions * (3 / np.arange(1, channels + 1)) @ directions.T)


def teacher_rows(batch_size=40, positions=25, seed=0):
    """Correlated rows whose mean jumps from timestep bin to bin, as a UNet's features do, and their timesteps."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, 1000, (batch_size,), generator=generator)
    factor = torch.linalg.cholesky(random_covariance()).float()
    noise = torch.randn(batch_size, positions, CHANNELS, generator=generator) @ factor.T
    means = 3 * torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(77))
    return noise + means[timesteps // 250][:, None], timesteps


def numpy_statistics(rows, timesteps, num_bins=4, num_train_timesteps=1000):
    """In float64, by loops over the bins; no code shared with `calibrate`."""
    rows, width = double(rows), num_train_timesteps / num_bins
    bins = [int(timestep // width) for timestep in timesteps.tolist()]
    channels = rows.shape[-1]
    mean, count, scatter = np.zeros((num_bins, channels)), np.zeros(num_bins), np.zeros((channels, channels))
    for index in range(num_bins):
        members = np.concatenate([sample for sample, its_bin in zip(rows, bins, strict=True) if its_bin == index])
        mean[index], count[index] = members.mean(0), len(members)
        scatter += (members - mean[index]).T @ (members - mean[index])
    flat = rows.reshape(-1, channels)
    normed = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    return FeatureStatistics(
        mean=torch.from_numpy(mean),
        share=torch.from_numpy(count / count.sum()),
        covariance=torch.from_numpy(scatter / count.sum()),
        layer_norm_covariance=torch.from_numpy(np.cov(normed.T, bias=True)),
    )


@pytest.fixture
def rows_and_statistics():
    rows, timesteps = teacher_rows()
    return rows, timesteps, numpy_statistics(rows, timesteps)


def statistics_of(covariance):
    """One bin, mean zero."""
    channels = len(covariance)
    return FeatureStatistics(
        mean=torch.zeros(1, channels, dtype=torch.float64),
        share=torch.ones(1, dtype=torch.float64),
        covariance=covariance.double(),
        layer_norm_covariance=torch.eye(channels, dtype=torch.float64),
    )


# timestep_bins and FeatureStatistics


def test_timestep_bins_known_values():
    timesteps = torch.tensor([0, 99, 100, 499, 500, 999])
    assert timestep_bins(timesteps, 10, 1000).tolist() == [0, 0, 1, 4, 5, 9]
    assert timestep_bins(timesteps, 1, 1000).tolist() == [0] * 6
    assert timestep_bins(torch.tensor([-1, 1000]), 10, 1000).tolist() == [0, 9]  # outside: the nearest


@pytest.mark.parametrize(("num_bins", "num_train_timesteps"), [(7, 1000), (3, 100), (10, 1000), (8, 8)])
def test_timestep_bins_equal_floor_and_are_even(num_bins, num_train_timesteps):
    bins = timestep_bins(torch.arange(num_train_timesteps), num_bins, num_train_timesteps).numpy()
    expected = [math.floor(num_bins * t / num_train_timesteps) for t in range(num_train_timesteps)]
    np.testing.assert_array_equal(bins, expected)
    sizes = np.bincount(bins, minlength=num_bins)
    assert sizes.max() - sizes.min() <= 1


def test_total_covariance_known_value():
    """Two bins at -1 and 3 with shares 3/4 and 1/4: mean 0, variance between them 3/4 + 9/4 = 3."""
    statistics = FeatureStatistics(
        mean=torch.tensor([[-1.0], [3.0]]).double(),
        share=torch.tensor([0.75, 0.25]).double(),
        covariance=torch.tensor([[2.0]]).double(),
        layer_norm_covariance=torch.tensor([[1.0]]).double(),
    )
    assert statistics.total_covariance.item() == 5


# shrink


def test_shrink_known_value():
    covariance = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    assert shrink(covariance, 0.5).tolist() == [[2.5, 0.5], [0.5, 1.5]]
    assert torch.equal(shrink(covariance, 0.0), covariance)
    assert shrink(covariance, 1.0).tolist() == [[2, 0], [0, 2]]


def test_descending_eigh():
    values, vectors = descending_eigh(torch.diag(torch.tensor([1.0, -1e-9, 9.0])))
    assert values.tolist() == [9, 1, 0]  # nothing below zero
    torch.testing.assert_close(vectors.abs(), torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]))


# whitening_matrix


@pytest.mark.parametrize(
    ("rank", "exponent", "expected"),
    [
        (2, 1.0, [[0.5, 0.0], [0.0, 1.0]]),  # divided by the standard deviations 2 and 1
        (1, 1.0, [[0.5], [0.0]]),
        (2, 0.0, [[0.4**0.5, 0.0], [0.0, 0.4**0.5]]),  # all alike, by the mean variance 5/2
        # variances 4^(1/2) = 2 and 1, so a mean of 3/2: 4^(-1/4) / (3/2)^(1/2) and 1 / (3/2)^(1/2)
        (2, 0.5, [[3**-0.5, 0.0], [0.0, (2 / 3) ** 0.5]]),
    ],
)
def test_whitening_matrix_known_values(rank, exponent, expected):
    matrix = whitening_matrix(torch.diag(torch.tensor([4.0, 1.0])).double(), rank, exponent, shrinkage=0.0)
    torch.testing.assert_close(matrix.abs(), torch.tensor(expected).double())


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [1, 3, CHANNELS])
@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 1.0])
def test_whitening_matrix_equals_numpy(exponent, rank, shrinkage):
    covariance = random_covariance()
    matrix = whitening_matrix(covariance, rank, exponent, shrinkage).numpy()
    shrunk = (1 - shrinkage) * covariance.numpy() + shrinkage * np.trace(covariance) / CHANNELS * np.eye(CHANNELS)
    variances = np.sort(np.linalg.eigvalsh(shrunk))[::-1][:rank] ** (1 - exponent)
    variances /= variances.mean()
    assert matrix.shape == (CHANNELS, rank)
    # what the rows' covariance becomes: uncorrelated, the leading variances partly evened out, one on average
    np.testing.assert_allclose(matrix.T @ shrunk @ matrix, np.diag(variances), atol=1e-10)
    # and what is kept are the leading directions
    directions = matrix / np.linalg.norm(matrix, axis=0)
    kept = np.trace(directions.T @ shrunk @ directions)
    assert kept == pytest.approx(np.sort(np.linalg.eigvalsh(shrunk))[::-1][:rank].sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must lie between 1 and the teacher layer's 6 channels, not 0"),
        ({"rank": 7}, "rank must lie between 1 and the teacher layer's 6 channels, not 7"),
        ({"exponent": -0.1}, "exponent must lie between 0 and 1, not -0.1"),
        ({"exponent": 1.1}, "exponent must lie between 0 and 1, not 1.1"),
        ({"exponent": math.nan}, "exponent must lie between 0 and 1, not nan"),
        ({"shrinkage": -0.1}, "shrinkage must lie between 0 and 1, not -0.1"),
        ({"shrinkage": 1.5}, "shrinkage must lie between 0 and 1, not 1.5"),
    ],
)
def test_whitening_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureNormalizer("whiten", channels=CHANNELS, **{"rank": 3, **options})


@pytest.mark.parametrize("seed", range(10))
def test_empty_directions_are_not_whitened(seed):
    """20 rows vary in 19 directions; what eigh finds in the others is rounding."""
    rows = np.random.default_rng(seed).standard_normal((20, 40))
    covariance = torch.from_numpy(np.cov(rows.T))
    with pytest.raises(ValueError, match="do not vary in 20 directions"):
        whitening_matrix(covariance, 20, 1.0, shrinkage=0.0)
    for allowed in ({"rank": 19, "exponent": 1.0}, {"rank": 20, "exponent": 0.0}):
        assert whitening_matrix(covariance, shrinkage=0.0, **allowed).isfinite().all()
    assert whitening_matrix(covariance, 40, 1.0, shrinkage=1e-3).isfinite().all()


# whiten_batch


@pytest.mark.parametrize("shrinkage", [0.0, 1e-3, 0.2])
def test_whiten_batch_equals_numpy(shrinkage):
    rows = teacher_rows()[0].flatten(0, 1)
    reference = double(rows)
    centred = reference - reference.mean(0)
    covariance = np.cov(reference.T, bias=True)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / CHANNELS * np.eye(CHANNELS)
    expected = centred @ np.linalg.inv(np.linalg.cholesky(shrunk)).T
    whitened = whiten_batch(rows, shrinkage)
    assert whitened.dtype == torch.float32
    np.testing.assert_allclose(double(whitened), expected, atol=1e-5)


@pytest.mark.parametrize("num_rows", [2, 5, 6])
@pytest.mark.parametrize("seed", range(8))
def test_whiten_batch_refuses_too_few_rows(num_rows, seed):
    """Centred, n rows span at most n - 1 directions: 6 rows cannot determine 6 channels either."""
    rows = torch.randn(num_rows, CHANNELS, generator=torch.Generator().manual_seed(seed)) + 3
    with pytest.raises(ValueError, match=f"{num_rows} rows do not determine a 6-channel covariance"):
        whiten_batch(rows, shrinkage=0.0)
    assert whiten_batch(rows, shrinkage=1e-3).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_whiten_batch_refuses_dead_channels(value):
    rows = torch.randn(97, CHANNELS)
    rows[:, 2] = value
    with pytest.raises(ValueError, match="do not determine"):
        whiten_batch(rows, shrinkage=0.0)
    assert whiten_batch(rows, shrinkage=1e-3).isfinite().all()


# FeatureNormalizer


def reference_rows(kind, rows, timesteps, statistics, shrinkage):
    """The kinds whose result is unique, written out in numpy."""
    rows = double(rows)
    centred = rows - statistics.mean.numpy()[timesteps.numpy() // 250][:, None]
    variances = statistics.covariance.numpy().diagonal()
    match kind:
        case "none":
            return rows
        case "layer_norm":
            return (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
        case "center":
            return centred / np.sqrt(variances.mean())
        case "standardize":
            return centred / np.sqrt((1 - shrinkage) * variances + shrinkage * variances.mean())


@pytest.mark.parametrize("kind", ["none", "layer_norm", "center", "standardize"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_normalized_rows_equal_numpy(kind, shrinkage, rows_and_statistics):
    rows, timesteps, statistics = rows_and_statistics
    normalizer = FeatureNormalizer(kind, statistics, shrinkage=shrinkage)
    expected = reference_rows(kind, rows, timesteps, statistics, shrinkage)
    np.testing.assert_allclose(double(normalizer(rows, timesteps)), expected, atol=2e-5)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [None, 3])
def test_whitened_rows_equal_numpy(exponent, rank, rows_and_statistics):
    """Up to the signs of the directions, which eigenvectors leave open: compared by their inner products."""
    rows, timesteps, statistics = rows_and_statistics
    normalizer = FeatureNormalizer("whiten", statistics, rank=rank, exponent=exponent, shrinkage=0.0)
    whitened = double(normalizer(rows, timesteps)).reshape(-1, rank or CHANNELS)[:50]
    values, vectors = np.linalg.eigh(statistics.covariance.numpy())
    values, vectors = values[::-1][: rank or CHANNELS], vectors[:, ::-1][:, : rank or CHANNELS]
    scale = values ** (-exponent / 2) / np.sqrt(np.mean(values ** (1 - exponent)))
    centred = double(rows) - statistics.mean.numpy()[timesteps.numpy() // 250][:, None]
    expected = (centred.reshape(-1, CHANNELS) @ vectors * scale)[:50]
    np.testing.assert_allclose(whitened @ whitened.T, expected @ expected.T, atol=1e-4)


def test_batch_whiten_is_over_all_rows_of_the_batch(rows_and_statistics):
    rows, timesteps, _ = rows_and_statistics
    normalizer = FeatureNormalizer("batch_whiten", channels=CHANNELS)
    expected = whiten_batch(rows.reshape(-1, CHANNELS)).reshape(rows.shape)
    assert torch.equal(normalizer(rows, timesteps), expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("center", [[0.0, 4 / 10**0.5]]),  # by the root of the mean variance, (4 + 16) / 2
        ("standardize", [[0.0, 1.0]]),  # by 4, the second channel's own deviation
    ],
)
def test_bins_known_values(kind, expected):
    """Timestep 70 of 100 lies in the second of two bins, whose mean is (5, 6)."""
    statistics = FeatureStatistics(
        mean=torch.tensor([[1.0, 2.0], [5.0, 6.0]]).double(),
        share=torch.tensor([0.5, 0.5]).double(),
        covariance=torch.diag(torch.tensor([4.0, 16.0])).double(),
        layer_norm_covariance=torch.eye(2).double(),
        num_train_timesteps=100,
    )
    normalizer = FeatureNormalizer(kind, statistics, shrinkage=0.0)
    torch.testing.assert_close(normalizer(torch.tensor([[[5.0, 10.0]]]), torch.tensor([70]))[0], torch.tensor(expected))


@pytest.mark.parametrize(
    ("kind", "shrinkage", "tolerance"),
    [
        ("none", 0.05, 1e-4),
        ("layer_norm", 0.05, 1e-4),
        ("center", 0.0, 1e-4),
        ("center", 0.05, 1e-4),
        ("standardize", 0.0, 1e-4),
        ("standardize", 0.05, 1e-4),
        ("whiten", 0.0, 1e-4),
        ("whiten", 0.05, 1e-4),
        ("batch_whiten", 0.0, 1e-4),
        ("batch_whiten", 1e-3, 0.02),  # taken to be the identity, as it is up to shrinkage
    ],
)
def test_target_covariance_equals_that_of_the_normalized_rows(kind, shrinkage, tolerance, rows_and_statistics):
    rows, timesteps, statistics = rows_and_statistics
    normalizer = FeatureNormalizer(kind, statistics, shrinkage=shrinkage)
    normalized = double(normalizer(rows, timesteps)).reshape(-1, CHANNELS)
    expected = np.cov(normalized.T, bias=True)
    np.testing.assert_allclose(normalizer.target_covariance().numpy(), expected, rtol=0, atol=tolerance)
    assert normalizer.target_covariance().dtype == torch.float64


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [2, 5])
def test_target_covariance_of_truncated_whitening(rank, exponent, rows_and_statistics):
    rows, timesteps, statistics = rows_and_statistics
    normalizer = FeatureNormalizer("whiten", statistics, rank=rank, exponent=exponent, shrinkage=0.02)
    assert normalizer.target_channels == rank
    normalized = normalizer(rows, timesteps)
    assert normalized.shape == (*rows.shape[:2], rank)
    empirical = np.cov(double(normalized).reshape(-1, rank).T, bias=True)
    np.testing.assert_allclose(normalizer.target_covariance().numpy(), empirical, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_carry_no_gradient_and_nothing_is_learned(kind, rows_and_statistics):
    rows, timesteps, statistics = rows_and_statistics
    normalizer = FeatureNormalizer(kind, statistics).train()
    before = {name: value.clone() for name, value in normalizer.state_dict().items()}
    assert not normalizer(rows.clone().requires_grad_(), timesteps).requires_grad
    assert not list(normalizer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in normalizer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_under_autocast(kind, rows_and_statistics):
    rows, timesteps, statistics = rows_and_statistics
    normalizer = FeatureNormalizer(kind, statistics)
    rows = rows.bfloat16()
    expected = normalizer(rows.float(), timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        actual = normalizer(rows, timesteps)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_discarded_share_known_value():
    statistics = statistics_of(torch.diag(torch.tensor([1.0, 8.0, 1.0])))
    shares = [FeatureNormalizer("whiten", statistics, rank=rank).discarded.item() for rank in (1, 2, 3)]
    assert shares == pytest.approx([0.2, 0.1, 0.0])
    for kind in ("none", "layer_norm", "center", "standardize", "batch_whiten"):
        assert FeatureNormalizer(kind, statistics).discarded == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "none"}, "channels"),
        ({"kind": "batch_norm", "channels": 6}, "batch_norm"),
        ({"kind": "whiten", "channels": 6, "rank": 7}, "rank must lie between"),
        ({"kind": "whiten", "channels": 6, "exponent": 2.0}, "exponent must lie"),
        ({"kind": "batch_whiten", "channels": 6, "shrinkage": -1.0}, "shrinkage must lie between 0 and 1, not -1.0"),
        ({"kind": "center", "statistics": statistics_of(torch.zeros(6, 6))}, "do not vary at all"),
        ({"kind": "standardize", "statistics": statistics_of(torch.zeros(6, 6))}, "do not vary at all"),
        ({"kind": "whiten", "statistics": statistics_of(torch.zeros(6, 6))}, "do not vary in 6 directions"),
        (
            {
                "kind": "standardize",
                "statistics": statistics_of(torch.diag(torch.tensor([1.0, 0.0]))),
                "shrinkage": 0.0,
            },
            "do not vary",
        ),
    ],
    ids=lambda value: f"{value['kind']}" if isinstance(value, dict) else None,
)
def test_normalizer_refuses(arguments, message):
    with pytest.raises(REFUSED, match=message):
        FeatureNormalizer(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_normalizer_says_what_it_lacks(kind):
    normalizer = FeatureNormalizer(kind, channels=4)
    assert not normalizer.is_filled
    with pytest.raises(ValueError, match=r"calibrate\(\)"):
        normalizer.target_covariance()
    if kind in ("center", "standardize", "whiten"):
        with pytest.raises(ValueError, match=rf"'{kind}' has no statistics .*calibrate\(\)"):
            normalizer(torch.randn(2, 3, 4), torch.tensor([1, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_loaded_equals_the_one_that_was_filled(kind, rows_and_statistics):
    rows, timesteps, statistics = rows_and_statistics
    rank = CHANNELS - 2 if kind == "whiten" else None
    filled = FeatureNormalizer(kind, statistics, rank=rank)
    empty = FeatureNormalizer(kind, channels=CHANNELS, rank=rank, num_timestep_bins=4)
    empty.load_state_dict(empty.state_dict())
    assert not empty.is_filled
    empty.load_state_dict(filled.state_dict())
    assert empty.is_filled
    assert torch.equal(empty(rows, timesteps), filled(rows, timesteps))
    assert torch.equal(empty.target_covariance(), filled.target_covariance())
    assert empty.discarded == filled.discarded


@pytest.mark.parametrize("sizes", [{"channels": 5}, {"channels": CHANNELS, "num_timestep_bins": 3}])
def test_statistics_of_other_sizes_are_refused(sizes, rows_and_statistics):
    with pytest.raises(ValueError, match="cannot take statistics of"):
        FeatureNormalizer("center", **{"num_timestep_bins": 4, **sizes}).fill(rows_and_statistics[2])


# width_floor


def test_width_floor_known_value_of_a_falling_spectrum():
    """Variances 1/i, half the width: 1 - H(128) / H(256) = 1 - 5.433 / 6.124 of the mean variance remains."""
    variances = 1 / torch.arange(1, 257).double()
    floor = width_floor(torch.diag(variances), 128, "mse") / variances.mean().item()
    assert floor == pytest.approx(0.113, abs=5e-4)


@pytest.mark.parametrize("student_channels", [1, 3, 5, 6, 9])
def test_mse_floor_equals_the_best_low_rank_residual(student_channels):
    """Eckart and Young, 1936: no rank-k matrix is nearer than the truncated SVD."""
    rows = np.random.default_rng(0).standard_normal((300, CHANNELS)) @ random_covariance().numpy()
    rows -= rows.mean(0)
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    best = left[:, :student_channels] * values[:student_channels] @ right[:student_channels]
    expected = np.square(rows - best).mean()
    covariance = torch.from_numpy(rows.T @ rows / len(rows))
    assert width_floor(covariance, student_channels, "mse") == pytest.approx(expected, abs=1e-12)


def test_smooth_l1_floor_known_value():
    """What remains is one standard normal channel of two: half of E smooth_l1(z), by quadrature."""

    def integrand(z):
        loss = z * z / 2 if abs(z) < 1 else abs(z) - 0.5
        return loss * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    expected = 2 * scipy.integrate.quad(integrand, 0, 1)[0] + 2 * scipy.integrate.quad(integrand, 1, 40)[0]
    assert expected == pytest.approx(0.42466, abs=1e-5)
    floor = width_floor(torch.diag(torch.tensor([5.0, 1.0])).double(), 1, "smooth_l1")
    assert floor == pytest.approx(expected / 2, rel=1e-6)


def test_cka_floor_known_values():
    """1 - sqrt of the leading squared eigenvalues' share: equal directions, and eigenvalues 4 and 3, 16 of 25."""
    assert width_floor(torch.eye(8).double(), 2, "cka") == pytest.approx(0.5)
    assert width_floor(torch.eye(8).double(), 8, "cka") == 0
    assert width_floor(torch.diag(torch.tensor([3.0, 4.0])).double(), 1, "cka") == pytest.approx(0.2)


@pytest.mark.parametrize("student_channels", [1, 4])
def test_cka_floor_is_the_best_that_a_search_finds(student_channels):
    """Of all rows of a width those that agree in the leading directions; from other starts descent ends there too."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(1, 40, CHANNELS, generator=generator) @ torch.linalg.cholesky(random_covariance()).float().T
    centred = (target - target.mean(1))[0].double()
    covariance = centred.T @ centred / 40
    floor = width_floor(covariance, student_channels, "cka")
    assert floor > 0.001
    leading = np.linalg.eigh(covariance.numpy())[1][:, ::-1][:, :student_channels]
    best = target @ torch.from_numpy(leading.copy()).float()
    assert (1 - linear_cka(best, target)).item() == pytest.approx(floor, abs=1e-5)
    for seed in range(2):
        generator.manual_seed(seed)
        rows = torch.randn(1, 40, student_channels, generator=generator, requires_grad=True)
        optimizer = torch.optim.Adam([rows], lr=0.1)
        losses = []
        for _ in range(200):
            loss = 1 - linear_cka(rows, target).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > floor + 0.1
        assert min(losses) > floor - 1e-5
        assert losses[-1] == pytest.approx(floor, abs=2e-3)


def test_width_floor_refuses_an_unknown_loss():
    with pytest.raises(REFUSED, match="huber"):
        width_floor(torch.eye(4).double(), 2, "huber")
