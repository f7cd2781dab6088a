"""Banks of the teacher's answers and caches of images, in the recipes, run as users run them."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.recipes.conftest import RECIPES, SHORT, SHORT_STUDENT
from tests.recipes.test_bad_input import images_in
from tests.recipes.test_train_student_unet import assert_same_weights, read_metrics, without_times
from vkd_gen.training.loop import TrainingRun

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"


@pytest.fixture
def student_flags(pipeline_folder):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--extractor", "none", "--max_train_steps", 6]
    return [*flags, "--eval_batch_size", 4, "--projector_refresh_steps", 2]


def kept_files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--dataloader_num_workers", 1], marks=pytest.mark.slow),
        pytest.param(["--method", "output"], marks=pytest.mark.slow),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_bank_of_all_draws_changes_nothing(flags, student_flags, tmp_path, run_recipe, capsys):
    """Bit for bit, where the teacher is asked for the bank in batches as large as the training's."""
    run_recipe(STUDENT, *student_flags, *flags, "--output_dir", tmp_path / "live")
    capsys.readouterr()
    run_recipe(STUDENT, *student_flags, *flags, "--bank_size", 24, "--output_dir", tmp_path / "bank")
    assert "24 answers of the teacher: " in capsys.readouterr().out
    assert len(kept_files(tmp_path / "bank/bank")) == 1
    assert_same_weights(tmp_path / "live", tmp_path / "bank")
    assert without_times(read_metrics(tmp_path / "live")) == without_times(read_metrics(tmp_path / "bank"))


@pytest.mark.slow
def test_a_smaller_bank_repeats_its_draws(student_flags, tmp_path, run_recipe):
    """With a student that stands still, every second step has the losses of the first."""
    flags = [*student_flags, "--method", "output", "--learning_rate", 1e-12, "--bank_size", 8]
    run_recipe(STUDENT, *flags, "--output_dir", tmp_path / "run")
    totals = [line["loss/total"] for line in read_metrics(tmp_path / "run") if "loss/total" in line]
    assert totals[0] != pytest.approx(totals[1], rel=1e-3)
    assert totals == pytest.approx(totals[:2] * 3, rel=1e-6)


@pytest.mark.slow
def test_a_run_with_a_bank_is_resumed_to_the_same_end(student_flags, tmp_path, run_recipe, monkeypatch, capsys):
    """Also if the bank is damaged meanwhile."""
    flags = [*student_flags, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest", "--bank_size", 10]
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    run_recipe(STUDENT, *flags, "--output_dir", straight)
    after_step = TrainingRun._after_step

    def interrupt(run):
        after_step(run)
        if run.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_after_step", interrupt)
        with pytest.raises(SystemExit):
            run_recipe(STUDENT, *flags, "--output_dir", interrupted)
    (kept,) = kept_files(interrupted / "bank")
    kept.write_bytes(kept.read_bytes()[:-1])
    capsys.readouterr()
    run_recipe(STUDENT, *flags, "--output_dir", interrupted)
    assert f"{kept} is damaged and made again" in capsys.readouterr().out
    assert_same_weights(straight, interrupted)
    assert without_times(read_metrics(interrupted)) == without_times(read_metrics(straight))


@pytest.mark.slow
def test_another_size_is_another_run_but_the_place_is_free(student_flags, tmp_path, run_recipe, capfd):
    flags = [*student_flags, "--output_dir", tmp_path / "run"]
    run_recipe(STUDENT, *flags, "--bank_size", 8)
    resumed = [*flags, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit):
        run_recipe(STUDENT, *resumed, "--bank_size", 9)
    assert "--bank_size was 8 and is 9" in capfd.readouterr().err
    run_recipe(STUDENT, *resumed, "--bank_size", 8, "--bank_dir", tmp_path / "elsewhere")
    assert [path.parent.name for path in kept_files(tmp_path / "elsewhere")] == [
        path.parent.name for path in kept_files(tmp_path / "run/bank")
    ]


@pytest.mark.slow
def test_accumulated_passes_share_a_bank(student_flags, tmp_path, run_recipe):
    shared = [*student_flags, "--bank_size", 12, "--bank_dir", tmp_path / "bank"]
    run_recipe(STUDENT, *shared, "--train_batch_size", 8, "--output_dir", tmp_path / "large")
    flags = [*shared, "--train_batch_size", 4, "--gradient_accumulation_steps", 2]
    run_recipe(STUDENT, *flags, "--output_dir", tmp_path / "small")
    assert len(kept_files(tmp_path / "bank")) == 1
    for large, small in zip(read_metrics(tmp_path / "large"), read_metrics(tmp_path / "small"), strict=True):
        for name in (name for name in large if name.startswith("loss/")):
            assert small[name] == pytest.approx(large[name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_share_a_bank(student_flags, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    images = ["--image_cache", tmp_path / "images", "--dataset", images_in(tmp_path / "pngs", count=24)]
    for processes, batch_size in ((1, 8), (2, 4)):
        launch = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--num_processes", "1", "--cpu"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, RECIPES / f"{STUDENT}.py"]
        command += [*student_flags, *images, "--train_batch_size", batch_size, "--bank_size", 20]
        result = subprocess.run(
            list(map(str, [*command, "--output_dir", tmp_path / str(processes)])),
            capture_output=True,
            text=True,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("20 answers of the teacher: ") == 1
    for first, second in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2"), strict=True):
        for name in (name for name in first if name.startswith("loss/")):
            assert second[name] == pytest.approx(first[name], rel=1e-5)


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
