"""What is not finite never becomes an image or a score; the line names seeds, timestep and who is to blame."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LDMPipeline, VQModel
from safetensors.torch import load_file, save_file

from tests.conftest import make_batch, tiny_unet
from tests.recipes.conftest import SHORT_STUDENT
from vkd_gen.evaluation.reference import load_statistics_file
from vkd_gen.models import Model
from vkd_gen.pipelines import stock_pipeline
from vkd_gen.schedule import Schedule
from vkd_gen.training.probe import check_finite

SCORES = ("--num_score_samples", 12, "--kid_subset_size", 10, "--num_inference_steps", 2)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VKD_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def broken_unet(name="conv_out.weight", value=math.nan, **config):
    unet = tiny_unet(**config)
    with torch.no_grad():
        unet.get_parameter(name).view(-1)[0] = value
    return unet


def error_of(capsys, run):
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


BROKEN = {
    "a weight": ({}, {}, "1 of its weights hold NaN or infinity, such as conv_out.weight"),
    "infinity, which clipping hides": ({"name": "conv_out.bias", "value": math.inf}, {}, "such as conv_out.bias"),
    "unclipped": ({"value": math.inf}, {"clip_sample": False}, "from evaluation 1 of 2 on"),
    "only the last timestep": ({"value": 0.0, "time_embedding_type": "fourier"}, {}, "from evaluation 2 of 2 on"),
}


@pytest.mark.parametrize(("weights", "schedule", "words"), BROKEN.values(), ids=BROKEN)
def test_generate_makes_no_images(weights, schedule, words, tmp_path, run_eval, capsys):
    stock_pipeline(broken_unet(**weights), DDPMScheduler(**schedule)).save_pretrained(tmp_path / "pipe")
    flags = (tmp_path / "pipe", "--output", tmp_path / "out", "--num_images", 4, "--num_inference_steps", 2)
    line = error_of(capsys, lambda: run_eval("generate", *flags))
    for text in (words, f"4 of 4 samples of {tmp_path / 'pipe'} are not finite", "(seeds 0, 1, 2, 3)"):
        assert text in line
    assert not (tmp_path / "out").exists()  # a mended pipeline may be asked for the same folder


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver"])
def test_every_sampler_is_watched(sampler):
    pipeline = stock_pipeline(broken_unet(), DDPMScheduler(), sampler)
    with pytest.raises(ValueError, match=r"2 of 2 samples of the model are not finite.*seeds 3, 4"):
        Model(pipeline).images([3, 4], num_inference_steps=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_decoder_of_latents_is_watched(value):
    """What is infinite there would be clipped to white."""
    decoder = VQModel(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, num_vq_embeddings=16)
    pipeline = LDMPipeline(decoder, tiny_unet(channels=(8, 8), in_channels=3), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert Model(pipeline).images([0], num_inference_steps=1).shape == (1, 3, 8, 8)
    with torch.no_grad():
        decoder.decoder.conv_out.bias[0] = value
    with pytest.raises(
        ValueError, match=r"not finite, at the end \(seeds 3\): 1 of its weights .* decoder.conv_out.bias"
    ):
        Model(pipeline).images([3], num_inference_steps=1)


ROWS = {
    "timestep 20": ({"time_embedding_type": "learned", "num_train_timesteps": 40}, "time_proj.weight", 20),
    "a class": ({"num_class_embeds": 5}, "class_embedding.weight", 2),
    "no class": ({"num_class_embeds": 5}, "class_embedding.weight", 4),
}


@pytest.mark.parametrize(("config", "name", "row"), ROWS.values(), ids=ROWS)
def test_a_row_that_few_draws_do_not_ask_for(config, name, row):
    unet, batch = tiny_unet(**config), make_batch()
    if "num_class_embeds" in config:
        batch["conditioning"] = {"class_labels": torch.zeros(len(batch["sample"]), dtype=torch.long)}
    schedule = Schedule.of(DDPMScheduler(num_train_timesteps=40))
    check_finite(unet, schedule, batch, "the teacher")
    with torch.no_grad():
        unet.get_parameter(name)[row] = math.nan
    with pytest.raises(ValueError, match=f"the teacher is not finite: 1 of its weights .* such as {name}"):
        check_finite(unet, schedule, batch, "the teacher")


STATISTICS = {
    "complex": (np.zeros(3, dtype=complex), np.eye(3), "are not finite real numbers"),
    "negative variances": (np.zeros(3), -np.eye(3), "is no covariance"),
    "half of a matrix": (np.zeros(3), np.triu(np.ones((3, 3))), "is no covariance"),
    "infinite": (np.zeros(3), np.diag([1, 1, math.inf]), "are not finite real numbers"),
}


@pytest.mark.parametrize(("mean", "covariance", "words"), STATISTICS.values(), ids=STATISTICS)
def test_statistics_that_are_none(mean, covariance, words, tmp_path):
    np.savez(tmp_path / "x.npz", mu=mean, sigma=covariance)
    with pytest.raises(ValueError, match=words):
        load_statistics_file(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("row", "guidance_scale", "seeds"), [(1, None, "1, 4"), (1, 3.0, "1, 4"), (3, 3.0, "0, 1, 2, 3, 4, 5")]
)
def test_seeds_are_those_of_the_broken_class_alone(row, guidance_scale, seeds):
    """Guidance asks for no class, the last row, too."""
    unet = tiny_unet(num_class_embeds=4)
    with torch.no_grad():
        unet.class_embedding.weight[row] = math.nan
    model = Model.of_unet(unet, DDPMScheduler())
    with pytest.raises(
        ValueError, match=rf"of 6 samples .* finite, from evaluation 1 of 2 on \(seeds {seeds}\): 1 of its weights"
    ):
        model.images(range(6), num_inference_steps=2, guidance_scale=guidance_scale)
    assert model.images([0, 2], num_inference_steps=2).shape == (2, 1, 8, 8)


def test_the_mode_of_a_broken_unet_is_restored():
    unet = broken_unet().train()
    with pytest.raises(ValueError, match="not finite"):
        Model.of_unet(unet, DDPMScheduler()).images([0], num_inference_steps=1)
    assert unet.training


def test_generate_keeps_images_that_are_right_and_packs_nothing(tmp_path, run_eval, capsys, monkeypatch):
    unet = tiny_unet(num_class_embeds=5)
    with torch.no_grad():
        unet.class_embedding.weight[3] = math.nan
    stock_pipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    flags = ("--num_images", 4, "--num_inference_steps", 2, "--batch_size", 2)
    line = error_of(capsys, lambda: run_eval("generate", tmp_path / "pipe", "--output", tmp_path / "x.npz", *flags))
    assert "(seeds 3)" in line
    assert not (tmp_path / "x.npz").exists()
    assert sorted(path.name for path in (tmp_path / "x.npz.parts").glob("*.png")) == ["000000.png", "000001.png"]


def test_score_gives_no_figures(tmp_path, run_eval, capsys, feature_network):
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "right")
    stock_pipeline(broken_unet(), DDPMScheduler()).save_pretrained(tmp_path / "broken")
    flags = ("--reference", "digits", "--extractor", feature_network, "--output_dir", tmp_path / "scores", *SCORES)
    line = error_of(capsys, lambda: run_eval("score", tmp_path / "right", tmp_path / "broken", *flags))
    assert f"12 of 12 samples of {tmp_path / 'broken'} are not finite" in line
    rows = json.loads((tmp_path / "scores/results.json").read_text())["rows"]
    assert set(rows) == {str(tmp_path / "right"), "held-out images"}
    assert not (tmp_path / "broken/README.md").exists()


def test_an_extractor_that_is_not_finite(tmp_path, run_eval, capsys, feature_network):
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "right")
    tensors = load_file(feature_network)
    from safetensors import safe_open

    with safe_open(feature_network, "pt") as file:
        metadata = file.metadata()
    for value in tensors.values():
        if value.is_floating_point():
            value.view(-1)[0] = math.nan
    save_file(tensors, tmp_path / "features.safetensors", metadata=metadata)
    flags = ("--reference", "digits", "--extractor", tmp_path / "features.safetensors", *SCORES)
    line = error_of(capsys, lambda: run_eval("score", tmp_path / "right", *flags, "--output_dir", tmp_path / "scores"))
    assert "not finite" in line
    assert not (tmp_path / "scores/results.json").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # else the next call would read it


def save_teacher(folder, unet, scheduler=None):
    unet.save_pretrained(folder / "unet")
    (scheduler or DDPMScheduler()).save_pretrained(folder / "scheduler")
    return folder


def test_a_broken_teacher_is_named_before_the_run(tmp_path, run_recipe, capsys):
    teacher = save_teacher(tmp_path / "teacher", broken_unet("up_blocks.1.resnets.0.conv1.weight", math.inf))
    flags = (*SHORT_STUDENT, "--teacher", teacher, "--extractor", "none", "--output_dir", tmp_path / "run")
    line = error_of(capsys, lambda: run_recipe("train_student_unet", *flags))
    assert f"the teacher {teacher}" in line
    assert "1 of its weights hold NaN or infinity, such as up_blocks.1.resnets.0.conv1.weight" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_fourier_embedding_has_no_timestep_0():
    words = r"is not finite at timestep 0 \(its prediction\): its Fourier embedding takes the logarithm"
    batch = {**make_batch(), "timesteps": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(ValueError, match=words):
        check_finite(tiny_unet(time_embedding_type="fourier"), Schedule.of(DDPMScheduler()), batch, "the teacher")


def test_a_table_too_short_is_told_by_a_dry_run(tmp_path, run_recipe, capsys):
    teacher = save_teacher(tmp_path / "teacher", tiny_unet(time_embedding_type="learned", num_train_timesteps=500))
    line = error_of(capsys, lambda: run_recipe("train_student_unet", "--dry_run", "--teacher", teacher))
    assert "the schedule goes to 999" in line


def test_a_broken_start_of_the_student_is_not_the_teachers_fault(tmp_path, run_recipe, capsys):
    teacher = save_teacher(tmp_path / "teacher", tiny_unet())
    student = save_teacher(tmp_path / "student", broken_unet(channels=(4, 8)))
    flags = (*SHORT_STUDENT, "--teacher", teacher, "--student", student, "--extractor", "none", "--method", "output")
    line = error_of(capsys, lambda: run_recipe("train_student_unet", *flags, "--output_dir", tmp_path / "run"))
    assert "the student that training starts from is not finite at timestep 0" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_teacher_of_a_table_as_long_as_its_schedule_trains(tmp_path, run_recipe):
    unet = tiny_unet(time_embedding_type="learned", num_train_timesteps=40)
    teacher = save_teacher(tmp_path / "teacher", unet, DDIMScheduler(num_train_timesteps=40))
    flags = (*SHORT_STUDENT, "--teacher", teacher, "--extractor", "none", "--method", "output")
    run_recipe("train_student_unet", *flags, "--output_dir", tmp_path / "run")
    assert np.load(tmp_path / "run/samples.npz")["student"].max() > 0
