"""Students that start from their teacher, as the commands start them."""

import pytest

from tests.recipes.conftest import SHORT_STUDENT, read_metrics


@pytest.mark.parametrize(
    "flags",
    [
        ["--student_width", 0.5],
        pytest.param(["--student_width", 1, "--student_layers_per_block", 1], marks=pytest.mark.slow),
    ],
)
def test_a_student_that_inherits_starts_closer_to_its_teacher(flags, tmp_path, run_recipe, capsys):
    settings = ["--teacher", "recipes/assets/digits-teacher", "--max_train_steps", 1, "--train_batch_size", 32]
    settings += ["--method", "output", "--extractor", "none", "--no-score_teacher"]
    losses = {}
    ways = {
        "random": ["--no-inherit_weights"],
        "plain": ["--inherit_channels", "magnitude", "--inherit_rescaling", "none", "--inherit_layers", "rule"],
        "fitted": ["--inherit_samples", 64],
    }
    for name, way in ways.items():
        run = tmp_path / name
        run_recipe("train_student_unet", *SHORT_STUDENT, *settings, *flags, *way, "--output_dir", run)
        losses[name] = read_metrics(run)[0]["loss/output"]
        assert ("0 left random" in capsys.readouterr().out) == (name != "random")
    assert losses["fitted"] < 0.5 * losses["plain"] < 0.5 * losses["random"]
