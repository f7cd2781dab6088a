"""What someone meets who has just installed this: commands answer at once, from anywhere, and say what they do."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from accelerate.utils import LoggerType

from tests.recipes.conftest import SHORT_STUDENT, recipe_runner
from vkd_gen.evaluation.labels import label_of
from vkd_gen.evaluation.tables import print_table

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("recipes/*.py"), *ROOT.glob("eval/*.py")))
HEAVY = ("torch", "diffusers", "accelerate", "transformers", "datasets", "matplotlib", "sklearn")

PARSE_ALL = """
import contextlib, io, os, runpy, sys
for command in sys.argv[1:]:
    for flags in (["--help"], ["--nonsense"]):
        sys.argv = [command, *flags]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_path(command, run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
        print(command, *flags, status, *(name for name in %r if name in sys.modules))
"""


def test_flags_are_read_before_anything_heavy_is_loaded():
    """One line for each command and flag: its exit status, and the heavy packages that are loaded by then: none."""
    command = [sys.executable, "-c", PARSE_ALL % (HEAVY,), *COMMANDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    flags = (("--help", 0), ("--nonsense", 2))
    assert done.stdout.splitlines() == [f"{name} {flag} {status}" for name in COMMANDS for flag, status in flags]


# ---- from another working directory


DIGITS = "recipes/assets/digits-teacher"
FEATURES = ("--extractor", "recipes/assets/digits-features.safetensors")
FEW = ("--num_score_samples", 12, "--kid_subset_size", 10, "--num_inference_steps", 1)


@pytest.mark.parametrize(
    ("command", "flags", "shown"),
    [
        ("cost", (f"{DIGITS}/unet/config.json",), "901,121"),
        ("score", (DIGITS, "--reference", "digits", *FEATURES, *FEW), "report: scores/report.html"),
        ("generate", (DIGITS, "--output", "made", "--num_images", 1, "--num_inference_steps", 1), "1 images: made"),
    ],
)
def test_what_the_repository_carries_is_found_from_elsewhere(
    run_eval, command, flags, shown, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run_eval(command, *flags)
    assert shown in re.sub(r"[\s\u2500-\u257f]+", " ", capsys.readouterr().out)


def test_what_lies_here_goes_before_what_the_repository_carries(run_eval, pipeline_folder, monkeypatch, capsys):
    here = pipeline_folder.parent / DIGITS
    here.parent.mkdir(parents=True)
    pipeline_folder.rename(here)
    monkeypatch.chdir(pipeline_folder.parent)
    run_eval("cost", DIGITS)
    assert "901,121" not in capsys.readouterr().out


def test_a_runs_folder_is_a_teacher(run_recipe, pipeline_folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"output_dir": "run", "max_train_steps": 9, "train_batch_size": 1}')
    pipeline_folder.rename(run / "pipeline")
    run_recipe("train_student_unet", "--teacher", run, "--dry_run")
    assert f"(from {run / 'pipeline' / 'scheduler'})" in capsys.readouterr().out


# ---- the first line


def test_the_first_line_says_what_is_done(monkeypatch, tmp_path, capsys):
    run = recipe_runner(monkeypatch, tmp_path)
    run("train_student_unet", "--dry_run")
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(
        r"vkd-gen \S+: distilling recipes/assets/digits-teacher on digits, what would be trained", first
    )
    with pytest.raises(SystemExit):
        run("train_student_unet", "--output_dir", "runs/x", "--teacher", tmp_path / "none")
    assert f"distilling {tmp_path}/none on digits, into runs/x" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):  # of several, it is alone
        run("train_teacher_unet", "--dry_run")
    assert "vkd-gen" not in capsys.readouterr().out


# ---- the table


@pytest.mark.parametrize("width", [80, 81, 120, 200])
def test_tables_have_whole_words_at_any_width(width, monkeypatch):
    columns = "parameters macs ms_per_image fid_digits inception_score_digits kid_digits precision_digits recall_digits"
    columns += " nearer_to_training_digits denoising_error teacher_distance"
    row = {name: 35_746_307 if name in ("parameters", "macs") else 1234.5 for name in columns.split()}
    names = ["teacher", "held-out images", "a/long/path/" * 20, "lr[bold]x"]
    monkeypatch.setenv("COLUMNS", str(width))
    with redirect_stdout(io.StringIO()) as shown:
        print_table({"rows": dict.fromkeys(names, row)})
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = re.split(r"[\s\u2500-\u257f]+", shown.getvalue())
    assert {word for name in columns.split() for word in label_of(name).split()} <= set(words)
    assert {"35,746,307", "1234.50", "1234.5000", "teacher", "held-out", "images", "lr[bold]x"} <= set(words)
    assert "…" not in shown.getvalue()
    assert "".join(words).count("/long/path/") >= 1


# ---- a finished run that is started again


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a finished run, and a function that starts it again with further flags."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        run = recipe_runner(patch, folder)

        def start(*flags):
            run("train_student_unet", *QUICK, "--output_dir", folder / "run", *RESUME, *flags)

        start()
        yield folder / "run", start


QUICK = (*SHORT_STUDENT, "--method", "output", "--no-inherit_weights", "--no-score_teacher")
RESUME = ("--resume_from_checkpoint", "latest")


def cost_in(folder):
    (line,) = [line for line in (folder / "pipeline/README.md").read_text().splitlines() if "| training |" in line]
    return line


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_finished_run_shows_its_table_at_once(finished, monkeypatch, capsys):
    folder, start = finished
    before = stamps(folder)
    monkeypatch.setattr("vkd_gen.evaluation.scorer.sample_scores", None)
    monkeypatch.setattr("vkd_gen.training.loop.Loop.backward", None)
    start()
    shown = capsys.readouterr().out
    assert f"{folder} is finished: 2 steps, exported and scored" in shown
    assert "parameters" in shown
    assert "226,817" in shown
    assert stamps(folder) == before


def test_a_finished_run_of_another_teacher_is_another_run(finished, pipeline_folder, capsys):
    _, start = finished
    with pytest.raises(SystemExit) as status:
        start("--teacher", pipeline_folder)
    shown = capsys.readouterr()
    assert (status.value.code, "is finished" in shown.out) == (2, False)
    assert "is of another run: " in shown.err


@pytest.mark.parametrize(
    "change", ["flag", *(pytest.param(name, marks=pytest.mark.slow) for name in ("results", "pipeline"))]
)
def test_what_is_left_to_do_is_done_and_the_cost_stays(finished, change, capsys):
    folder, start = finished
    before = cost_in(folder)
    assert re.search(r"\| 2 steps in \d+\.\d minutes on 1 x CPU", before)
    if change == "results":
        (folder / "results.json").write_text("[")
    if change == "pipeline":
        next(folder.glob("pipeline/unet/*.safetensors")).unlink()
    start(*(("--num_score_samples", 14) if change == "flag" else ()))
    assert "is finished" not in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["protocol"]["num_images"] == (
        14 if change == "flag" else 12
    )
    assert cost_in(folder) == before
    start(*(("--num_score_samples", 14) if change == "flag" else ()))
    assert "is finished" in capsys.readouterr().out


# ---- trackers


def test_a_tracker_that_is_not_there_is_named_with_what_installs_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(SystemExit) as exit_status:
        recipe_runner(monkeypatch, tmp_path)("train_student_unet", "--report_to", "wandb", "--output_dir", tmp_path)
    assert exit_status.value.code == 2
    error = "error: --report_to wandb: that tracker is not installed; pip install wandb\n"
    assert capsys.readouterr().err == error


def test_wandb_writes_into_the_folder_of_the_run(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(
        sys.modules, "wandb", mock.MagicMock(init=lambda **given: asked.append(given) or mock.MagicMock())
    )
    monkeypatch.setattr("vkd_gen.training.loop.Loop.__iter__", lambda run: sys.exit(0))
    flags = (*QUICK, "--report_to", "wandb", "--output_dir", tmp_path / "run")
    with pytest.raises(SystemExit):
        recipe_runner(monkeypatch, tmp_path)("train_student_unet", *flags)
    assert [given["dir"] for given in asked] == [str(tmp_path / "run")]
