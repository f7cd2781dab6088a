"""The cache of images in the recipes, run as users run them."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.recipes.conftest import RECIPES, SHORT, SHORT_STUDENT, assert_same_weights, images_in, read_metrics

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"


@pytest.fixture
def student_flags(pipeline_folder):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--extractor", "none", "--max_train_steps", 6]
    return [*flags, "--eval_batch_size", 4, "--projector_refresh_steps", 2]


def kept_files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("recipe", [pytest.param(STUDENT, marks=pytest.mark.slow), TEACHER])
def test_kept_images_change_nothing(recipe, student_flags, tmp_path, run_recipe, capsys):
    folder = images_in(tmp_path / "images", count=24, side=9)
    flags = student_flags if recipe == STUDENT else [*SHORT, "--extractor", "none"]
    flags = [*flags, "--dataset", folder, "--random_flip"]
    run_recipe(recipe, *flags, "--output_dir", tmp_path / "without")
    for name in ("first", "second"):
        cache = ["--image_cache", tmp_path / "cache", "--output_dir", tmp_path / name]
        run_recipe(recipe, *flags, *cache, "--dataloader_num_workers", 1)
        assert "20 decoded images: 64 bytes each, 0.0 MB in" in capsys.readouterr().out
        assert_same_weights(tmp_path / "without", tmp_path / name)
    assert len(kept_files(tmp_path / "cache")) == 1
    shutil.copy(folder / "3.png", folder / "4.png")  # other images: another file
    run_recipe(recipe, *flags, *cache[:2], "--output_dir", tmp_path / "third")
    assert len(kept_files(tmp_path / "cache")) == 2


@pytest.mark.slow
def test_two_processes_share_a_cache(student_flags, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    images = ["--image_cache", tmp_path / "images", "--dataset", images_in(tmp_path / "pngs", count=24)]
    for processes, batch_size in ((1, 8), (2, 4)):
        launch = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--num_processes", "1", "--cpu"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, RECIPES / f"{STUDENT}.py"]
        command += [*student_flags, *images, "--train_batch_size", batch_size]
        command += ["--output_dir", tmp_path / str(processes)]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("20 decoded images: ") == 1
    assert len(kept_files(tmp_path / "images")) == 1
    for first, second in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2"), strict=True):
        for name in (name for name in first if name.startswith("loss/")):
            assert second[name] == pytest.approx(first[name], rel=1e-5)
