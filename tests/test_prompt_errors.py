"""Whether a model reads its prompts, against hand-made models whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.conftest import tiny_unet
from vkd_gen.data.draws import Draws
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.prompt_errors import (
    MOST_PASSED_OVER,
    errors_by_prompt,
    places,
    prompt_errors,
    prompt_rank,
    with_prompts_of,
)
from vkd_gen.models import Model


class Flat:
    """Twenty samples, each of one value everywhere; the prompt tells it."""

    random_flip, guidance_dropout = False, 0.0

    def __init__(self, values=np.linspace(-1, 1, 20), buckets=None):
        self.values, self.buckets = values, buckets

    def __len__(self):
        return len(self.values)

    def read(self, index):
        return torch.tensor(self.values[index], dtype=torch.float32)

    def shape(self, item):
        if self.buckets is None:
            return (1, 4, 4)
        return (1, 4, 4 + int(self.buckets[np.abs(self.values - item.item()).argmin()]))

    def draw(self, item, _generator):
        return item.expand(self.shape(item))

    def tell(self, item, _generator):
        sizes = {"text_embeds": item.expand(3), "time_ids": item.expand(6)}
        return {"encoder_hidden_states": item.expand(5, 2), "added_cond_kwargs": sizes}

    def finish(self, batch):
        return batch

    def nothing(self, conditioning):
        others = {name: torch.zeros_like(value) for name, value in conditioning["added_cond_kwargs"].items()}
        return {"encoder_hidden_states": torch.zeros_like(conditioning["encoder_hidden_states"]), **others}


def reader(share, **schedule):
    """A model that takes a share of what the prompt says for the sample, and answers the noise that follows."""
    model = Model(SimpleNamespace(unet=tiny_unet((4,)), scheduler=DDPMScheduler(**schedule)))

    def predict(noisy, timesteps, conditioning):
        told = conditioning["encoder_hidden_states"][:, 0, 0].view(-1, 1, 1, 1)
        sample = share * told.expand_as(noisy)
        if model.schedule.prediction_type == "sample":
            return sample
        alpha, sigma = (part[timesteps].view(-1, 1, 1, 1) for part in (model.schedule.alpha, model.schedule.sigma))
        return (noisy - alpha * sample) / sigma

    model.predict = predict
    return model


def test_errors_with_wrong_prompts_and_gaps_reference():
    """In the samples' own numbers: the wrong prompt is the next draw's, the gap is what the prompt says."""
    models = {"student": reader(0.5, prediction_type="sample"), "teacher": reader(1.0, prediction_type="sample")}
    found = prompt_errors(models, Flat(), teacher=models["teacher"], num_draws=30, batch_size=8)
    draws = Draws(Flat(), models["student"].schedule, seed=1_000_003)
    values = np.array([float(draws[[number]]["sample"].mean()) for number in range(31)])
    for name, share in (("student", 0.5), ("teacher", 1.0)):
        expected = np.square(share * values[1:] - values[:-1]).mean()
        assert found[name]["wrong_prompt_error"] == pytest.approx(expected, rel=1e-5)
        assert found[name]["guidance_gap_ratio"] == pytest.approx(share, rel=1e-5)
    assert found["teacher"]["prompt_rank"] == 1.0
    alone = prompt_errors({"teacher": models["teacher"]}, Flat(), num_draws=30, batch_size=7)["teacher"]
    assert alone.keys() == {"wrong_prompt_error", "prompt_rank"}
    assert alone["wrong_prompt_error"] == pytest.approx(found["teacher"]["wrong_prompt_error"], rel=1e-5)
    right = held_out_errors({"teacher": models["teacher"]}, Flat(), num_draws=30)["teacher"]["denoising_error"]
    assert right < 1e-10  # on the same draws


def test_the_gap_is_measured_in_the_students_own_prediction_type():
    """A student and a teacher that take the same share have the same gap, whatever each predicts."""
    teacher, student = reader(1.0), reader(1.0, prediction_type="sample")
    found = prompt_errors({"student": student}, Flat(), teacher=teacher, num_draws=20)["student"]
    assert found["guidance_gap_ratio"] == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("batch_size", [1, 8, 40])
def test_a_wrong_prompt_is_never_an_equal_one(batch_size):
    """Of the draws that follow, those of the same prompt are passed over, whatever the batch."""
    samples = Flat(np.repeat([-1.0, 0.25, 1.0], [14, 1, 5]))
    model = reader(1.0, prediction_type="sample")
    found = prompt_errors({"student": model}, samples, num_draws=40, batch_size=batch_size)["student"]
    draws = Draws(samples, model.schedule, seed=1_000_003)
    values = [float(draws[[number]]["sample"].mean()) for number in range(80)]
    others = [next(other for other in values[number:] if other != values[number]) for number in range(40)]
    expected = np.square(np.array(others) - values[:40]).mean()
    assert found["wrong_prompt_error"] == pytest.approx(expected, rel=1e-5)
    assert found["prompt_rank"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_samples_of_several_shapes(batch_size):
    """Each is measured in its own, with the prompt of the next draw, whatever shape that has."""
    samples = Flat(buckets=np.arange(20) % 3)
    model = reader(0.5, prediction_type="sample")
    draws = Draws(samples, model.schedule, seed=1_000_003, group_size=1)
    values = np.array([float(draws[[number]]["sample"].mean()) for number in range(31)])
    found = prompt_errors({"student": model}, samples, num_draws=30, batch_size=batch_size)["student"]
    assert found["wrong_prompt_error"] == pytest.approx(np.square(values[1:] / 2 - values[:-1]).mean(), rel=1e-5)
    found = held_out_errors({"student": model}, samples, num_draws=30, batch_size=batch_size)["student"]
    assert found["denoising_error"] == pytest.approx(np.square(values[:-1] / 2).mean(), rel=1e-5)


def test_equal_prompts_alone_tell_nothing(caplog):
    """Neither a wrong prompt nor a rank; what a prompt changes is measured all the same. No draw is made thrice."""
    models = {"student": reader(0.5, prediction_type="sample"), "teacher": reader(1.0, prediction_type="sample")}
    samples, told = Flat(np.full(5, 0.5)), []
    samples.finish = lambda batch: told.append(len(batch["noise"])) or batch
    found = prompt_errors(models, samples, teacher=models["teacher"], num_draws=60, batch_size=4)
    assert sum(told) == 60 + 60 + MOST_PASSED_OVER - 3  # the first batch has the first four at hand
    assert found["student"] == {"guidance_gap_ratio": pytest.approx(0.5, rel=1e-5)}
    assert "all prompts of the held-out images are equal" in caplog.text


def test_the_teacher_is_asked_once_for_all_models():
    """Of each batch with prompts and without, and as one of the models with wrong ones and to rank."""
    teacher, asked = reader(1.0), []
    predict = teacher.predict
    teacher.predict = lambda *arguments: asked.append(len(arguments[0])) or predict(*arguments)
    students = {name: reader(0.5) for name in ("a", "b")}
    prompt_errors({**students, "teacher": teacher}, Flat(), teacher=teacher, num_draws=10, batch_size=5, num_ranked=2)
    assert asked == [5, 5, 5] * 2 + [2] * 8
    asked.clear()
    held_out_errors({**students, "teacher": teacher}, Flat(), teacher=teacher, num_draws=10, batch_size=5)
    assert asked == [5, 5]


def ranked(model, batch):
    return prompt_rank(model, list(batch["sample"]), batch["conditioning"])


def test_rank_of_the_prompt():
    batch = Draws(Flat(), reader(1.0).schedule, seed=0).batch(range(10))
    assert ranked(reader(1.0), batch) == 1.0
    assert ranked(reader(0.0), batch) == pytest.approx(5.5, abs=1.5)  # reads nothing: chance, to rounding
    values = batch["sample"].mean((1, 2, 3)).double()
    expected = [1 + sum(abs(-other - own) < abs(-own - own) for other in values) for own in values]
    assert ranked(reader(-1.0), batch) == pytest.approx(float(np.mean(expected)), abs=0.2)


def test_equal_prompts_do_not_compete():
    batch = Draws(Flat(), reader(1.0).schedule, seed=0).batch([0, 1, 2, 0, 1, 2])
    assert ranked(reader(1.0), batch) == 1.0


@pytest.mark.parametrize("batch_size", [3, 64])
def test_errors_by_prompt_reference(batch_size):
    """The model answers the noise that follows from the prompt: its error is the difference of the samples, scaled."""
    model, levels = reader(1.0), torch.tensor([0.0, 0.5, -1.0, 0.25])
    samples = [level.expand(1, side, side) for level, side in zip(levels, (4, 4, 2, 4), strict=True)]
    tried = [{"encoder_hidden_states": levels[:, None, None]}] * 4
    times = (0.1, 0.6)
    found = errors_by_prompt(model, samples, tried, times=times, seed=0, batch_size=batch_size)
    timesteps = model.schedule.timesteps(torch.tensor(times))
    scale = (model.schedule.alpha[timesteps] / model.schedule.sigma[timesteps]).square().mean()
    expected = (levels[:, None] - levels).square() * scale
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    is_own = torch.eye(4, dtype=torch.bool)
    assert places(found, found.diagonal(), is_own).tolist() == [1, 1, 1, 1]


def test_places():
    """Less is better, equal ones share their places, and the own prompt's other copies do not count."""
    errors = torch.tensor([[3.0, 1.0, 3.0, 5.0], [1.0, 1.0, 0.0, 1.0]])
    is_same = torch.tensor([[True, False, False, False], [False, True, False, True]])
    assert places(errors, torch.tensor([3.0, 1.0]), is_same).tolist() == [2.5, 2.5]


def test_sizes_and_crops_stay_the_samples_own():
    own, other = ({"encoder_hidden_states": n, "added_cond_kwargs": {"text_embeds": n, "time_ids": n}} for n in (1, 2))
    expected = {"encoder_hidden_states": 2, "added_cond_kwargs": {"text_embeds": 2, "time_ids": 1}}
    assert with_prompts_of(own, other) == expected
