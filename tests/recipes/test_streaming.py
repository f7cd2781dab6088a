"""Recipes on data that are read as a stream, run as users run them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.conftest import RECIPES, SHORT, SHORT_STUDENT, assert_same_weights, read_metrics, without_times
from tests.sources import encoded, write_shards

datasets = pytest.importorskip("datasets")

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"


@pytest.fixture
def source(tmp_path):
    """60 images of noise, of 3 classes, in 3 shards."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    labels = (datasets.ClassLabel(names=list("abc")), [number % 3 for number in range(60)])
    return write_shards(
        tmp_path / "data", [encoded(Image.fromarray(image)) for image in pixels], [20] * 3, labels=labels
    )


@pytest.fixture
def flags(source):
    given = ["--dataset", source, "--streaming", "--stream_head", 36, "--stream_buffer", 5, "--max_train_steps", 6]
    return [*given, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]


def test_a_student_stopped_and_gone_on_is_the_straight_one(
    flags, pipeline_folder, tmp_path, run_recipe, run_interrupted
):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, *flags, "--gradient_accumulation_steps", 2]
    flags += ["--extractor", "none", "--no-score_teacher"]
    run_recipe(STUDENT, *flags, "--output_dir", tmp_path / "straight")
    run_interrupted(STUDENT, *flags, "--output_dir", tmp_path / "run")
    assert_same_weights(tmp_path / "straight", tmp_path / "run")
    assert without_times(read_metrics(tmp_path / "straight")) == without_times(read_metrics(tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_training_images"], config["num_shards"]) == (30, 3)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"]["student"]["denoising_error"] > 0


def test_a_teacher_of_classes_with_workers_stopped_and_gone_on(flags, tmp_path, run_recipe, run_interrupted, capfd):
    flags = [*SHORT, *flags, "--extractor", "none", "--class_conditional", "--block_out_channels", 8, 16]
    flags += ["--dataloader_num_workers", 2]
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "straight")
    assert "30 images to train on, 6 held out; the head of a stream of 3 shards" in capfd.readouterr().out
    run_interrupted(TEACHER, *flags, "--output_dir", tmp_path / "run")
    assert_same_weights(tmp_path / "straight", tmp_path / "run")
    with pytest.raises(SystemExit) as status:
        run_recipe(TEACHER, *flags, "--dataloader_num_workers", 1, "--output_dir", tmp_path / "run")
    assert status.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "is of a stream" in error
    assert "go on with --dataloader_num_workers 2" in error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--streaming"], "digits is no set of parquet or arrow files"),
        (["--streaming", "--stream_head", 0], "--stream_head must be at least 1, not 0"),
        (["--streaming", "--stream_buffer", 0], "--stream_buffer must be at least 1, not 0"),
        (["--streaming", "--max_train_samples", 3], "--max_train_samples chooses among all images"),
    ],
)
def test_what_cannot_be_combined(given, words, pipeline_folder, tmp_path, run_recipe, capfd):
    with pytest.raises(SystemExit) as status:
        run_recipe(STUDENT, *SHORT_STUDENT, "--teacher", pipeline_folder, *given, "--output_dir", tmp_path / "run")
    assert status.value.code == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_a_bad_image_in_the_stream_ends_the_run_or_is_left_out(
    source, flags, pipeline_folder, tmp_path, run_recipe, capfd
):
    cells = [*(encoded(Image.new("L", (8, 8), level)) for level in (10, 20)), b"no image"]
    write_shards(source, cells, [3], labels=(datasets.ClassLabel(names=list("abc")), [0, 1, 2]), split="zzz")
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, *flags, "--train_batch_size", 16, "--stream_head", 8]
    flags += ["--extractor", "none", "--method", "none", "--no-score_teacher", "--dataloader_num_workers", 1]
    with pytest.raises(SystemExit) as status:
        run_recipe(STUDENT, *flags, "--on_bad_image", "refuse", "--output_dir", tmp_path / "refused")
    assert status.value.code == 2
    assert "cannot read image 2 of shard 3" in capfd.readouterr().err
    run_recipe(STUDENT, *flags, "--on_bad_image", "skip", "--output_dir", tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 6


@pytest.mark.slow
def test_two_processes_stopped_and_gone_on(flags, pipeline_folder, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    given = [*SHORT_STUDENT, "--teacher", pipeline_folder, *flags, "--extractor", "none", "--no-score_teacher"]

    def launch(run, num_processes, *more):
        start = ["--multi_gpu", "--num_processes", 2] if num_processes == 2 else ["--num_processes", 1, "--cpu"]
        command = ["-m", "accelerate.commands.launch", *start, RECIPES / f"{STUDENT}.py", *given, *more]
        command = [sys.executable, *map(str, command), "--output_dir", str(tmp_path / run)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    straight = launch("straight", 2)
    assert straight.returncode == 0, straight.stderr
    first = launch("run", 2, "--checkpoints_keep_every_steps", 2)
    assert first.returncode == 0, first.stderr
    positions = [
        torch.load(tmp_path / "run" / "checkpoint-4" / f"process-{index}.pt", weights_only=True)["positions"]
        for index in range(2)
    ]
    assert not torch.equal(*positions)
    again = launch("run", 2, "--resume_from_checkpoint", "checkpoint-2")
    assert again.returncode == 0, again.stderr
    assert_same_weights(tmp_path / "straight", tmp_path / "run")
    fewer = launch("run", 1)
    assert "go on with --num_processes 2" in " ".join(fewer.stderr.split())
