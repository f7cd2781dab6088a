"""Students that start from their teacher, as the commands start them; and the command that compares the ways."""

import json

import pytest

from tests.recipes.conftest import SHORT_STUDENT


def first_losses(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    "flags",
    [
        ["--student_width", 0.5],
        pytest.param(["--student_width", 1, "--student_layers_per_block", 1], marks=pytest.mark.slow),
    ],
)
def test_a_student_that_inherits_starts_closer_to_its_teacher(flags, tmp_path, run_recipe, capsys):
    teacher = "recipes/assets/digits-teacher"
    losses = {}
    ways = {
        "random": ["--no-inherit_weights"],
        "plain": ["--inherit_channels", "magnitude", "--inherit_rescaling", "none", "--inherit_layers", "rule"],
        "fitted": ["--inherit_samples", 64],
    }
    for name, way in ways.items():
        run = tmp_path / name
        settings = ["--teacher", teacher, "--max_train_steps", 1, "--train_batch_size", 32, "--method", "output"]
        run_recipe("train_student_unet", *SHORT_STUDENT, *settings, *flags, *way, "--output_dir", run)
        losses[name] = first_losses(run)["loss/output"]
        assert ("0 left random" in capsys.readouterr().out) == (name != "random")
    assert losses["fitted"] < 0.5 * losses["plain"] < 0.5 * losses["random"]


def test_comparison_before_training(tmp_path, pipeline_folder, run_recipe, capsys):
    results = tmp_path / "docs" / "inheritance.json"
    flags = ["--preset", "default", "--step0_teachers", f"{pipeline_folder}=digits", "--widths", 0.5, "--num_seeds", 2]
    flags += ["--num_draws", 16, "--max_train_steps", 0, "--results", results]
    run_recipe("compare_inheritance", *flags)
    rows = json.loads(results.read_text())["before_training"]["teacher width 0.5"]
    assert set(rows) == {"random initialisation"} | {
        f"{channels}, {rescaling}"
        for channels in ("random", "first", "magnitude", "activation")
        for rescaling in ("none", "fan_in", "least_squares")
    }
    assert len(rows["first, none"]["values"]) == 2
    assert rows["activation, least_squares"]["mean"] < rows["random initialisation"]["mean"]
    assert "activation, least_squares" in capsys.readouterr().out

    known = json.loads(results.read_text())
    known["before_training"]["teacher width 0.5"]["first, none"]["mean"] = 123.0
    results.write_text(json.dumps(known))
    run_recipe("compare_inheritance", *flags)  # what is done already is not done again
    assert json.loads(results.read_text())["before_training"] == known["before_training"]
    run_recipe("compare_inheritance", *flags, "--num_draws", 8)  # another protocol is
    assert json.loads(results.read_text())["before_training"] != known["before_training"]


def test_comparison_refuses_in_one_line(run_recipe, capsys):
    with pytest.raises(SystemExit):
        run_recipe("compare_inheritance", "--preset", "default", "--step0_teachers", "folder")
    assert "takes FOLDER=DATASET" in capsys.readouterr().err
