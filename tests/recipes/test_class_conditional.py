"""From labelled digits to a class-conditional teacher, its student and their samples."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import tiny_unet
from tests.recipes.conftest import RECIPES, SHORT, SHORT_STUDENT
from vkd_gen.data.draws import TrainingDraws
from vkd_gen.data.sources import load_images
from vkd_gen.pipelines import ClassConditionalDDIMPipeline
from vkd_gen.sampling import stock_pipeline
from vkd_gen.training.loop import fixed_batches

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"
TINY = ("--class_conditional", "--block_out_channels", 8, 16, "--layers_per_block", 1, "--norm_num_groups", 4)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [
        {name: value for name, value in line.items() if name != "images_per_second"} for line in read_metrics(folder)
    ]


def weights(folder):
    return load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors")


def assert_same(folder, other):
    assert losses(folder) == losses(other)
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.fixture
def teacher_folder(tmp_path):
    """A tiny teacher of ten classes, with dropout, whose random state a checkpoint must bring back."""
    folder = tmp_path / "teacher"
    stock_pipeline(tiny_unet(num_class_embeds=11, dropout=0.1), DDPMScheduler()).save_pretrained(folder)
    return folder


def given_labels(monkeypatch):
    """The labels of every forward pass of a UNet from here on."""
    found, forward = [], UNet2DModel.forward

    def recorded(unet, sample, timestep, class_labels=None, return_dict=True):
        if sample.device.type != "meta":  # where shapes alone are asked for
            found.append(class_labels.tolist())
        return forward(unet, sample, timestep, class_labels, return_dict)

    monkeypatch.setattr(UNet2DModel, "forward", recorded)
    return found


def test_from_labelled_digits_to_a_student(tmp_path, run_recipe, monkeypatch):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    found = given_labels(monkeypatch)
    run_recipe(TEACHER, *SHORT, *TINY, "--preview_every_steps", 2, "--output_dir", teacher)
    # The preview's 50 steps, and the timing's 4 times 1 on 32 images, are of classes 0, 1, 2, ... in turn; so are the
    # 2 steps of the 12 samples that are scored.
    assert found.count([number % 10 for number in range(32)]) == 54
    assert found.count([number % 10 for number in range(12)]) == 2
    assert (teacher / "previews/step-000002.png").exists()
    run_recipe(STUDENT, *SHORT_STUDENT, "--teacher", teacher / "pipeline", "--output_dir", student)
    assert json.loads((teacher / "config.json").read_text())["num_classes"] == 10
    for run in (teacher, student):
        pipeline = ClassConditionalDDIMPipeline.from_pretrained(run / "pipeline")
        assert pipeline.unet.config.num_class_embeds == 11
        stock = UNet2DModel.from_pretrained(run / "pipeline", subfolder="unet")
        assert type(stock) is UNet2DModel
        for name, value in weights(run).items():
            assert torch.equal(stock.state_dict()[name], value)
    results = json.loads((student / "results.json").read_text())["rows"]
    assert results["teacher"]["teacher_distance"] == 0 < results["student"]["teacher_distance"]


def test_the_model_cards_code_runs(tmp_path, run_recipe):
    run_recipe(TEACHER, *SHORT, *TINY, "--output_dir", tmp_path / "run")
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert "class-conditional-image-generation" in card
    assert "0 to 9; 10 for no class" in card
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    exec(block.replace("THIS_FOLDER", str(tmp_path / "run/pipeline")), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 2
    assert type(names["unet"]) is UNet2DModel


def test_teacher_and_student_are_trained_on_the_labels_of_the_draws(tmp_path, teacher_folder, run_recipe, monkeypatch):
    """Calibration, projectors and steps: the same labels to both, some of them dropped."""
    found = given_labels(monkeypatch)
    flags = ["--train_batch_size", 32, "--guidance_dropout", 0.4, "--eval_batch_size", 64]
    flags += ["--feature_weighting", "constant"]  # which looks at no draws of its own before the first step,
    flags += ["--feature_decay_start", 0]  # nor before the last
    run_recipe(STUDENT, *SHORT_STUDENT, "--teacher", teacher_folder, *flags, "--output_dir", tmp_path / "run")
    images, _ = load_images("digits", resolution=8, channels=1, with_labels=True)

    def labels(seed, numbers):
        draws = TrainingDraws(images, seed=seed, guidance_dropout=0.4)
        return [draws[number]["class_labels"].item() for number in numbers]

    calibration = [labels(2**32, range(first, first + 64)) for first in (0, 64, 128)]
    assert 0.25 < np.mean(np.array(calibration) == 10) < 0.55
    steps = [labels(0, range(first, first + 32)) for first in (0, 32)]
    both = [label for batch in (*calibration, *steps) for label in (batch, batch)]
    # Before these the student is started on draws of its own.
    first = found.index(calibration[0])
    assert found[first : first + 3 + len(both)] == calibration + both


def test_conditioned_batches_of_the_calibration(schedule):
    images, _ = load_images("digits", resolution=8, channels=1, with_labels=True)
    options = {"seed": 3, "num_draws": 40, "batch_size": 16, "device": torch.device("cpu")}
    batches = list(fixed_batches(images, schedule, guidance_dropout=0.5, **options))
    draws = TrainingDraws(images, seed=3 + 2**32, guidance_dropout=0.5)
    found = torch.cat([batch["conditioning"]["class_labels"] for batch in batches])
    assert found.tolist() == [draws[number]["class_labels"].item() for number in range(40)]
    assert "class_labels" not in batches[0]
    unlabelled, _ = load_images("digits", resolution=8, channels=1)
    assert "conditioning" not in next(fixed_batches(unlabelled, schedule, **options))


@pytest.mark.parametrize("recipe", [TEACHER, STUDENT])
def test_interrupted_runs_end_as_the_straight_one(recipe, teacher_folder, tmp_path, run_recipe, run_interrupted):
    flags = [*TINY, *SHORT] if recipe == TEACHER else [*SHORT_STUDENT, "--teacher", teacher_folder]
    flags += ["--max_train_steps", 5, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    flags += ["--guidance_dropout", 0.5]
    if recipe == STUDENT:
        flags += ["--feature_weighting", "gradient_ratio", "--diagnostics_every_steps", 2]
    run_recipe(recipe, *flags, "--output_dir", tmp_path / "straight")
    run_interrupted(recipe, *flags, "--output_dir", tmp_path / "interrupted")
    assert_same(tmp_path / "straight", tmp_path / "interrupted")


def test_guidance_dropout_changes_the_run_and_may_not_change_within_it(teacher_folder, tmp_path, run_recipe, capfd):
    flags = [*SHORT_STUDENT, "--teacher", teacher_folder, "--train_batch_size", 16]
    for dropout in (0, 0.5):
        run_recipe(STUDENT, *flags, "--guidance_dropout", dropout, "--output_dir", tmp_path / str(dropout))
    first, second = (losses(tmp_path / name)[0]["loss/output"] for name in ("0", "0.5"))
    assert first != second
    assert first == pytest.approx(second, rel=0.3)  # the same images, noise and times
    resumed = ["--output_dir", tmp_path / "0.5", "--resume_from_checkpoint", "latest", "--guidance_dropout", 0.2]
    with pytest.raises(SystemExit):
        run_recipe(STUDENT, *flags, *resumed)
    assert "--guidance_dropout was 0.5 and is 0.2" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_equal_one(teacher_folder, tmp_path, run_recipe):
    stock_pipeline(tiny_unet(num_class_embeds=11), DDPMScheduler()).save_pretrained(teacher_folder)  # without dropout
    flags = [*SHORT_STUDENT, "--teacher", teacher_folder, "--max_train_steps", 4, "--guidance_dropout", 0.5]
    flags += ["--feature_weighting", "constant", "--diagnostics_every_steps", 0]
    run_recipe(STUDENT, *flags, "--train_batch_size", 8, "--output_dir", tmp_path / "1")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, RECIPES / f"{STUDENT}.py", *flags, "--train_batch_size", 4, "--output_dir", tmp_path / "2"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) == 4
    for first, second in zip(one, two, strict=True):
        for name in first:
            if name.startswith("loss/"):
                assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), (first["step"], name)


def test_a_folder_of_classes(tmp_path, run_recipe, capsys):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    flags = [*SHORT, *TINY, "--dataset", tmp_path / "images"]
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "run", "--dataloader_num_workers", 1)
    assert ClassConditionalDDIMPipeline.from_pretrained(tmp_path / "run/pipeline").unet.config.num_class_embeds == 4
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "other", "--dry_run")
    assert "parameters, for 3 classes" in capsys.readouterr().out
