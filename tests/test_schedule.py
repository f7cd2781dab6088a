"""Schedules: noising, targets, conversions and weights, against the formulas written out in numpy float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from jaxtyping import TypeCheckError

from tests.conftest import make_batch, tiny_unet
from vkd_gen.distillation import LossWeights, ProjectedStudent, distillation_losses
from vkd_gen.losses import prediction_loss
from vkd_gen.schedule import Schedule

TYPES = ("epsilon", "v_prediction", "sample")
PAIRS = list(itertools.product(TYPES, TYPES))
REFUSED = (ValueError, TypeCheckError)  # the second one where the tests run with shapes and types checked

TIMESTEPS = torch.tensor([0, 1, 10, 300, 600, 999])


def reference_alpha_sigma(timesteps=TIMESTEPS):
    """DDPM's schedule (Ho et al., 2020, section 4): beta from 1e-4 to 0.02, linear, 1,000 steps."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps.numpy()]
    return np.sqrt(alpha_bar)[:, None], np.sqrt(1 - alpha_bar)[:, None]


def reference_row(kind, alpha, sigma):
    """A prediction is `row @ (sample, noise)`."""
    return {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-sigma, alpha)}[kind]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)


@pytest.fixture
def three_steps():
    """A schedule with alpha_bar 0.9, 0.5, 0.2, so signal-to-noise ratios 9, 1, 1/4."""
    return Schedule.of(DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 1 - 0.5 / 0.9, 1 - 0.2 / 0.5]))


def predicting(kind, schedule):
    """The same noise, another prediction."""
    return replace(schedule, prediction_type=kind)


# ---- noising


def test_noisy_known_value(three_steps):
    # sqrt(0.5) * 2 + sqrt(0.5) * 1, by hand
    noisy = three_steps.noisy(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([1]))
    assert noisy.item() == pytest.approx(2.1213203)


def test_noisy_reference(schedule, drawn):
    sample, noise = drawn
    alpha, sigma = reference_alpha_sigma()
    expected = alpha * sample.double().numpy() + sigma * noise.double().numpy()
    np.testing.assert_allclose(schedule.noisy(sample, noise, TIMESTEPS), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_noisy_is_computed_in_float32(schedule, drawn, dtype):
    sample, noise = (tensor.to(dtype) for tensor in drawn)
    noisy = schedule.noisy(sample, noise, TIMESTEPS)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, schedule.noisy(sample.float(), noise.float(), TIMESTEPS))


# ---- targets


def test_prediction_target_known_value(three_steps):
    # v = sqrt(0.9) * 1 - sqrt(0.1) * 2 (Salimans and Ho, 2022), by hand
    sample, noise, timesteps = torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([0])
    targets = {kind: predicting(kind, three_steps).target(sample, noise, timesteps).item() for kind in TYPES}
    assert targets == pytest.approx({"epsilon": 1.0, "sample": 2.0, "v_prediction": 0.3162278}, rel=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_prediction_target_reference(schedule, drawn, kind):
    sample, noise = drawn
    alpha, sigma = reference_alpha_sigma()
    weights = reference_row(kind, alpha, sigma)
    expected = weights[0] * sample.double().numpy() + weights[1] * noise.double().numpy()
    target = predicting(kind, schedule).target(sample, noise, TIMESTEPS)
    np.testing.assert_allclose(target, expected, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_prediction_target_is_float32_for_bfloat16_input(schedule, drawn, kind):
    sample, noise = (tensor.bfloat16() for tensor in drawn)
    target = predicting(kind, schedule).target(sample, noise, TIMESTEPS)
    assert target.dtype == torch.float32
    assert torch.equal(target, predicting(kind, schedule).target(sample.float(), noise.float(), TIMESTEPS))


# ---- conversions


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_convert_prediction_reference(schedule, drawn, source, target):
    """Any prediction, not only perfect ones: solve the two equations in (sample, noise) entry by entry."""
    noisy, prediction = drawn
    converted = predicting(target, schedule).convert(prediction, noisy, TIMESTEPS, source)
    alphas, sigmas = (values[:, 0] for values in reference_alpha_sigma())
    expected = np.empty((6, 5))
    for i, j in np.ndindex(6, 5):
        alpha, sigma = alphas[i], sigmas[i]
        equations = np.array([[alpha, sigma], reference_row(source, alpha, sigma)])
        solution = np.linalg.solve(equations, [noisy[i, j].item(), prediction[i, j].item()])
        expected[i, j] = np.dot(reference_row(target, alpha, sigma), solution)
    np.testing.assert_allclose(converted, expected, rtol=1e-3, atol=1e-4)  # float32: sigma_0 is known to 2e-4


def test_conversion_is_float32_and_differentiable(schedule, drawn):
    noisy, prediction = drawn
    prediction = prediction.bfloat16().requires_grad_()
    converted = predicting("v_prediction", schedule).convert(prediction, noisy.bfloat16(), TIMESTEPS, "epsilon")
    assert converted.dtype == torch.float32
    converted.sum().backward()
    # v = alpha * eps - sigma * (x - sigma * eps) / alpha, so dv/deps = (alpha^2 + sigma^2) / alpha = 1 / alpha
    expected = np.repeat(1 / reference_alpha_sigma()[0], 5, axis=1)
    np.testing.assert_allclose(prediction.grad.float(), expected, rtol=1e-2)  # the gradient is bfloat16


def test_conversion_broadcasts_over_images(schedule):
    """`[B, C, H, W]`: each sample by its own timestep."""
    noisy, prediction = torch.randn(2, 6, 3, 4, 4)
    schedule = predicting("v_prediction", schedule)
    together = schedule.convert(prediction, noisy, TIMESTEPS, "epsilon")
    for i, timestep in enumerate(TIMESTEPS):
        alone = schedule.convert(prediction[i : i + 1], noisy[i : i + 1], timestep[None], "epsilon")
        torch.testing.assert_close(together[i : i + 1], alone)


SCHEDULES = {
    "linear": DDPMScheduler(),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero terminal SNR": DDPMScheduler(rescale_betas_zero_snr=True),
    "zero terminal SNR, DDIM": DDIMScheduler(rescale_betas_zero_snr=True),
    "begins without noise": DDPMScheduler(num_train_timesteps=2, trained_betas=[0.0, 0.5]),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_check_convertible_allows_what_stays_finite(name, source, target):
    """It refuses a pair if, and only if, some timestep of the schedule converts to something infinite."""
    schedule = predicting(target, Schedule.of(SCHEDULES[name]))
    timesteps = torch.arange(len(schedule))
    ones = torch.ones(len(timesteps), 1)
    if schedule.convert(2 * ones, ones, timesteps, source).isfinite().all():
        schedule.check_convertible(source)
    else:
        with pytest.raises(ValueError, match=f"cannot be expressed as {target}"):
            schedule.check_convertible(source)


def test_zero_terminal_snr_needs_the_teachers_prediction_type():
    """The case by name, so that the property above cannot hold emptily."""
    schedule = Schedule.of(SCHEDULES["zero terminal SNR"])
    for target in ("v_prediction", "sample"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            predicting(target, schedule).check_convertible("epsilon")
    schedule.check_convertible("epsilon")
    schedule.check_convertible("v_prediction")


# ---- timestep weights


def test_signal_to_noise_ratio_known_value(three_steps):
    ratio = three_steps.signal_to_noise_ratio(torch.tensor([2, 0, 1]))
    assert ratio.tolist() == pytest.approx([0.25, 9, 1], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Hang et al., 2023, arXiv 2303.09556: w = min(SNR, 5) for the sample, divided by SNR for the noise and by
        # SNR + 1 for the velocity; at SNR 9, 1 and 1/4.
        ("sample", [5, 1, 0.25]),
        ("epsilon", [5 / 9, 1, 1]),
        ("v_prediction", [5 / 10, 1 / 2, 0.25 / 1.25]),
    ],
)
def test_min_snr_known_values(three_steps, kind, expected):
    weights = predicting(kind, three_steps).weights(torch.arange(3), "min_snr")
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_reference(schedule, kind, gamma):
    alpha, sigma = (values[:, 0] for values in reference_alpha_sigma())
    snr = alpha**2 / sigma**2
    expected = np.minimum(snr, gamma) / {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[kind]
    weights = predicting(kind, schedule).weights(TIMESTEPS, "min_snr", gamma)
    np.testing.assert_allclose(weights, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weighs_the_error_of_the_sample(schedule, drawn, kind):
    """In every prediction type the weighted loss is min(SNR, gamma) times the error of the implied sample."""
    sample, noise = drawn
    timesteps = torch.tensor([10, 50, 100, 300, 500, 800])
    noisy = schedule.noisy(sample, noise, timesteps)
    implied_sample = sample + 0.1 * torch.randn(6, 5)
    prediction = predicting(kind, schedule).convert(implied_sample, noisy, timesteps, "sample")
    target = predicting(kind, schedule).target(sample, noise, timesteps)
    weights = predicting(kind, schedule).weights(timesteps, "min_snr")
    alpha, sigma = reference_alpha_sigma(timesteps)
    errors = (implied_sample - sample).double().numpy() ** 2
    expected = np.mean(np.minimum((alpha / sigma) ** 2, 5) * errors)
    assert prediction_loss(prediction, target, weights).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_is_finite_without_signal(kind):
    weights = predicting(kind, Schedule.of(SCHEDULES["zero terminal SNR"])).weights(torch.arange(1000), "min_snr")
    assert weights.isfinite().all()
    # min(SNR, gamma) / SNR tends to 1; the others' weights vanish with the signal
    assert weights[-1].item() == pytest.approx(1.0 if kind == "epsilon" else 0.0)


def test_uniform_weighting_has_no_weights(schedule):
    assert predicting("epsilon", schedule).weights(TIMESTEPS, "uniform") is None


# ---- errors


@pytest.mark.parametrize("kind", TYPES)
def test_prediction_type_is_read_from_the_scheduler(kind):
    assert Schedule.of(DDPMScheduler(prediction_type=kind)).prediction_type == kind


def test_unknown_prediction_types_and_schedulers():
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, v_prediction, sample"):
        Schedule.of(DDPMScheduler(prediction_type="flow"))
    with pytest.raises(ValueError, match="EDMEulerScheduler has no betas"):
        Schedule.of(EDMEulerScheduler())


def test_conversion_from_an_unknown_type(schedule, drawn):
    with pytest.raises(REFUSED, match="flow"):
        schedule.convert(*drawn, TIMESTEPS, "flow")


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_gamma_must_be_positive(schedule, gamma):
    with pytest.raises(ValueError, match="snr_gamma"):
        schedule.weights(TIMESTEPS, "min_snr", gamma)


def test_unknown_weighting(schedule):
    with pytest.raises(REFUSED, match="p2"):
        schedule.weights(TIMESTEPS, "p2")


def test_times_become_timesteps_of_equal_width(schedule):
    time = torch.tensor([0.0, 0.000999, 0.001, 0.5, 0.9999999, 1.0])
    assert schedule.timesteps(time).tolist() == [0, 0, 1, 500, 999, 999]


def test_a_step_takes_a_diffusers_scheduler_too():
    student, batch = ProjectedStudent(tiny_unet()), make_batch()
    scheduler, weights = DDPMScheduler(prediction_type="v_prediction"), LossWeights(output=0, feature=0)
    found = distillation_losses(student, batch, noise_scheduler=scheduler, weights=weights)
    assert torch.equal(
        found["total"], distillation_losses(student, batch, schedule=Schedule.of(scheduler), weights=weights)["total"]
    )
    for given in ({}, {"schedule": Schedule.of(scheduler), "noise_scheduler": scheduler}):
        with pytest.raises(ValueError, match="either a schedule or a diffusers noise_scheduler"):
            distillation_losses(student, batch, weights=weights, **given)


def test_it_moves_whole(schedule):
    moved = schedule.to("meta")
    assert {moved.alpha.device.type, moved.sigma.device.type} == {"meta"}
    assert (len(moved), moved.prediction_type) == (1000, "epsilon")
