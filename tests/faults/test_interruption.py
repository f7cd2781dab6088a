"""SIGTERM, SIGINT, the launcher's death: the step is finished, a checkpoint saved, and the run goes on from it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.small_run import (
    SERVER,
    assert_same_end,
    end_of,
    options_of,
    run_to_end,
    start,
    start_processes,
    train,
)
from tests.recipes.conftest import RECIPES, SHORT_STUDENT
from vkd_gen.training import interruption
from vkd_gen.training.interruption import StopRequest
from vkd_gen.training.run_folder import RunFolder


def train_and_signal(options, number, step, to_group=False, late=False):
    """The process is sent a signal within a step, as are those that read its images if all are meant."""

    def send(run, batch, losses):
        if run.step == step and os.environ.get("RANK", "0") == "0":
            os.killpg(0, number) if to_group else os.kill(os.getpid(), number)
            time.sleep(0.3 if to_group else 0)

    if to_group:
        os.setpgid(0, 0)
    train(options, late=late, before_step=send)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signal_finishes_the_step_and_saves(number, status, straight, tmp_path):
    options = options_of(tmp_path / "run")
    ended, output = run_to_end(train_and_signal, options, number, 4, output=tmp_path / "output")
    assert ended == status, output
    told = f"stopped by {number.name} after step 5; checkpoint-5 is kept, and --resume_from_checkpoint latest goes on"
    assert told in output
    assert RunFolder(tmp_path / "run").checkpoints()[-1].name == "checkpoint-5"
    ended, output = run_to_end(train, options, output=tmp_path / "output")
    assert ended == 0, output
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 11])  # at a checkpoint, in the last step
def test_a_signal_when_a_checkpoint_is_due_anyway(step, straight, tmp_path):
    options = options_of(tmp_path / "run")
    ended, output = run_to_end(train_and_signal, options, signal.SIGTERM, step, output=tmp_path / "output")
    assert ended == 143, output
    ended, output = run_to_end(train, options, output=tmp_path / "output")
    assert ended == 0, output
    assert_same_end(tmp_path / "run", straight)


def test_a_signal_that_is_read_late_stops_one_step_later(straight, tmp_path):
    options = options_of(tmp_path / "run")
    ended, output = run_to_end(train_and_signal, options, signal.SIGTERM, 3, False, True, output=tmp_path / "output")
    assert ended == 143, output
    assert "stopped by SIGTERM after step 5; checkpoint-5 is kept" in output
    ended, output = run_to_end(train, options, output=tmp_path / "output")
    assert ended == 0, output
    assert_same_end(tmp_path / "run", straight)


def test_a_signal_to_all_processes_spares_those_that_read_images(straight, tmp_path):
    options = options_of(tmp_path / "run", dataloader_num_workers=1)
    ended, output = run_to_end(train_and_signal, options, signal.SIGTERM, 4, True, output=tmp_path / "output")
    assert ended == 143, output
    assert "after step 5" in output
    ended, output = run_to_end(train, options, output=tmp_path / "output")
    assert ended == 0, output
    assert_same_end(tmp_path / "run", straight)


def test_all_processes_stop_at_the_step_in_which_one_is_asked(straight_pair, tmp_path):
    options = options_of(tmp_path / "run", train_batch_size=2)
    processes = start_processes(2, train_and_signal, options, signal.SIGTERM, 4, output=tmp_path / "output")
    assert end_of(processes, within=120) == [143, 143], (tmp_path / "output").read_text()
    assert RunFolder(tmp_path / "run").checkpoints()[-1].name == "checkpoint-5"
    processes = start_processes(2, train, options, output=tmp_path / "output")
    assert end_of(processes, within=120) == [0, 0]
    assert_same_end(tmp_path / "run", straight_pair)


def hang(options):
    """A step that does not end: the first signal is noted, and nothing can come of it."""
    interruption.SAME_REQUEST_SECONDS = 0.2

    def wait(run, batch, losses):
        os.kill(os.getpid(), signal.SIGTERM)
        (run.folder.path / "asked").touch()
        while True:
            time.sleep(0.05)

    train(options, before_step=wait)


def test_a_second_signal_exits_at_once(tmp_path):
    process = start(hang, options_of(tmp_path / "run"), output=tmp_path / "output")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=20)
    assert process.exitcode == 143
    assert not RunFolder(tmp_path / "run").checkpoints()


@pytest.fixture
def ctrl_c():
    """SIGINT as it is where a user types it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.poll() == 0


def test_the_same_request_may_arrive_twice(ctrl_c):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # else this process would be gone
        assert stop.poll() == signal.SIGTERM
        stop._noted = 0


def test_a_signal_that_nobody_acted_on_is_raised_again(ctrl_c):
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)


def test_without_a_launcher_the_parent_may_die(monkeypatch):
    monkeypatch.setattr(interruption, "PARENT", -1)  # no process has it
    for name in interruption.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert StopRequest().poll() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert StopRequest().poll() == signal.SIGTERM


def launch(options, pids):
    """A launcher of one process, which says who it is."""
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "NO"
    child = os.fork()
    if child == 0:
        interruption.PARENT = os.getppid()  # what a command finds when it is imported
        train(options, before_step=lambda run, batch, losses: time.sleep(0.05))
    pids.put((os.getpid(), child))
    os.waitpid(child, 0)


def test_the_launchers_death_saves_and_ends(straight, tmp_path):
    options, pids = options_of(tmp_path / "run"), SERVER.Queue()
    process = start(launch, options, pids, output=tmp_path / "output")
    launcher, child = pids.get(timeout=60)
    while not RunFolder(tmp_path / "run").checkpoints():
        time.sleep(0.05)
    os.kill(launcher, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "stopped by SIGTERM after step" in (tmp_path / "output").read_text()
    ended, output = run_to_end(train, options, output=tmp_path / "output")
    assert ended == 0, output
    assert_same_end(tmp_path / "run", straight)


def wait_for_steps(folder, process):
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_real_command_behind_its_launcher(processes, pipeline_folder, tmp_path):
    """SIGTERM to `accelerate launch`: with one process it dies and its child notices; with more it tells them all."""
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    flags += ["--max_train_steps", 3000, "--resume_from_checkpoint", "latest", "--log_every_steps", 1]
    launch = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--num_processes", "1", "--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, RECIPES / "train_student_unet.py", *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run", process)
    process.terminate()
    errors = process.communicate(timeout=120)[1]  # ends when the last of them has closed it
    assert process.returncode != 0
    assert "stopped by SIGTERM after step" in errors
    checkpoint = RunFolder(tmp_path / "run").resume_point("latest")
    assert f"{checkpoint.name} is kept" in errors


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_the_real_command(number, status, pipeline_folder, tmp_path):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    flags += ["--max_train_steps", 3000, "--log_every_steps", 1]
    command = [sys.executable, RECIPES / "train_student_unet.py", *flags]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == status
    assert f"stopped by {number.name} after step" in errors
