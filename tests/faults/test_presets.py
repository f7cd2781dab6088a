"""Presets do what they say for other data and other lengths of a run: warm-up, extractor, names, results files."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import compare_methods
import plan as planning
from tests.conftest import refused
from tests.recipes.conftest import SHORT, SHORT_STUDENT, images_in, load_recipe
from vkd_gen.cli import parse_command_line
from vkd_gen.evaluation.extractors import load_extractor
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.options import ScoreOptions, choose_extractor
from vkd_gen.evaluation.scorer import note_foreign_features
from vkd_gen.training.options import complete

STUDENT, TEACHER = "train_student_unet", "train_teacher_unet"


def parse(monkeypatch, name, *flags):
    """The configuration that a recipe works with."""
    recipe = load_recipe(name)
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, flags)])
    return complete(parse_command_line(recipe.PRESETS, recipe.__doc__, "digits", getattr(recipe, "METHODS", None)))


def parse_comparison(monkeypatch, *flags):
    """The configuration that compare_methods.py works with."""
    monkeypatch.setattr(sys, "argv", ["experiments/compare_methods.py", *map(str, flags)])
    return parse_command_line(planning.PRESETS, "", "screen")


@pytest.fixture
def photos(tmp_path):
    """A folder of grey images that are no digits."""
    return images_in(tmp_path / "my photos", count=24)


# ---- the warm-up is a share of the run


@pytest.mark.parametrize("name", [STUDENT, TEACHER])
@pytest.mark.parametrize(("preset", "most"), [("digits", 50), ("mnist", 50), ("cifar10", 1000), ("custom", 1000)])
def test_the_warm_up_is_a_tenth_of_the_run_at_most(name, preset, most, monkeypatch):
    own = ["--dataset", "x/y", *["--teacher", "x/y"] * (name == STUDENT)] if preset == "custom" else []
    for steps in (9, 300):
        training = parse(monkeypatch, name, "--preset", preset, "--max_train_steps", steps, *own).training
        assert training.lr_warmup_steps == steps // 10
    assert parse(monkeypatch, name, "--preset", preset, *own).training.lr_warmup_steps == most


def test_the_comparisons_are_warmed_up_as_ever():
    for name, config in planning.PRESETS.items():  # whose records were made with 50 steps
        says = any(flag.startswith("lr_warmup_steps ") for flag in config.extra)
        assert config.max_train_steps >= 500 or says or name == "faster-mnist", name


@pytest.mark.parametrize(
    ("given", "steps", "scheduler", "expected"),
    [(0, 20, "cosine", 0), (20, 20, "linear", 20), (99, 20, "constant", 99)],
)
def test_a_warm_up_that_is_asked_for_is_kept(given, steps, scheduler, expected, monkeypatch):
    flags = ["--lr_warmup_steps", given, "--max_train_steps", steps, "--lr_scheduler", scheduler]
    assert parse(monkeypatch, STUDENT, *flags).training.lr_warmup_steps == expected


def told(capfd):
    """The one line on standard error."""
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_a_warm_up_longer_than_the_run_is_refused(photos, tmp_path, run_recipe, capfd):
    assert "error: --lr_warmup_steps 21 is more than --max_train_steps 20" in refused(
        capfd, run_recipe, TEACHER, "--max_train_steps", 20, "--lr_warmup_steps", 21, "--output_dir", tmp_path / "run"
    )


def test_a_short_run_of_ones_own_learns_at_the_rate_that_was_asked_for(photos, pipeline_folder, tmp_path, run_recipe):
    run = tmp_path / "run"
    flags = [*SHORT_STUDENT, "--preset", "custom", "--teacher", pipeline_folder, "--dataset", photos]
    flags += ["--method", "output"]
    run_recipe(STUDENT, *flags, "--max_train_steps", 20, "--dataloader_num_workers", 0, "--output_dir", run)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("learning_rate", 0) for line in lines) == pytest.approx(4e-4)
    config = json.loads((run / "config.json").read_text())
    assert (config["lr_warmup_steps"], config["extractor"]) == (2, "none")
    card = (run / "pipeline" / "README.md").read_text()
    assert "# my-photos student" in card


@pytest.mark.parametrize(
    ("flags", "is_told"),
    [
        (["--feature_decay_end", 0.5, "--lr_warmup_steps", 10], True),
        (["--feature_decay_end", 0.5, "--lr_warmup_steps", 10, "--lr_scheduler", "constant"], False),
        (["--feature_decay_end", 0.55, "--lr_warmup_steps", 10], False),
        (["--method", "output", "--lr_warmup_steps", 20], False),
        ([], False),
    ],
)
def test_features_that_end_within_the_warm_up_are_told(flags, is_told, pipeline_folder, run_recipe, capfd):
    run_recipe(STUDENT, "--teacher", pipeline_folder, "--max_train_steps", 20, "--dry_run", *flags)
    assert ("the feature loss ends at step 10, before the learning rate" in capfd.readouterr().out) == is_told


# ---- a preset's teacher and form of the images are its data's


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        (STUDENT, ["--dataset", "photos"], "trained on digits, not on photos"),
        (STUDENT, ["--preset", "cifar10", "--dataset", "x/birds", "--teacher", "stable-diffusion-1"], None),
        (TEACHER, ["--dataset", "photos"], "photos becomes 8 x 8 pixels in grey"),
        (TEACHER, ["--dataset", "photos", "--resolution", 32], None),
        (TEACHER, ["--preset", "cifar10", "--dataset", "copies/cifar10"], None),
    ],
)
def test_other_data_than_the_presets_are_told_of(name, flags, words, run_recipe, capfd):
    run_recipe(name, "--dry_run", *flags)
    notes = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (words is not None)
    assert words is None or (words in notes[0] and "--preset custom" in notes[0])


def test_a_teacher_that_is_still_to_be_trained(run_recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "recipes/train_teacher_unet.py --preset cifar10 makes it" in refused(
        capfd, run_recipe, STUDENT, "--preset", "cifar10"
    )


# ---- the extractor is the data's


@pytest.mark.parametrize(
    ("name", "flags", "extractor", "is_told"),
    [
        (STUDENT, [], "recipes/assets/digits-features.safetensors", False),
        (TEACHER, ["--preset", "mnist"], "recipes/assets/mnist-features.safetensors", False),
        (STUDENT, ["--preset", "mnist", "--dataset", "digits"], "recipes/assets/digits-features.safetensors", False),
        (TEACHER, ["--dataset", "mnist"], "recipes/assets/mnist-features.safetensors", False),
        (STUDENT, ["--dataset", "photos/digits"], "none", True),
        (TEACHER, ["--preset", "mnist", "--dataset", "uoft-cs/cifar10"], "none", True),
        (STUDENT, ["--dataset", "x/y", "--extractor", "inception"], "inception", False),
        (STUDENT, ["--dataset", "x/y", "--extractor", "none"], "none", False),
        (STUDENT, ["--preset", "cifar10"], "none", False),
    ],
)
def test_the_extractor_goes_with_the_data(name, flags, extractor, is_told, monkeypatch, caplog):
    assert parse(monkeypatch, name, *flags).scores.extractor == extractor
    assert ("samples are not scored" in caplog.text) == is_told


def test_the_default_preset_on_other_data_gives_no_scores_in_digit_features(
    photos, pipeline_folder, tmp_path, run_recipe, caplog
):
    run = tmp_path / "run"
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--method", "output"]
    run_recipe(STUDENT, *flags, "--dataset", photos, "--output_dir", run)
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert not [name for row in rows.values() for name in row if "digits" in name or name.startswith("fid")]
    assert f"no extractor here was trained on {photos}" in caplog.text


@pytest.mark.parametrize(
    ("data", "is_told"), [("digits", False), ("copies/digits", False), ("mnist", True), ("uoft-cs/cifar10@main", True)]
)
def test_features_of_other_data_are_told(data, is_told, caplog):
    extractor = load_extractor("recipes/assets/digits-features.safetensors")
    note_foreign_features(extractor, data)
    assert ("were trained on digits, not on" in caplog.text) == is_told


def test_an_extractor_that_is_named_is_never_exchanged():
    options = ScoreOptions(extractor="recipes/assets/digits-features.safetensors")
    assert choose_extractor(options, "x/y") is options


# ---- a teacher and a feature network of one's own


def test_a_teacher_of_ones_own_bears_the_datas_name(photos, tmp_path, run_recipe, capfd):
    run = tmp_path / "run"
    flags = [*SHORT, "--preset", "custom", "--dataset", photos, "--resolution", 8, "--channels", 1]
    flags += ["--block_out_channels", 8, 16, "--attention_stages", "--norm_num_groups", 4]
    run_recipe(TEACHER, *flags, "--dataloader_num_workers", 0, "--output_dir", run)
    shown, card = capfd.readouterr().out, (run / "pipeline" / "README.md").read_text()
    assert "my-photos: a UNet of" in shown
    assert "# my-photos teacher" in card
    assert "digits" not in card.replace("--preset digits", "") + shown


@pytest.fixture
def classes(tmp_path):
    """A folder of colour images of three classes."""
    for name in ("cat", "dog", "eel"):
        images_in(tmp_path / "my pets" / name, 12, mode="RGB")
    return tmp_path / "my pets"


def as_table(classes, tmp_path):
    """The same images as a parquet file whose columns have names of their own."""
    datasets = importlib.import_module("datasets")
    files = sorted(classes.rglob("*.png"))
    columns = {"photo": list(map(str, files)), "kind": [["cat", "dog", "eel"].index(f.parent.name) for f in files]}
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "pets.parquet")
    return tmp_path / "pets.parquet", "--label_column", "kind", "--image_column", "photo"


@pytest.mark.parametrize(
    ("source", "flags", "channels", "name"),
    [
        (lambda folder, _: [folder], ["--channels", 1], 1, "my-pets"),
        (as_table, ["--resolution", 16], 3, "pets-parquet"),
    ],
    ids=["grey", "table"],
)
def test_a_feature_network_of_ones_own_classes(source, flags, channels, name, classes, tmp_path, run_recipe, capfd):
    output = tmp_path / "pets.safetensors"
    given = ["--preset", "default", "--dataset", *source(classes, tmp_path), "--num_epochs", 1, "--output", output]
    run_recipe("train_feature_network", *given, *flags)
    assert "30 images of 3 classes, 6 held out" in capfd.readouterr().out
    extractor = load_extractor(str(output))
    assert (extractor.name, extractor.network.channels, extractor.network.head.out_features) == (name, channels, 3)
    assert extractor(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).keys() == {"features", "logits"}


@pytest.mark.slow
def test_the_digits_network_is_made_as_it_was(tmp_path, run_recipe):
    output = tmp_path / "digits.safetensors"
    run_recipe("train_feature_network", "--preset", "default", "--output", output)
    made, committed = (
        safe_open(path, "pt").metadata() for path in (output, "recipes/assets/digits-features.safetensors")
    )
    shares = [float(facts.pop("held_out_accuracy")) for facts in (made, committed)]
    assert made == committed
    assert shares[0] == pytest.approx(shares[1], abs=0.01)  # sums are rounded otherwise on another machine


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "features.pt"], "must end in .safetensors"),
        (["--output", "a.safetensors"], "a.safetensors is a folder; name a file"),
        (["--output", "file/a.safetensors"], "file/a.safetensors cannot be written: file is a file"),
        (["--dataset", "no/where/at/all"], "there is no folder or file no/where/at/all"),
        (["--dataset", "inception-crops"], "is another network's name"),
        (["--num_epochs", 0], "--num_epochs must be at least 1"),
    ],
)
def test_a_feature_network_that_cannot_be(flags, words, tmp_path, monkeypatch, run_recipe, capfd):
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").mkdir()
    Path("file").touch()
    assert words in refused(capfd, run_recipe, "train_feature_network", "--preset", "default", *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "file"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("uoft-cs/cifar10@main", "cifar10"),
        ("a b/c d/", "c-d"),
        ("x/$\\frac$<b>", "frac-b"),
        ("/", "images"),
    ],
)
def test_names_of_data_are_plain(source, name):
    assert data_label(source) == name


# ---- comparisons of one's own


@pytest.mark.parametrize(
    ("flags", "folder", "results", "figures"),
    [
        ([], "runs/screen", "experiments/results/screen.json", "experiments/results"),
        (["--num_seeds", 5, "--seed", 9], "runs/screen", "experiments/results/screen.json", "runs/screen"),
        (["--dataset", "my/birds"], "runs/screen-birds", "runs/screen-birds/results.json", "runs/screen-birds"),
        (["--preset", "mnist", "--teacher", "a/b"], "runs/mnist-b", "runs/mnist-b/results.json", "runs/mnist-b"),
        (["--extra", "dataset x"], "runs/screen", "runs/screen/results.json", "runs/screen"),
        (["--dataset", "x", "--output_dir", "o"], "o", "o/results.json", "o"),
        (["--dataset", "x", "--results", "r.json", "--figures", "f"], "runs/screen-x", "r.json", "f"),
    ],
)
def test_committed_results_hold_the_presets_comparisons_alone(flags, folder, results, figures, monkeypatch):
    config = parse_comparison(monkeypatch, *flags)
    found = (config.runs_folder, config.results_file, config.figures_folder)
    assert tuple(map(str, found)) == (folder, results, figures)


def test_a_comparison_hands_on_teacher_and_data(monkeypatch):
    config = parse_comparison(monkeypatch, "--student_preset", "custom", "--teacher", "a/b", "--dataset", "my birds")
    for run in planning.plan(config):
        assert run.flags.startswith("--preset custom --num_score_samples 500 --teacher a/b --dataset 'my birds' ")
    command = planning.command_of(planning.plan(config)[0], knows_teacher=False)
    monkeypatch.setattr(sys, "argv", command[1:])
    student = load_recipe(STUDENT)
    parsed = complete(parse_command_line(student.PRESETS, "", "digits", student.METHODS))
    assert (parsed.teacher, parsed.data.dataset, parsed.scores.extractor) == ("a/b", "my birds", "none")


@pytest.mark.parametrize(
    ("flags", "is_told"),
    [
        (["--dataset", "x/birds"], True),
        (["--dataset", "digits"], False),
        (["--dataset", "x/birds", "--teacher", "a/b"], False),
        (["--dataset", "x/birds", "--extra", "teacher a/b"], False),
    ],
)
def test_a_comparison_says_that_its_teacher_is_of_other_data(flags, is_told, monkeypatch, capsys):
    compare_methods.main(parse_comparison(monkeypatch, "--dry_run", "--arms", "output", *flags))
    assert ("was not trained on x/birds" in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--student_preset", "custom"], "--student_preset custom needs --teacher and --dataset"),
        (["--student_preset", "custom", "--dataset", "x"], "--student_preset custom needs --teacher and --dataset"),
        (["--student_preset", "birds"], "birds"),
        (["--extra", "teacher it's"], "cannot be read as a shell would: No closing quotation"),
    ],
)
def test_a_comparison_that_cannot_be(flags, words, monkeypatch, capfd):
    assert words in refused(capfd, parse_comparison, monkeypatch, *flags)
