"""From prompts and pictures to a student of Stable Diffusion, and back into the stock pipeline."""

import gc
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from tests.recipes.conftest import (
    TWO,
    assert_same_run,
    launch,
    read_metrics,
    run_until,
)
from tests.text_pipelines import tiny_pipeline
from vkd_gen.training.run import Run

STUDENT = "train_student_unet"
KINDS = ["sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)]


@pytest.fixture
def pictures(tmp_path):
    """Red and blue squares on white, higher than wide, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator, rows = np.random.default_rng(0), []
    for number in range(24):
        name, colour = [("red", (220, 30, 30)), ("blue", (30, 30, 220))][number % 2]
        pixels = np.full((44, 36, 3), 255, np.uint8)
        top, left = generator.integers(0, 20, 2)
        pixels[top : top + 16, left : left + 16] = colour
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        rows.append({"file_name": f"{number:02}.png", "text": [f"a {name} square", name]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags_of(tmp_path, kind, pictures, run, *more):
    """A run of four steps."""
    teacher = tmp_path / kind
    if not teacher.exists():
        tiny_pipeline(kind, teacher)
    short = ["--max_train_steps", 4, "--train_batch_size", 4, "--log_every_steps", 1, "--lr_warmup_steps", 0]
    short += ["--calibration_samples", 16, "--num_timestep_bins", 2, "--inherit_samples", 8, "--eval_batch_size", 8]
    short += [
        "--num_inference_steps",
        2,
        "--extractor",
        "none",
        "--random_flip",
        "--num_crops",
        2,
        "--preset",
        "custom",
    ]
    short += ["--dataloader_num_workers", 0, "--teacher", teacher, "--dataset", pictures, "--output_dir", run]
    return [*short, *more]


@pytest.fixture
def encoders_are_dead(monkeypatch):
    """Of each part that encoded, whether it has left memory by the time that the teacher is frozen for the steps."""
    watched, dead = [], []
    encode, freeze = Run.encode_data, Run.freeze

    def encode_data(run, options, *models):
        watched.extend(weakref.ref(getattr(models[0].pipeline, part)) for part in ("vae", "text_encoder", "tokenizer"))
        encode(run, options, *models)

    def freeze_after(run, *arguments):
        gc.collect()
        dead.extend(part() is None for part in watched)
        return freeze(run, *arguments)

    monkeypatch.setattr(Run, "encode_data", encode_data)
    monkeypatch.setattr(Run, "freeze", freeze_after)
    return dead


@pytest.mark.parametrize("kind", KINDS)
def test_from_pictures_to_a_stock_pipeline(tmp_path, run_recipe, pictures, kind, encoders_are_dead):
    """The teacher's own pipeline with the student in it, which draws without this package."""
    run = tmp_path / "run"
    more = ["--validation_prompts", "a red square", "--preview_every_steps", 4]
    run_recipe(STUDENT, *flags_of(tmp_path, kind, pictures, run, *more))
    assert encoders_are_dead == [True] * 3
    losses = [line["loss/output"] for line in read_metrics(run) if "loss/output" in line]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert (run / "previews/step-000004.png").exists()
    teacher, student = (DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / kind, run / "pipeline"))
    assert type(student) is type(teacher)
    assert student.scheduler.config == teacher.scheduler.config
    assert student.unet.num_parameters() < teacher.unet.num_parameters() / 2
    for name, part in teacher.components.items():
        if isinstance(part, nn.Module) and name != "unet":
            other = student.components[name].state_dict()
            assert all(torch.equal(value, other[key]) for key, value in part.state_dict().items())
    assert student.tokenizer("a red square").input_ids == teacher.tokenizer("a red square").input_ids
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert rows["teacher"]["teacher_distance"] == 0 < rows["student"]["teacher_distance"]
    assert rows["teacher"]["guidance_gap_ratio"] == pytest.approx(1)
    code = (
        "import sys; sys.modules['vkd_gen'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(run / 'pipeline')!r})\n"
        "assert pipeline('a red square', num_inference_steps=2).images[0].size == (32, 32)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path, run_recipe, pictures, kind):
    """Bit for bit, with the encodings of the first start or without."""
    straight, resumed = (
        flags_of(tmp_path, kind, pictures, tmp_path / name, "--checkpointing_steps", 2, "--cache_dir", tmp_path / name)
        for name in ("straight", "resumed")
    )
    straight[-1], resumed[-1] = tmp_path / "cache", tmp_path / "other-cache"
    run_recipe(STUDENT, *straight)
    run_until(3, run_recipe, STUDENT, *resumed)
    torch.manual_seed(7)
    resumed[-1] = tmp_path / "a third cache"
    run_recipe(STUDENT, *resumed, "--resume_from_checkpoint", "latest")
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_two_processes_equal_one(tmp_path, pictures, kind):
    """They share the encoding, and train on the same draws."""
    found = {}
    for name, launcher, batch in (("one", ["--num_processes", 1, "--cpu"], 4), ("two", TWO, 2)):
        flags = flags_of(tmp_path, kind, pictures, tmp_path / name, "--no_inherit_weights")
        flags[flags.index("--train_batch_size") + 1] = batch
        environment = {"VKD_GEN_CACHE": str(tmp_path / name / "cache"), "ACCELERATE_USE_CPU": "1"}
        done = launch(STUDENT, *flags, launcher=launcher, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = [line["loss/total"] for line in read_metrics(tmp_path / name) if "loss/total" in line]
    np.testing.assert_allclose(found["one"], found["two"], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("more", [["--mixed_precision", "bf16"], ["--gradient_checkpointing"], ["--no-cache"]])
def test_ways_to_run_it(tmp_path, run_recipe, pictures, kind, more):
    """In bf16, with less memory, and encoding what is drawn: the losses are nearly the same."""
    found = {}
    for name, flags in (("plain", []), ("other", more)):
        run = tmp_path / name
        run_recipe(STUDENT, *flags_of(tmp_path, kind, pictures, run, "--no_inherit_weights", *flags))
        found[name] = [line["loss/total"] for line in read_metrics(run) if "loss/total" in line]
    np.testing.assert_allclose(found["plain"], found["other"], rtol=5e-2 if "bf16" in more else 1e-4)
