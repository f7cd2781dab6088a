"""The teacher recipe, a few steps on a CPU."""

from tests.recipes.conftest import SHORT, load_recipe
from vkd_gen.cli import repository_path
from vkd_gen.training.teachers import build_teacher
from vkd_gen.training.unets import load_teacher

RECIPE = "train_teacher_unet"


def test_a_teacher_trains_and_loads(tmp_path, run_recipe):
    run = tmp_path / "run"
    run_recipe(RECIPE, *SHORT, "--prediction_type", "v_prediction", "--output_dir", run, "--block_out_channels", 8, 16)
    unet, scheduler, origin = load_teacher(str(run / "pipeline"))
    assert origin == str(run / "pipeline/scheduler")
    assert unet.config.block_out_channels == [8, 16]
    assert scheduler.config.prediction_type == "v_prediction"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "samples.png").stat().st_size > 0


def test_dry_run(tmp_path, run_recipe, capsys):
    run_recipe(RECIPE, "--preset", "cifar10", "--dry_run", "--output_dir", tmp_path / "run")
    assert "parameters" in capsys.readouterr().out
    flags = ["--class_conditional", "--image_cache", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    run_recipe(RECIPE, "--dry_run", *flags)  # which has to look at the labels
    assert "for 10 classes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_every_teacher_that_a_preset_names_has_a_preset_here():
    students, teachers = load_recipe("train_student_unet").PRESETS, load_recipe(RECIPE).PRESETS
    assert set(students) == {*teachers, "emoji"}  # that one is made by train_teacher_text.py
    for name, preset in teachers.items():
        assert preset.data.dataset == students[name].data.dataset


def test_the_committed_digits_teacher_is_what_its_preset_describes():
    recipe = load_recipe(RECIPE)
    students = load_recipe("train_student_unet")
    unet = load_teacher(repository_path(students.PRESETS["digits"].teacher, students.__file__)).unet
    described = build_teacher(recipe.PRESETS["digits"].teacher).network
    assert {k: v.shape for k, v in unet.state_dict().items()} == {k: v.shape for k, v in described.state_dict().items()}
