"""Recipes on images that are read as a stream, or kept on the disk, run as users run them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.conftest import (
    SHORT,
    SHORT_STUDENT,
    TWO,
    assert_same_run,
    assert_same_weights,
    images_in,
    launch,
    read_metrics,
)
from tests.sources import encoded, write_shards

datasets = pytest.importorskip("datasets")

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"


@pytest.fixture
def student_flags(pipeline_folder):
    return [*SHORT_STUDENT, "--teacher", pipeline_folder, "--extractor", "none", "--no-score_teacher"]


# ---- streams


@pytest.fixture
def source(tmp_path):
    """60 images of noise, of 3 classes, in 3 shards."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    labels = (datasets.ClassLabel(names=list("abc")), [number % 3 for number in range(60)])
    cells = [encoded(Image.fromarray(image)) for image in pixels]
    return write_shards(tmp_path / "data", cells, [20] * 3, labels=labels)


@pytest.fixture
def flags(source):
    given = ["--dataset", source, "--streaming", "--stream_head", 36, "--stream_buffer", 5, "--max_train_steps", 6]
    return [*given, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]


def test_a_teacher_of_classes_with_workers_stopped_and_gone_on(flags, tmp_path, run_recipe, run_interrupted, capfd):
    flags = [*SHORT, *flags, "--extractor", "none", "--class_conditional", "--block_out_channels", 8, 16]
    flags += ["--dataloader_num_workers", 2, "--gradient_accumulation_steps", 2]
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "straight")
    assert "30 images to train on, 6 held out; the head of a stream of 3 shards" in capfd.readouterr().out
    run_interrupted(TEACHER, *flags, "--output_dir", tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_training_images"], config["num_shards"]) == (30, 3)
    with pytest.raises(SystemExit) as status:
        run_recipe(TEACHER, *flags, "--dataloader_num_workers", 1, "--output_dir", tmp_path / "run")
    assert status.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "is of a stream" in error
    assert "go on with --dataloader_num_workers 2" in error


def test_a_bad_image_in_the_stream_ends_the_run_or_is_left_out(
    source, flags, student_flags, tmp_path, run_recipe, capfd
):
    labels = (datasets.ClassLabel(names=list("abc")), [0, 1, 2])
    write_shards(source, [10, 20, b"no image"], [3], labels=labels, split="zzz")
    flags = [*student_flags, *flags, "--train_batch_size", 16, "--stream_head", 8, "--method", "none"]
    flags += ["--dataloader_num_workers", 1]
    with pytest.raises(SystemExit) as status:
        run_recipe(STUDENT, *flags, "--on_bad_image", "refuse", "--output_dir", tmp_path / "refused")
    assert status.value.code == 2
    assert "cannot read image 2 of shard 3" in capfd.readouterr().err
    run_recipe(STUDENT, *flags, "--on_bad_image", "skip", "--output_dir", tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--streaming"], "digits is no set of parquet or arrow files"),
        (["--streaming", "--stream_head", 0], "--stream_head must be at least 1, not 0"),
        (["--streaming", "--stream_buffer", 0], "--stream_buffer must be at least 1, not 0"),
        (["--streaming", "--max_train_samples", 3], "--max_train_samples chooses among all images"),
    ],
)
def test_what_cannot_be_combined(given, words, student_flags, tmp_path, run_recipe, capfd):
    with pytest.raises(SystemExit) as status:
        run_recipe(STUDENT, *student_flags, *given, "--output_dir", tmp_path / "run")
    assert status.value.code == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_a_run_among_the_images_is_refused(tmp_path, run_recipe, capfd):
    """However the folder is spelled; else its samples would be trained on."""
    images = images_in(tmp_path / "images")
    with pytest.raises(SystemExit):
        run_recipe(TEACHER, *SHORT, "--dataset", images, "--output_dir", tmp_path / "x" / ".." / "images")
    assert "is the folder of the images" in " ".join(capfd.readouterr().err.split())
    assert len(list(images.iterdir())) == 6


@pytest.mark.slow
def test_two_processes_stopped_and_gone_on(flags, student_flags, tmp_path):
    def run(name, processes, *more):
        launcher = ["--num_processes", 1, "--cpu"] if processes == 1 else TWO
        flags_of_run = [*student_flags, *flags, *more, "--output_dir", tmp_path / name]
        return launch(STUDENT, *flags_of_run, launcher=launcher, ACCELERATE_USE_CPU="1")

    straight = run("straight", 2)
    assert straight.returncode == 0, straight.stderr
    first = run("run", 2, "--checkpoints_keep_every_steps", 2)
    assert first.returncode == 0, first.stderr
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "custom_checkpoint_2.pkl", weights_only=True)
    assert not torch.equal(*state["positions"].chunk(2))
    again = run("run", 2, "--resume_from_checkpoint", "checkpoint-2")
    assert again.returncode == 0, again.stderr
    assert_same_weights(tmp_path / "straight", tmp_path / "run")
    fewer = run("run", 1)
    assert "go on with --num_processes 2" in " ".join(fewer.stderr.split())


# ---- the cache


def test_kept_images_change_nothing(tmp_path, run_recipe, capsys):
    folder = images_in(tmp_path / "images", count=24, side=9)
    flags = [*SHORT, "--extractor", "none", "--dataset", folder, "--random_flip"]
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "without")
    flags += ["--image_cache", tmp_path / "cache", "--dataloader_num_workers", 1]
    run_recipe(TEACHER, *flags, "--output_dir", tmp_path / "with")
    assert "20 decoded images: 64 bytes each, 0.0 MB in" in capsys.readouterr().out
    assert_same_weights(tmp_path / "without", tmp_path / "with")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
