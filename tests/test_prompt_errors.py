"""Whether a model reads its prompts, against hand-made models whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.conftest import tiny_unet
from vkd_gen.data.draws import Draws
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.prompt_errors import prompt_errors, prompt_rank, with_prompts_of
from vkd_gen.models import Model


class Flat:
    """Twenty samples, each of one value everywhere; the prompt tells it."""

    random_flip, guidance_dropout, buckets = False, 0.0, None
    values = np.linspace(-1, 1, 20)

    def __len__(self):
        return 20

    def read(self, index):
        return torch.tensor(self.values[index], dtype=torch.float32)

    def shape(self, _item):
        return (1, 4, 4)

    def draw(self, item, _generator):
        return item.expand(1, 4, 4)

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


def test_rank_of_the_prompt():
    schedule = reader(1.0).schedule
    batch = Draws(Flat(), schedule, seed=0).batch(range(10))
    assert prompt_rank(reader(1.0), batch, schedule) == 1.0
    assert prompt_rank(reader(0.0), batch, schedule) == pytest.approx(
        5.5, abs=1.5
    )  # reads nothing: chance, to rounding
    values = batch["sample"].mean((1, 2, 3)).double()
    expected = [1 + sum(abs(-other - own) < abs(-own - own) for other in values) for own in values]
    assert prompt_rank(reader(-1.0), batch, schedule) == pytest.approx(float(np.mean(expected)), abs=0.2)


def test_equal_prompts_do_not_compete():
    schedule = reader(1.0).schedule
    batch = Draws(Flat(), schedule, seed=0).batch([0, 1, 2])
    twice = {
        "sample": batch["sample"].repeat(2, 1, 1, 1),
        "conditioning": {
            "encoder_hidden_states": batch["conditioning"]["encoder_hidden_states"].repeat(2, 1, 1),
            "added_cond_kwargs": {
                name: value.repeat(2, 1) for name, value in batch["conditioning"]["added_cond_kwargs"].items()
            },
        },
    }
    assert prompt_rank(reader(1.0), twice, schedule) == 1.0


def test_sizes_and_crops_stay_the_samples_own():
    own, other = ({"encoder_hidden_states": n, "added_cond_kwargs": {"text_embeds": n, "time_ids": n}} for n in (1, 2))
    expected = {"encoder_hidden_states": 2, "added_cond_kwargs": {"text_embeds": 2, "time_ids": 1}}
    assert with_prompts_of(own, other) == expected
