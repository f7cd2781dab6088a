"""From labelled digits to a class-conditional teacher, its student and their samples."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from tests.conftest import DrawsByNumber, refused, tiny_unet
from tests.recipes.conftest import SHORT, SHORT_STUDENT, assert_same_run, images_in, read_metrics, weights_of
from vkd_gen.data.draws import Draws
from vkd_gen.data.samples import Pixels
from vkd_gen.data.sources import load_images
from vkd_gen.pipelines import ClassConditionalDDIMPipeline, stock_pipeline

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"
NO_SCORES = ("--extractor", "none", "--no-score_teacher")
TINY = ("--class_conditional", "--block_out_channels", 8, 16, "--layers_per_block", 1, "--norm_num_groups", 4)


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
    # The preview's 50 steps, and the 2 steps of the 12 samples that are scored, are of classes 0, 1, 2, ... in turn.
    assert found.count([number % 10 for number in range(32)]) == 50
    assert found.count([number % 10 for number in range(12)]) == 2
    assert (teacher / "previews/step-000002.png").exists()
    run_recipe(STUDENT, *SHORT_STUDENT, *NO_SCORES, "--teacher", teacher / "pipeline", "--output_dir", student)
    assert json.loads((teacher / "config.json").read_text())["num_classes"] == 10
    for run in (teacher, student):
        pipeline = ClassConditionalDDIMPipeline.from_pretrained(run / "pipeline")
        assert pipeline.unet.config.num_class_embeds == 11
        stock = UNet2DModel.from_pretrained(run / "pipeline", subfolder="unet")
        assert type(stock) is UNet2DModel
        for name, value in weights_of(run).items():
            assert torch.equal(stock.state_dict()[name], value)
    results = json.loads((student / "results.json").read_text())["rows"]
    assert results["teacher"]["teacher_distance"] == 0 < results["student"]["teacher_distance"]

    card = (teacher / "pipeline/README.md").read_text()
    assert "class-conditional-image-generation" in card
    assert "0 to 9; 10 for no class" in card
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    exec(block.replace("THIS_FOLDER", str(teacher / "pipeline")), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 2
    assert type(names["unet"]) is UNet2DModel


def test_teacher_and_student_are_trained_on_the_labels_of_the_draws(tmp_path, teacher_folder, run_recipe, monkeypatch):
    """Calibration, projectors and steps: the same labels to both, some of them dropped."""
    found = given_labels(monkeypatch)
    flags = ["--train_batch_size", 32, "--guidance_dropout", 0.4, "--eval_batch_size", 64]
    # A constant weight looks at no draws of its own before the first step, features to the end at none before the last.
    flags += [*NO_SCORES, "--feature_weighting", "constant", "--feature_decay_end", 1]
    run_recipe(STUDENT, *SHORT_STUDENT, "--teacher", teacher_folder, *flags, "--output_dir", tmp_path / "run")
    images, _ = load_images("digits", resolution=8, channels=1, with_labels=True)

    def labels(seed, numbers):
        draws = DrawsByNumber(images, seed=seed, guidance_dropout=0.4)
        return [draws[number]["class_labels"].item() for number in numbers]

    calibration = [labels(2**32, range(first, first + 64)) for first in (0, 64, 128)]
    assert 0.25 < np.mean(np.array(calibration) == 10) < 0.55
    steps = [labels(0, range(first, first + 32)) for first in (0, 32)]
    both = [label for batch in (*calibration, *steps) for label in (batch, batch)]
    # Before these the student is started on draws of its own.
    first = found.index(calibration[0])
    assert found[first : first + 3 + len(both)] == calibration + both


def test_both_branches_of_each_draw_are_asked_and_the_guidance_gap_is_told(
    tmp_path, teacher_folder, run_recipe, monkeypatch
):
    found, flags = given_labels(monkeypatch), [*SHORT_STUDENT, *NO_SCORES, "--teacher", teacher_folder]
    flags += [
        "--method",
        "output",
        "--guidance_branches",
        "both",
        "--max_train_steps",
        3,
        "--diagnostics_every_steps",
        2,
    ]
    run_recipe(STUDENT, *flags, "--output_dir", tmp_path / "run")
    images, _ = load_images("digits", resolution=8, channels=1, with_labels=True)
    draws = DrawsByNumber(images, seed=0)
    for first in (0, 4, 8):
        rows = [draws[number]["class_labels"].item() for number in range(first, first + 4)] + [10] * 4
        place = found.index(rows)
        assert found[place + 1] == rows  # the teacher, then the student
    ratios = {line["step"]: line.get("diagnostics/guidance_gap_ratio") for line in read_metrics(tmp_path / "run")}
    assert sorted(step for step, ratio in ratios.items() if ratio is not None) == [2, 3]
    assert all(0 < ratio < 10 for ratio in ratios.values() if ratio is not None)


def test_conditioned_batches_of_the_calibration(schedule):
    images, _ = load_images("digits", resolution=8, channels=1, with_labels=True)
    batches = list(Draws(Pixels(images, guidance_dropout=0.5), schedule, seed=3, batch_size=16).apart(40))
    assert [len(batch["sample"]) for batch in batches] == [16, 16, 8]
    draws = DrawsByNumber(images, seed=3 + 2**32, guidance_dropout=0.5)
    found = torch.cat([batch["conditioning"]["class_labels"] for batch in batches])
    assert found.tolist() == [draws[number]["class_labels"].item() for number in range(40)]
    assert "class_labels" not in batches[0]
    unlabelled, _ = load_images("digits", resolution=8, channels=1)
    assert not next(Draws(Pixels(unlabelled), schedule, seed=3).apart(4))["conditioning"]


@pytest.mark.parametrize("recipe", [TEACHER, pytest.param(STUDENT, marks=pytest.mark.slow)])
def test_interrupted_runs_end_as_the_straight_one(recipe, teacher_folder, tmp_path, run_recipe, run_interrupted):
    flags = [*TINY, *SHORT] if recipe == TEACHER else [*SHORT_STUDENT, "--teacher", teacher_folder]
    flags += ["--max_train_steps", 5, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    flags += ["--guidance_dropout", 0.5, "--extractor", "none"]
    if recipe == STUDENT:
        flags += ["--feature_weighting", "gradient_ratio", "--diagnostics_every_steps", 2]
    run_recipe(recipe, *flags, "--output_dir", tmp_path / "straight")
    run_interrupted(recipe, *flags, "--output_dir", tmp_path / "interrupted")
    assert_same_run(tmp_path / "straight", tmp_path / "interrupted")


def test_guidance_dropout_changes_the_run_and_may_not_change_within_it(tmp_path, run_recipe, capfd):
    flags = [*TINY, *SHORT, "--extractor", "none", "--train_batch_size", 16]
    for dropout in (0, 0.5):
        run_recipe(TEACHER, *flags, "--guidance_dropout", dropout, "--output_dir", tmp_path / str(dropout))
    first, second = (read_metrics(tmp_path / name)[0]["loss/total"] for name in ("0", "0.5"))
    assert first != second
    assert first == pytest.approx(second, rel=0.3)  # the same images, noise and times
    resumed = ["--output_dir", tmp_path / "0.5", "--resume_from_checkpoint", "latest", "--guidance_dropout", 0.2]
    assert "--guidance_dropout was 0.5 and is 0.2" in refused(capfd, run_recipe, TEACHER, *flags, *resumed)


def test_a_folder_of_classes(tmp_path, run_recipe, capsys):
    for name in ("cat", "dog", "eel"):
        images_in(tmp_path / "images" / name, count=4)
    flags = [*SHORT, *TINY, "--dataset", tmp_path / "images"]
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "run", "--dataloader_num_workers", 1)
    assert ClassConditionalDDIMPipeline.from_pretrained(tmp_path / "run/pipeline").unet.config.num_class_embeds == 4
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "other", "--dry_run")
    assert "parameters, for 3 classes" in capsys.readouterr().out
