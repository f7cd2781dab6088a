"""Flow matching as a schedule, crossings between schedules, densities of times: against diffusers' own formulas."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats  # comes with scikit-learn
from torch import nn

from tests.conftest import DrawsByNumber, make_batch, tiny_unet
from tests.sources import labelled_images
from vkd_gen.distillation import FrozenTeacher, LossWeights, ProjectedStudent, distillation_losses
from vkd_gen.schedule import Crossing, Schedule, TimestepDensity, flow_scheduler, is_flow

TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
FLOW = Schedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
DDPM = Schedule.of(DDPMScheduler())
TIMESTEPS = torch.tensor([0, 1, 10, 300, 600, 999])


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, 2, 2, generator=generator), torch.randn(6, 4, 2, 2, generator=generator)


# ---- the schedule


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_is_that_of_diffusers_scripts(drawn, shift):
    """train_dreambooth_lora_sd3.py and its like: look sigmas up by index, noise, and aim at noise - sample."""
    sample, noise = drawn
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.of(scheduler)
    indices = 999 - TIMESTEPS  # theirs begin with the noise
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = schedule.noisy(sample, noise, TIMESTEPS)
    torch.testing.assert_close(noisy, (1.0 - sigmas) * sample + sigmas * noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        noisy, scheduler.scale_noise(sample, scheduler.timesteps[indices], noise), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(schedule.target(sample, noise, TIMESTEPS), noise - sample, rtol=0, atol=1e-6)
    assert torch.equal(schedule.told(TIMESTEPS), scheduler.timesteps[indices])


def test_shifted_sigmas_known_values():
    # 3 s / (1 + 2 s) at s = 1/1000, 1/2, 1
    assert FLOW.sigma[[0, 499, 999]].tolist() == pytest.approx([0.003 / 1.002, 0.75, 1.0], rel=1e-6)
    assert FLOW.told(torch.tensor([499])).item() == pytest.approx(750.0, rel=1e-6)
    assert torch.equal(FLOW.told(TIMESTEPS), FLOW.to("cpu").told(TIMESTEPS))


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_samplers_with_flow_sigmas_have_the_same_schedule(drawn, kind):
    """A sampler takes the sample out of a prediction of flow as the schedule does."""
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(7)  # which changes what it has of its training
    schedule = Schedule.of(scheduler)
    assert schedule.prediction_type == "flow_prediction"
    assert torch.equal(schedule.sigma, FLOW.sigma)
    noisy, prediction = drawn
    scheduler._step_index = 3
    sigma = scheduler.sigmas[3]
    crossed = replace(schedule, alpha=1 - sigma[None], sigma=sigma[None], prediction_type="sample")
    found = crossed.convert(prediction, noisy, torch.zeros(6, dtype=torch.long), "flow_prediction")
    torch.testing.assert_close(found, scheduler.convert_model_output(prediction, sample=noisy), rtol=0, atol=1e-5)


def test_files_of_early_versions_are_of_flow_matching_too():
    """As Stable Diffusion 3's scheduler_config.json is: a class and a shift."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    assert is_flow(config)
    assert torch.equal(flow_scheduler(config, "it").sigmas, FLOW.sigma.flip(0))
    assert not is_flow(DDPMScheduler().config)


def test_dynamic_shifting_is_for_samplers_alone():
    dynamic = Schedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    assert torch.equal(dynamic.sigma, Schedule.of(FlowMatchEulerDiscreteScheduler()).sigma)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "whose time runs the other way"),
        (DDPMScheduler(prediction_type="flow_prediction"), "needs use_flow_sigmas"),
    ],
)
def test_what_is_not_understood_is_refused(scheduler, words):
    with pytest.raises(ValueError, match=words):
        Schedule.of(scheduler)


# ---- targets and conversions on both kinds of schedule


def rows(kind, alpha, sigma):
    """A prediction is `rows @ (sample, noise)`, in float64."""
    return {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-sigma, alpha), "flow_prediction": (-1, 1)}[kind]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)))
@pytest.mark.parametrize("schedule", [DDPM, FLOW], ids=["ddpm", "flow"])
def test_convert_reference(drawn, schedule, source, target):
    """Any prediction: solve the two equations for sample and noise, entry by entry."""
    noisy, prediction = (tensor[:4, 0, 0] for tensor in drawn)
    timesteps = torch.tensor([10, 300, 600, 900])
    found = replace(schedule, prediction_type=target).convert(prediction, noisy, timesteps, source)
    for i, j in np.ndindex(4, 2):
        alpha, sigma = schedule.alpha[timesteps[i]].item(), schedule.sigma[timesteps[i]].item()
        equations = np.array([(alpha, sigma), rows(source, alpha, sigma)], dtype=np.float64)
        solved = np.linalg.solve(equations, [noisy[i, j].item(), prediction[i, j].item()])
        assert found[i, j].item() == pytest.approx(np.dot(rows(target, alpha, sigma), solved), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weighs_the_error_of_the_sample(drawn, kind):
    """On a schedule of flow too the weight is min(SNR, 5) times how an error in the sample shows in the prediction."""
    noisy, error = drawn
    timesteps = torch.tensor([10, 50, 300, 500, 800, 950])
    schedule = replace(FLOW, prediction_type=kind)
    answers = [schedule.convert(noisy + scaled * error, noisy, timesteps, "sample") for scaled in (0, 1)]
    shown = (answers[1] - answers[0]).square().flatten(1).mean(1)
    snr = ((1 - FLOW.sigma) / FLOW.sigma)[timesteps] ** 2
    expected = snr.clamp(max=5) * error.square().flatten(1).mean(1)
    torch.testing.assert_close(schedule.weights(timesteps, "min_snr") * shown, expected, rtol=1e-3, atol=1e-6)


def test_pure_noise_cannot_be_converted_from_epsilon():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        FLOW.check_convertible("epsilon")
    replace(FLOW, last=998).check_convertible("epsilon")
    Schedule.of(FlowMatchEulerDiscreteScheduler()).check_convertible("sample")


# ---- crossings


def perfect(kind, sample, noise, alpha, sigma):
    """What a network that knows sample and noise predicts."""
    a, b = rows(kind, alpha, sigma)
    return a * sample + b * noise


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("student", "teacher"), [(FLOW, DDPM), (DDPM, FLOW), (FLOW, FLOW)], ids=["fd", "df", "ff"])
def test_a_crossing_keeps_sample_and_noise(drawn, student, teacher, kind):
    """A perfect teacher, asked through the crossing, is a perfect student."""
    sample, noise = drawn
    crossing = Crossing.between(student, teacher)
    timesteps = torch.tensor([crossing.first, 20, 200, 500, 800, crossing.last])
    noisy = student.noisy(sample, noise, timesteps)
    entered, _ = crossing.enter(noisy, timesteps)
    alpha, sigma = (crossing.scale * part for part in (student.alpha, student.sigma))
    if teacher.times is None:  # diffusion keeps the variance
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    else:
        torch.testing.assert_close(alpha + sigma, torch.ones(1000))
    parts = (part[timesteps].view(-1, 1, 1, 1) for part in (alpha, sigma))
    alpha, sigma = parts
    torch.testing.assert_close(entered, alpha * sample + sigma * noise)
    prediction = perfect(kind, sample, noise, alpha, sigma)
    left = crossing.leave(prediction, timesteps, kind)
    torch.testing.assert_close(left, replace(student, prediction_type=kind).target(sample, noise, timesteps))


def test_the_time_of_a_crossing_has_the_same_noise():
    """Between the two timesteps of the teacher that have less and more of it; on a schedule of flow it is the noise."""
    crossing = Crossing.between(FLOW, DDPM)
    inside = slice(crossing.first, crossing.last + 1)
    ratio, known = (FLOW.sigma / FLOW.alpha)[inside], DDPM.sigma / DDPM.alpha
    below, above = (known[part(crossing.times[inside]).long()] for part in (torch.floor, torch.ceil))
    assert ((below <= ratio * (1 + 1e-5)) & (ratio * (1 - 1e-5) <= above)).all()
    to_flow = Crossing.between(DDPM, FLOW)
    inside = slice(to_flow.first, to_flow.last + 1)
    share = DDPM.sigma / (DDPM.alpha + DDPM.sigma)
    torch.testing.assert_close(to_flow.times[inside] / 1000, share[inside])


def test_draws_without_a_partner_are_moved_to_the_nearest_that_has_one():
    """Pure noise, and less noise than a schedule of betas begins with."""
    flow = Schedule.of(FlowMatchEulerDiscreteScheduler())
    crossing = Crossing.between(flow, DDPM)
    lowest, highest = (float(DDPM.sigma[at] / (DDPM.alpha + DDPM.sigma)[at]) for at in (0, -1))
    assert crossing.first == np.ceil(lowest * 1000) - 1
    assert crossing.last == np.floor(highest * 1000) - 1
    drawn = replace(flow, first=crossing.first, last=crossing.last)
    assert drawn.timesteps(torch.tensor([0.0, 0.5, 1.0])).tolist() == [crossing.first, 500, crossing.last]
    replace(drawn, prediction_type="flow_prediction").check_convertible("epsilon")


def test_equal_schedules_need_no_crossing():
    assert Crossing.between(DDPM, replace(DDPM, prediction_type="sample")) is None
    crossing = Crossing.between(FLOW, FLOW)
    assert torch.equal(crossing.times, FLOW.times)
    assert (crossing.scale == 1).all()
    assert (crossing.first, crossing.last) == (0, 999)
    low = Schedule.of(DDPMScheduler(num_train_timesteps=2, beta_start=1e-6, beta_end=1e-6))
    with pytest.raises(ValueError, match="no noise level in common"):
        Crossing.between(low, replace(DDPM, alpha=DDPM.alpha[500:], sigma=DDPM.sigma[500:]))


def test_an_epsilon_teacher_teaches_a_student_of_flow():
    """The step asks the teacher at its own noisy sample and time, and compares in the student's prediction type."""
    student_net, teacher_net = tiny_unet(seed=1), tiny_unet()
    crossing = Crossing.between(FLOW, DDPM)
    schedule = replace(FLOW, first=crossing.first, last=crossing.last)
    batch = make_batch()
    batch["timesteps"] = torch.tensor([crossing.first, 200, 600, crossing.last])
    teacher = FrozenTeacher(teacher_net, crossing=crossing)
    student = ProjectedStudent(student_net, schedule=schedule)
    losses = distillation_losses(
        student, batch, schedule=schedule, teacher=teacher, weights=LossWeights(denoising=0, feature=0)
    )
    noisy = schedule.noisy(batch["sample"], batch["noise"], batch["timesteps"])
    scale, times = (table[batch["timesteps"]] for table in (crossing.scale, crossing.times))
    with torch.no_grad():
        epsilon = teacher_net(noisy * scale.view(-1, 1, 1, 1), times).sample
        alpha, sigma = (part[batch["timesteps"]].view(-1, 1, 1, 1) for part in (FLOW.alpha, FLOW.sigma))
        target = epsilon - (noisy - sigma * epsilon) / alpha
        answer = student_net(noisy, FLOW.told(batch["timesteps"])).sample
    assert losses["output"].item() == pytest.approx((answer - target).square().mean().item(), rel=1e-4)


def test_a_student_of_flow_is_told_its_schedules_times():
    seen = []

    class Listening(nn.Module):
        def __call__(self, *, sample, timestep, return_dict):
            seen.append(timestep)
            return (sample,)

    student = ProjectedStudent(tiny_unet(), schedule=FLOW)
    student.student = Listening()
    student._predict(torch.zeros(6, 1, 8, 8), TIMESTEPS, {})
    assert torch.equal(seen[0], FLOW.times[TIMESTEPS])
    assert not [name for name in student.state_dict() if "times" in name]


# ---- densities of times


DENSITIES = {
    "logit_normal": TimestepDensity(kind="logit_normal", logit_mean=0.5, logit_std=0.8),
    "mode": TimestepDensity(kind="mode"),
}


@pytest.mark.parametrize("kind", DENSITIES)
def test_densities_are_diffusers(kind):
    density = DENSITIES[kind]
    uniform = np.random.default_rng(0).random(4000)
    times = np.array([density.time(share) for share in uniform])
    assert np.array_equal(times[:50], [density.time(share) for share in uniform[:50]])
    theirs = compute_density_for_timestep_sampling(
        kind,
        batch_size=4000,
        logit_mean=density.logit_mean,
        logit_std=density.logit_std,
        mode_scale=density.mode_scale,
        generator=torch.Generator().manual_seed(0),
    ).numpy()
    # They look timesteps up in a table that begins with the noise: what we call the time counts from the other end.
    assert stats.ks_2samp(times, 1 - theirs).pvalue > 0.01
    assert stats.ks_2samp(times, uniform).pvalue < 1e-6
    if kind == "logit_normal":  # a mean above 0 is less noise
        assert np.median(times) == pytest.approx(1 - 1 / (1 + np.exp(-0.5)), abs=0.02)


def test_a_density_changes_times_alone_and_by_number():
    images = labelled_images(7, 3)
    plain, drawn, again = (
        DrawsByNumber(images, seed=3, density=density) for density in (None, *[DENSITIES["mode"]] * 2)
    )
    for number in (5, 0, 17):
        assert torch.equal(plain[number]["noise"], drawn[number]["noise"])
        assert plain[number]["class_labels"] == drawn[number]["class_labels"]
        assert plain[number]["time"] != drawn[number]["time"]
        assert drawn[number]["time"] == again[number]["time"]
    with pytest.raises(ValueError, match="not both"):
        DrawsByNumber(images, seed=3, density=DENSITIES["mode"], stratified=True)
