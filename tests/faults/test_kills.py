"""SIGKILL at any moment: the resumed run ends as the one that nothing happened to."""

import os
import random
import signal

import pytest

from tests.faults.small_run import (
    assert_same_end,
    end_of,
    kill_self,
    options_of,
    read_metrics,
    run_to_end,
    start,
    start_processes,
    train,
    train_and_be_killed,
)

KILLED = -signal.SIGKILL
NUMBER_OF_EVENTS = 138  # file operations in the folder of an undisturbed run


@pytest.mark.parametrize(
    "number",
    [
        # Before a checkpoint gets its name, within the removal of an old one.
        *(69, 101),
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in random.Random(0).sample(range(1, NUMBER_OF_EVENTS), 30)
        ),
    ],
)
def test_killed_at_a_file_operation(number, straight, tmp_path):
    options = options_of(tmp_path / "run")
    status, output = run_to_end(train_and_be_killed, options, number, output=tmp_path / "output")
    assert status == KILLED, output
    status, output = run_to_end(train, options, output=tmp_path / "output")
    assert status == 0, output
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 24))])
def test_killed_at_random_moments_again_and_again(seed, straight, tmp_path):
    options, moments, kills = options_of(tmp_path / "run"), random.Random(seed), 0
    while kills < 4:
        process = start(train, options, output=tmp_path / "output")
        process.join(timeout=moments.uniform(0.05, 0.6))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
    status, output = run_to_end(train, options, output=tmp_path / "output")
    assert status == 0, output
    assert_same_end(tmp_path / "run", straight)


def train_and_die(options, victim, step):
    """Killed within a step if this is the process that is to die."""

    def die(run, batch, losses):
        if run.step == step and os.environ["RANK"] == str(victim):
            kill_self()

    train(options, before_step=die)


@pytest.mark.parametrize(
    ("victim", "step"),
    [
        (1, 4),
        *(pytest.param(victim, step, marks=pytest.mark.slow) for victim in (0, 1) for step in (0, 2, 3, 7, 11)),
    ],
)
def test_one_of_two_processes_dies(victim, step, straight_pair, tmp_path):
    """The other ends too, non-zero, and both resume to what two processes end with undisturbed."""
    options = options_of(tmp_path / "run", train_batch_size=2)
    processes = start_processes(2, train_and_die, options, victim, step, output=tmp_path / "output")
    statuses = end_of(processes, within=120)
    assert statuses[victim] == KILLED
    assert statuses[1 - victim] not in (0, None)
    processes = start_processes(2, train, options, output=tmp_path / "output")
    assert end_of(processes, within=120) == [0, 0]
    assert_same_end(tmp_path / "run", straight_pair)


def train_and_die_in_a_checkpoint(options, victim, step, part):
    """Killed while the processes write a checkpoint together: before its own part of it, or after."""

    def after_build(run):
        save = run.accelerator.save_state

        def die(folder):
            is_victim = run.step == step and os.environ["RANK"] == str(victim)
            if is_victim and part == "before":
                kill_self()
            save(folder)
            if is_victim:
                kill_self()

        run.accelerator.save_state = die

    train(options, after_build=after_build)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["before", "after"])
@pytest.mark.parametrize("step", [3, 9])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies_in_a_checkpoint(victim, step, part, straight_pair, tmp_path):
    """It is none, then: both go on from the one before, or from the start."""
    options = options_of(tmp_path / "run", train_batch_size=2)
    processes = start_processes(
        2, train_and_die_in_a_checkpoint, options, victim, step, part, output=tmp_path / "output"
    )
    statuses = end_of(processes, within=120)
    assert statuses[victim] == KILLED
    assert statuses[1 - victim] not in (0, None)
    assert not (tmp_path / "run" / f"checkpoint-{step}").exists()
    processes = start_processes(2, train, options, output=tmp_path / "output")
    assert end_of(processes, within=120) == [0, 0]
    assert_same_end(tmp_path / "run", straight_pair)


def test_a_torn_line_of_metrics_is_cut(straight, tmp_path):
    options = options_of(tmp_path / "run")
    run_to_end(train_and_be_killed, options, 100, output=tmp_path / "output")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 8, "loss/total": 0.\0\xff')
    status, output = run_to_end(train, options, output=tmp_path / "output")
    assert status == 0, output
    assert read_metrics(tmp_path / "run") == read_metrics(straight)
