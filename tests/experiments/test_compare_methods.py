"""The comparison of methods: what it runs, keeps, skips and resumes, and its tables; stand-ins take the runs' place."""

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

import compare_methods
import figures
import plan as planning
import records as records_module
import side_by_side
from arms import ARMS, BY_MUON, Arm
from plan import PRESETS, plan
from records import RunRecords, read_run, training_speed
from tests.recipes.conftest import load_recipe
from time_to_quality import TIME_PRESETS
from vkd_gen.cli import parse_command_line, run_recipe
from vkd_gen.training.methods import METHODS
from vkd_gen.training.options import complete

DRAW = figures.draw_differences
SCREEN = PRESETS["screen"]

STAND_IN = """
import json, os, sys, time, signal, zlib
folder, *flags = sys.argv[1:]
value = lambda name: flags[flags.index(name) + 1]
note = lambda name, text="": open(os.path.join(folder, name), "a").write(text + "\\n")
note("starts", os.environ["OMP_NUM_THREADS"] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
wanted = os.environ.get("STAND_IN", "")
if wanted and wanted in folder:
    does = os.environ["STAND_IN_DOES"]
    if does == "fail":
        print("first line\\nerror: it broke\\nlast line", flush=True)
        sys.exit(2)
    if does == "crash":
        os.kill(os.getpid(), 9)
    if does == "half":
        sys.exit(0)
    if not os.path.exists(os.path.join(folder, "checkpoint")):
        signal.signal(signal.SIGTERM, lambda *_: (note("checkpoint"), sys.exit(143)))
        note("waits")
        while True:
            time.sleep(0.01)
number = zlib.crc32(" ".join(flags).encode()) / 2**32
student = {"teacher_distance": 0.01 + 0.01 * number, "fid_digits": 10 + number, "fid_training_digits": 1.0}
rows = {"teacher": {"fid_digits": 6.0, "teacher_distance": 0.0}, "student": student, "held-out images": {}}
for name, content in {
    "results.json": {"rows": rows, "protocol": {"sampler": "none", "environment": {}}},
    "config.json": {"method": value("--method"), "train_batch_size": 8, "feature_weight": 0.5},
    "environment.json": {"commit": "abc"},
}.items():
    open(os.path.join(folder, name), "w").write(json.dumps(content))
note("metrics.jsonl", json.dumps({"step": 2, "loss/denoising": 0.5, "loss/total": 0.75, "images_per_second": 4.0}))
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Run the comparison in this process with stand-ins for its runs; gives the names of the runs that were started."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    asked = []

    def command_of(run, *, knows_teacher):
        asked.append((run.name, knows_teacher))
        return [sys.executable, "-S", "-E", str(script), str(run.folder), *shlex.split(run.flags)]

    monkeypatch.setattr(planning, "command_of", command_of)
    monkeypatch.setattr(figures, "draw_differences", lambda *_: None)  # it takes most of the time
    monkeypatch.setattr(records_module, "environment", dict)
    monkeypatch.setattr(side_by_side, "SECONDS_BETWEEN_POLLS", 0.01)
    output_dir, results, pictures = tmp_path / "runs", tmp_path / "out/results.json", tmp_path / "f"
    places = ["--output_dir", output_dir, "--results", results, "--figures", pictures]

    def run(*flags):
        asked.clear()
        given = ["--preset", "screen", *places, "--arms", "denoising", "output", "fitnet", "--jobs", 2, *flags]
        monkeypatch.setattr(sys, "argv", ["experiments/compare_methods.py", *map(str, given)])
        run_recipe(compare_methods.main, PRESETS, compare_methods.__doc__, default="screen")
        return [name for name, _ in asked]

    run.asked, run.results, run.output_dir, run.figures = asked, results, output_dir, pictures
    return run


def records(compare):
    return json.loads(compare.results.read_text())["runs"]


def names(compare):
    return sorted((record["arm"], record["start"], record["seed"]) for record in records(compare))


def table(compare):
    return (compare.output_dir / "table.md").read_text()


def refused(compare, *flags):
    """Run what ends with status 2."""
    with pytest.raises(SystemExit) as exit_status:
        compare(*flags)
    assert exit_status.value.code == 2


# ---- what is run


def test_every_preset_can_be_planned_and_every_arm_is_compared():
    for name, config in PRESETS.items():
        runs = plan(config)
        assert config.preset == name
        assert len(runs) == len(config.arms) * len(config.starts) * config.num_seeds
        assert len({run.flags for run in runs}) == len({run.folder for run in runs}) == len(runs)
    assert {arm for config in (*PRESETS.values(), *TIME_PRESETS.values()) for arm in config.arms} == set(ARMS)


def test_runs_of_a_seed_differ_in_their_arm_alone():
    runs = {run.arm: run for run in plan(replace(SCREEN, num_seeds=1))}
    for name, run in runs.items():
        common = run.flags.replace(shlex.join(ARMS[name].flags), "ARM")
        expected = runs["output"].flags.replace(shlex.join(ARMS["output"].flags), "ARM")
        assert common == expected.replace("--max_train_steps 1000", f"--max_train_steps {run.steps}")
    assert runs["denoising-longer"].steps == 2500


def test_an_arm_may_have_a_learning_rate_of_its_own(monkeypatch):
    config = replace(SCREEN, arms=("output",), num_seeds=1, learning_rate=2e-3)
    (same,) = plan(config)
    monkeypatch.setitem(ARMS, "output", replace(ARMS["output"], rate_factor=0.7))
    (own,) = plan(config)
    assert own.flags == same.flags.replace("--learning_rate 0.002", "--learning_rate 0.0014") != same.flags
    with pytest.raises(ValueError, match="arm output has a multiple of the others' learning rate: give --learning_"):
        replace(config, learning_rate=None)


@pytest.mark.parametrize("arm", ARMS)
def test_train_student_unet_understands_every_arm(arm, monkeypatch):
    recipe = load_recipe("train_student_unet")
    more = {"learning_rate": 1e-3, "extra": ("calibration_samples 300",)}
    config = replace(SCREEN, arms=(arm,), control=arm, num_seeds=1, **more)
    command = planning.command_of(plan(config)[0], knows_teacher=False)
    monkeypatch.setattr(sys, "argv", command[1:])
    parsed = complete(parse_command_line(recipe.PRESETS, "", "digits", METHODS))
    matching = parsed.matching
    assert (matching.calibration_samples, parsed.training.train_batch_size) == (300, 32)
    assert matching.method == ARMS[arm].flags[1]
    assert (matching.feature_weight > 0) == (not arm.startswith(("denoising", "output", "muon-output")))
    assert (matching.denoising_weight > 0) == (not (arm.endswith(("-no-denoising", "-alone")) or "muon" in arm))
    assert (parsed.training.optimizer == "muon") == (arm in BY_MUON)


def test_runs_go_seed_by_seed_the_longest_first_and_score_the_teacher_once(compare):
    flags = ("--arms", "denoising", "denoising-longer", "output", "--jobs", 1)
    assert compare(*flags) == [
        f"{arm}, inherited, seed {seed}" for seed in (0, 1) for arm in ("denoising-longer", "denoising", "output")
    ]
    assert [known for _, known in compare.asked] == [False] + 5 * [True]
    compare(*flags, "--num_score_samples", 400, "--num_seeds", 1)  # another protocol
    assert [known for _, known in compare.asked] == [False, True, True]


@pytest.mark.parametrize(
    ("num_gpus", "visible", "num_jobs", "variable", "expected"),
    [
        (0, "", None, "OMP_NUM_THREADS", ["1"] * 8),
        (0, "", 3, "MKL_NUM_THREADS", ["2"] * 3),
        (0, "", 20, "OMP_NUM_THREADS", ["1"] * 20),
        (2, "", None, "CUDA_VISIBLE_DEVICES", ["0", "1"]),
        (2, "4,6", 3, "CUDA_VISIBLE_DEVICES", ["4", "6", "4"]),
    ],
)
def test_cores_and_gpus_are_shared_out(num_gpus, visible, num_jobs, variable, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert [place[variable] for place in side_by_side.places(num_jobs)] == expected


# ---- what is kept


def test_what_is_done_is_not_done_again_and_the_table_stays_byte_for_byte(compare, capsys):
    flags = ("--starts", "inherited", "random", "--num_seeds", 1)
    assert len(compare(*flags)) == 6
    shown = capsys.readouterr().out.split("Scores, inherited")[1]
    page, file = table(compare), compare.results.read_bytes()
    for path in sorted(compare.output_dir.glob("*/*/*")):
        path.unlink()  # also without the folders of the runs
    assert compare(*flags) == []
    assert (table(compare), compare.results.read_bytes()) == (page, file)
    assert capsys.readouterr().out.split("Scores, inherited")[1] == shown


def test_a_record_tells_what_the_run_was(compare):
    compare("--num_seeds", 1, "--extra", "calibration_samples 300", "--learning_rate", 0.5)
    record = next(record for record in records(compare) if record["arm"] == "output")
    expected = "--preset digits --num_score_samples 500 --kid_subset_size 250 --method output --denoising_weight 1"
    expected += " --optimizer adamw --timestep_sampling random --lr_scheduler cosine --inherit_samples 256"
    expected += " --inherit_weights --seed 0 --max_train_steps 1000"
    expected += " --train_batch_size 32 --learning_rate 0.5"
    assert record["flags"] == expected + " --calibration_samples 300"
    assert (record["start"], record["seed"], record["steps"], record["commit"]) == ("inherited", 0, 1000, "abc")
    assert record["settings"] == {"method": "output", "feature_weight": 0.5}
    assert (record["training_seconds"], record["images_per_second"]) == (4.0, 4.0)  # 2 steps of 8 images, 4 a second
    assert 0.01 <= record["student"]["teacher_distance"] <= 0.02
    assert record["threads"] >= 1
    assert record["seconds"] > 0
    reference = json.loads(compare.results.read_text())["references"][record["reference"]]
    assert reference["rows"] == {"teacher": {"fid_digits": 6.0, "teacher_distance": 0.0}, "held-out images": {}}


def test_other_flags_add_runs_and_another_name_does_not(compare, monkeypatch):
    assert len(compare("--num_seeds", 1)) == 3
    assert len(compare("--seed", 0, "--num_seeds", 2)) == 3  # the second seed
    assert len(compare("--num_seeds", 1, "--max_train_steps", 5)) == 3
    monkeypatch.setitem(ARMS, "free", ARMS["fitnet"])
    assert compare("--num_seeds", 1, "--arms", "free", "output") == []
    assert "| free | 1 of 1 |" in table(compare)
    monkeypatch.setitem(ARMS, "fitnet", Arm(("--method", "fitnet", "--feature_weight", "2"), ""))
    assert compare("--num_seeds", 1) == ["fitnet, inherited, seed 0"]
    assert len(records(compare)) == 10  # none overwritten
    assert "| fitnet | 1 of 1 |" in table(compare)
    assert len({path.name for path in (compare.output_dir / "inherited").iterdir()}) == 10


def test_finished_comparisons_are_found_from_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "--preset", "screen", "--dry_run"])
    run_recipe(compare_methods.main, PRESETS, "", default="screen")
    assert "44 runs, 44 of them done" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ---- failures and interruptions


FAILURES = {
    "fail": "status 2: error: it broke",
    "crash": "status -9: nothing in its log",
    "half": "no results.json",
}
"""What a stand-in does -> what is told of it."""


def test_a_run_that_fails_is_told_and_the_others_are_kept(compare, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "fitnet-seed-1")
    for does, words in FAILURES.items():  # of which only the last is told
        monkeypatch.setenv("STAND_IN_DOES", does)
        refused(compare)
        shown = capfd.readouterr()
        assert shown.err.splitlines() == [
            "error: 1 of 6 runs failed; the same command tries again: fitnet, inherited, seed 1"
        ]
        told = shown.out.split("failed: ")[-1]
        assert words in told
        assert "log.txt" in told
        assert len(names(compare)) == 5
        assert ("fitnet", "inherited", 1) not in names(compare)
        assert "| fitnet | 1 of 2 |" in table(compare)
    monkeypatch.delenv("STAND_IN")
    assert compare() == ["fitnet, inherited, seed 1"]
    assert "| fitnet | 2 of 2 |" in table(compare)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_and_resumed(number, status, compare, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "fitnet")
    monkeypatch.setenv("STAND_IN_DOES", "wait")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

    def interrupt():
        until = time.monotonic() + 20
        waiting, kept = compare.output_dir.glob, compare.output_dir.parent / "out/results.json"
        while time.monotonic() < until and not (kept.exists() and len(list(waiting("*/*/waits"))) == 2):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as exit_status:
        compare("--arms", "output", "fitnet", "--jobs", 3)
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert exit_status.value.code == status
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search("interrupted: [12] of 4 runs are done and kept; the same command goes on", line)
    stopped = sorted(path.parent for path in compare.output_dir.glob("*/*/checkpoint"))
    assert len(stopped) == 2  # the children were asked to stop, and did
    first = records(compare)

    resumed = compare("--arms", "output", "fitnet", "--jobs", 3)
    assert {name for name in resumed if name.startswith("fitnet")} == {f"fitnet, inherited, seed {s}" for s in (0, 1)}
    assert len(names(compare)) == 4
    assert all(record in records(compare) for record in first)
    for folder in stopped:  # in the same folders, and both times count
        assert len((folder / "starts").read_text().splitlines()) == 2
        first_part, second_part = json.loads((folder / "seconds.json").read_text())
        total = pytest.approx(first_part + second_part, abs=0.011)
        assert total in [record["seconds"] for record in records(compare)]


def test_runs_are_told_to_go_on_from_their_checkpoint_and_whether_to_score_the_teacher():
    run = plan(SCREEN)[0]
    known, unknown = (planning.command_of(run, knows_teacher=value) for value in (True, False))
    assert known == [*unknown, "--no-score_teacher"]
    assert known[known.index("--resume_from_checkpoint") + 1] == "latest"
    assert known[known.index("--output_dir") + 1] == str(run.folder)


def test_no_room_ends_in_one_line_and_no_run_is_left_running(compare, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "fitnet")
    monkeypatch.setenv("STAND_IN_DOES", "wait")
    monkeypatch.setattr(RunRecords, "add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    refused(compare, "--num_seeds", 1)
    assert capfd.readouterr().err.splitlines() == ["error: [Errno 28] No space left"]
    waiting = list(compare.output_dir.glob("*/*/waits"))
    assert all((path.parent / "checkpoint").exists() for path in waiting)


def test_a_folder_belongs_to_one_comparison(compare, monkeypatch, capfd):
    def held(folder):
        raise ValueError(f"another process is writing to {folder}")

    monkeypatch.setattr(compare_methods, "hold_folder", held)
    refused(compare)
    assert f"another process is writing to {compare.output_dir}" in capfd.readouterr().err
    assert not compare.asked


# ---- mistakes

MISTAKES = {
    "unknown arm": (["--arms", "output", "solved-row"], "no arm 'solved-row'; the nearest are solved-raw, "),
    "unknown control": (["--control", "outptu"], "no arm 'outptu'; the nearest are output"),
    "control not compared": (["--control", "solved-raw"], "solved-raw is not among the arms: denoising, output"),
    "no arms": (["--arms"], "arms"),
    "arm twice": (["--arms", "output", "output"], "--arms must name at least one, and none twice"),
    "unknown start": (["--starts", "inherit"], "starts.*inherited"),
    "no seeds": (["--num_seeds", 0], "--num_seeds must be at least 1, not 0"),
    "few samples": (["--num_score_samples", 3], "--num_score_samples must be at least 10"),
    "learning rate": (["--learning_rate", "nan"], "--learning_rate must be above 0"),
    "empty extra": (["--extra", " "], "--extra takes flags.*empty"),
    "own flag": (["--extra", "seed 3"], "--extra takes flags.*seed is this command's own"),
    "open quote": (["--extra", "teacher 'x"], "quotation"),
    "output a file": (["--output_dir", __file__], "test_compare_methods.py"),
    "results a folder": (["--results", os.path.dirname(__file__)], "cannot read the results in"),
    "preset": (["--preset", "scren"], "no preset 'scren'.*screen"),
}


@pytest.mark.parametrize(("flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_told_in_one_line(flags, words, compare, capfd):
    refused(compare, *flags)
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.search(words, errors[0]), errors[0]
    assert not compare.output_dir.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "is not a file of this command's results"),
        (b'{"format": "vkd-gen comparison of methods, 1", "runs": [{"flags": 3}]}', "is damaged"),
        (b"\xff\xfe", "cannot read the results in .*results.json"),
    ],
)
def test_results_that_are_not_ours_or_damaged_are_left_alone(content, words, compare, capfd):
    compare.results.parent.mkdir()
    compare.results.write_bytes(content)
    refused(compare)
    assert re.search(words, capfd.readouterr().err)
    assert compare.results.read_bytes() == content


def test_results_that_cannot_be_written_are_told_before_anything_runs(compare, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    refused(compare, "--results", tmp_path / "file" / "results.json")
    assert "file" in capfd.readouterr().err
    assert not list(compare.output_dir.glob("*/*"))


# ---- what is shown


def test_a_dry_run_prints_the_plan_and_writes_nothing(compare, capsys):
    compare("--num_seeds", 1)
    before = sorted(compare.output_dir.rglob("*"))
    compare("--dry_run")
    shown = capsys.readouterr().out
    for words in (
        "done: fitnet, inherited, seed 0",
        "to do: fitnet, inherited, seed 1",
        "6 runs, 3 of them done; 2 side by side",
        "--method output --denoising_weight 1 --optimizer adamw --timestep_sampling random "
        "--lr_scheduler cosine --inherit_samples 256 --inherit_weights --seed 1",
    ):
        assert words in shown
    assert sorted(compare.output_dir.rglob("*")) == before


def test_table_and_figure_are_of_the_runs_asked_for(compare, monkeypatch):
    compare()
    monkeypatch.setattr(figures, "draw_differences", DRAW)
    compare("--arms", "output", "fitnet", "--num_seeds", 1)
    assert "denoising |" not in table(compare)
    assert "| fitnet | 1 of 1 |" in table(compare)
    found = {record["arm"]: record["student"] for record in records(compare) if record["seed"] == 0}
    difference = found["fitnet"]["fid_digits"] - found["output"]["fid_digits"]
    assert f"| {difference:+.2f} ({int(difference < 0)}/1) |" in table(compare)
    assert (compare.figures / "screen.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_a_changed_comparison_lies_beside_its_runs():
    preset = PRESETS["mnist"]
    same = replace(preset, jobs=1, output_dir="elsewhere", dry_run=True)
    assert same.figures_folder == preset.results_file.parent
    changes = ({"num_seeds": 6}, {"arms": preset.arms[:3]}, {"extra": ()}, {"control": "denoising"}, {"results": "x"})
    for change in changes:
        assert replace(preset, **change).figures_folder == preset.runs_folder


# ---- records


def test_speed_counts_every_step_once():
    metrics = [{"step": 10, "images_per_second": 5.0}, {"step": 10}, {"step": 30, "images_per_second": 20.0}]
    assert training_speed(metrics, batch_size=4) == (8 + 4, 10.0)
    assert training_speed([], batch_size=4) == (0.0, None)


def test_diagnostics_are_kept_as_they_were_last(tmp_path):
    lines = [{"step": 1, "diagnostics/gain": 1.0, "diagnostics/rank": 3.0}, {"step": 2, "diagnostics/gain": 1 / 3}]
    for name, text in {
        "results.json": '{"rows": {"student": {"x": 1}}, "protocol": {}}',
        "config.json": "{}",
        "environment.json": '{"commit": "abc"}',
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
    }.items():
        (tmp_path / name).write_text(text)
    record, reference = read_run(tmp_path)
    assert record["diagnostics"] == {"diagnostics/gain": 0.333333, "diagnostics/rank": 3.0}
    assert reference is None
    (tmp_path / "config.json").write_text('{"extractor": "none"}')  # then the teacher has all that it can have
    assert read_run(tmp_path)[1] == {"rows": {}, "protocol": {}}
    (tmp_path / "environment.json").unlink()
    with pytest.raises(ValueError, match="does not hold a whole run"):
        read_run(tmp_path)


def test_a_run_made_again_takes_the_place_of_its_record(tmp_path):
    known = RunRecords(tmp_path / "results.json")
    head = {"flags": "--x", "arm": "a", "start": "random", "seed": 0, "steps": 1, "seconds": 1.0, "reference": "r"}
    for score in (1.0, 2.0):
        known.add({**head, "student": {"x": score}}, {"rows": {"score": score}})
    again = RunRecords(tmp_path / "results.json")
    assert [record["student"] for record in again.runs] == [{"x": 2.0}]
    assert again.references == {"r": {"rows": {"score": 1.0}}}


@pytest.mark.slow
def test_real_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("VKD_GEN_CACHE", str(tmp_path / "cache"))
    extra = ["kid_subset_size 10", "num_inference_steps 2", "calibration_samples 192", "inherit_samples 16"]
    flags = ["--arms", "output", "solved-raw", "--num_seeds", 2, "--max_train_steps", 2, "--train_batch_size", 4]
    flags += ["--num_score_samples", 12, "--jobs", 2, "--extra", *extra]
    flags += ["--output_dir", tmp_path / "runs", "--results", tmp_path / "results.json", "--figures", tmp_path]
    monkeypatch.setattr(sys, "argv", ["experiments/compare_methods.py", "--preset", "screen", *map(str, flags)])
    run_recipe(compare_methods.main, PRESETS, compare_methods.__doc__, default="screen")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 4
    assert all(record["student"]["teacher_distance"] > 0 for record in runs)
    assert "| solved-raw | 2 of 2 |" in (tmp_path / "runs/table.md").read_text()
    assert (tmp_path / "screen.png").exists()
    assert "of 4: solved-raw, inherited, seed 0" in capfd.readouterr().out
