"""SIGTERM, SIGINT, the launcher's death: the step is finished, a checkpoint saved, and the run goes on from it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.small_run import SERVER, assert_same_end, end_as, end_pair, options_of, run_to_end, start, train
from tests.recipes.conftest import RECIPES, SHORT_STUDENT
from vkd_gen.training import interruption
from vkd_gen.training.interruption import StopRequest
from vkd_gen.training.run_folder import RunFolder


def train_and_signal(options, number, step, to_group=False):
    """The process is sent a signal within a step, as are those that read its images if all are meant."""

    def send(run, batch, losses):
        if run.step == step and os.environ.get("RANK", "0") == "0":
            os.killpg(0, number) if to_group else os.kill(os.getpid(), number)
            time.sleep(0.3 if to_group else 0)

    if to_group:
        os.setpgid(0, 0)
    train(options, before_step=send)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "step", "to_group"),
    [
        slow(signal.SIGTERM, 4, False),
        (signal.SIGTERM, 4, True),  # those that read images are spared
        slow(signal.SIGINT, 4, False),
        slow(signal.SIGTERM, 5, False),  # where a checkpoint is due anyway
        slow(signal.SIGTERM, 11, False),  # in the last step
    ],
)
def test_a_signal_finishes_the_step_and_saves(number, step, to_group, straight, tmp_path):
    options = options_of(tmp_path / "run", dataloader_num_workers=int(to_group))
    given = (train_and_signal, options, number, step, to_group)
    status, output = run_to_end(*given, output=tmp_path / "output")
    assert status == 128 + number, output
    told = f"stopped by {number.name} after step {step + 1}; checkpoint-{step + 1} is kept, and "
    assert f"{told}--resume_from_checkpoint latest goes on" in output
    assert RunFolder(tmp_path / "run").checkpoints()[-1].name == f"checkpoint-{step + 1}"
    end_as(straight, options, tmp_path / "output")


def test_all_processes_stop_at_the_step_in_which_one_is_asked(straight_pair, tmp_path):
    options = options_of(tmp_path / "run", train_batch_size=2)
    end_pair(tmp_path / "output", train_and_signal, options, signal.SIGTERM, 4, statuses=(143, 143))
    assert RunFolder(tmp_path / "run").checkpoints()[-1].name == "checkpoint-5"
    end_pair(tmp_path / "output", train, options)
    assert_same_end(tmp_path / "run", straight_pair)


def hang(options):
    """A step that does not end: the first signal is noted, and nothing can come of it."""
    interruption.SAME_REQUEST_SECONDS = 0.2

    def wait(run, batch, losses):
        os.kill(os.getpid(), signal.SIGTERM)
        (run.run.folder.path / "asked").touch()
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
    end_as(straight, options, tmp_path / "output")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "status"),
    [
        ([], signal.SIGTERM, 143),
        ([], signal.SIGINT, 130),
        # SIGTERM to the launcher: with one process it dies and its child notices; with more it tells them all.
        (["--num_processes", "1", "--cpu"], signal.SIGTERM, None),
        (["--multi_gpu", "--num_processes", "2"], signal.SIGTERM, None),
    ],
)
def test_the_real_command(launcher, number, status, pipeline_folder, tmp_path):
    flags = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--output_dir", tmp_path / "run"]
    flags += ["--max_train_steps", 3000, "--resume_from_checkpoint", "latest", "--log_every_steps", 1]
    launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
    command = [sys.executable, *launch, RECIPES / "train_student_unet.py", *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]  # ends when the last of them has closed it
    assert process.returncode == status or (status is None and process.returncode != 0)
    assert f"stopped by {number.name} after step" in errors
    checkpoint = RunFolder(tmp_path / "run").resume_point("latest")
    assert f"{checkpoint.name} is kept" in errors
