"""Models of prompts evaluated: on encoded held-out images, with samples of the prompts from equal seeds."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.test_encoded import samples as encoded
from tests.text_pipelines import tiny_pipeline
from vkd_gen.evaluation.compare import evaluate
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.prompt_errors import prompt_errors
from vkd_gen.models import Model


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_models_of_prompts_are_compared(kind, monkeypatch):
    for measure in (held_out_errors, prompt_errors):
        monkeypatch.setitem(measure.__wrapped__.__kwdefaults__, "num_draws", 8)
    monkeypatch.setitem(prompt_errors.__wrapped__.__kwdefaults__, "num_ranked", 3)
    pipeline = tiny_pipeline(kind)
    teacher = Model(pipeline)
    teacher.prompts, teacher.guidance_scale = ["red cat", "blue heart", "heart"], 3.0
    torch.manual_seed(1)
    student = teacher.around(UNet2DConditionModel.from_config(pipeline.unet.config, layers_per_block=1))
    held_out = encoded(kind, None, random_flip=False, dropout=0.0, pipeline=pipeline)
    options = {"num_inference_steps": 2, "num_shown": 4, "batch_size": 4}
    results, shown = evaluate({"teacher": teacher, "student": student}, held_out, **options)
    rows = results["rows"]
    assert results["prompts"] == ["red cat", "blue heart", "heart", "red cat"]
    assert rows["teacher"]["teacher_distance"] == 0
    assert rows["teacher"]["guidance_gap_ratio"] == pytest.approx(1)
    assert 0 < rows["student"]["guidance_gap_ratio"] != pytest.approx(1)
    assert rows["student"]["ms_per_image"] > 0
    for row in rows.values():
        assert 1 <= row["prompt_rank"] <= 3
        assert row["wrong_prompt_error"] == pytest.approx(row["denoising_error"], rel=0.2)  # they have learnt nothing
        assert row["wrong_prompt_error"] != row["denoising_error"]
    sampling = {"conditioning": {"prompt": results["prompts"]}, "guidance_scale": 3.0, "num_inference_steps": 2}
    assert (shown["student"].int() - student.images(range(4), **sampling).int()).abs().max() <= 1
    assert not torch.equal(shown["student"], shown["teacher"])
