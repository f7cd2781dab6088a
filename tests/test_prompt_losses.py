"""Loss with right, wrong and no prompts, and the place of the right one."""

import pytest
import torch

from vkd_gen.evaluation.prompt_losses import prompt_losses
from vkd_gen.schedule import Schedule

SCHEDULE = Schedule(torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.19, 0.64, 0.91]).sqrt(), "epsilon")


def knows(samples, offset):
    """Predicts the noise of the sample whose number the prompt names, `offset` too high."""

    def predict(noisy, timesteps, prompts):
        alpha, sigma = (value[timesteps][:, None, None, None] for value in (SCHEDULE.alpha, SCHEDULE.sigma))
        return (noisy - alpha * samples[prompts[:, 0, 0].long()]) / sigma + offset

    return predict


def test_a_denoiser_that_knows_its_samples_by_their_prompts():
    """Noise that is 0.5 too high: 0.25 with the right prompt. A wrong one adds the difference of the samples."""
    levels = torch.tensor([0.0, 4.0, 8.0, 16.0])
    samples = levels[:, None, None, None].expand(4, 1, 2, 2)
    prompts, null = torch.arange(4.0)[:, None, None], torch.tensor([[[3.0]]])
    found = prompt_losses(knows(samples, 0.5), SCHEDULE, samples, prompts, null, torch.arange(4), num_draws=3)
    assert found.right == pytest.approx(0.25, abs=1e-5)
    assert (found.rank, found.first, found.num_prompts) == (1, 1, 4)
    ratio = SCHEDULE.alpha / SCHEDULE.sigma
    differences = levels[:, None] - levels[None]  # [sample, prompt]
    expected = (differences[..., None] * ratio + 0.5).square().mean(-1)
    assert found.wrong == pytest.approx(expected[~torch.eye(4, dtype=torch.bool)].mean().item(), rel=1e-4)
    assert found.none == pytest.approx(expected[:, 3].mean().item(), rel=1e-4)


def test_places_of_prompts_that_are_confused():
    """Sample 0 is drawn for prompt 1 and the other way round; sample 2 is right."""
    samples = torch.tensor([0.0, 4.0, 9.0])[:, None, None, None]
    confused = knows(samples[[1, 0, 2]], 0.0)
    found = prompt_losses(
        confused, SCHEDULE, samples, torch.arange(3.0)[:, None, None], torch.zeros(1, 1, 1), torch.arange(3)
    )
    assert found.rank == pytest.approx((2 + 2 + 1) / 3)
    assert found.first == pytest.approx(1 / 3)


def test_a_denoiser_that_does_not_listen():
    """All prompts are equally good: nothing is told apart, and no place is lost by it."""
    samples, prompts = torch.randn(3, 1, 2, 2), torch.randn(5, 2, 4)
    found = prompt_losses(
        lambda noisy, timesteps, prompts: noisy * 0.5, SCHEDULE, samples, prompts, prompts[:1], torch.tensor([4, 0, 2])
    )
    assert found.right == pytest.approx(found.wrong, rel=1e-5)
    assert found.right == pytest.approx(found.none, rel=1e-5)


def test_one_prompt_tells_nothing_apart():
    with pytest.raises(ValueError, match="at least 2"):
        prompt_losses(lambda *_: None, SCHEDULE, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1), None, torch.tensor([0]))
