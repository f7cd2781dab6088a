"""SIGKILL at any moment: the resumed run ends as the one that nothing happened to."""

import os
import random
import signal

import pytest

from tests.faults.small_run import (
    assert_same_end,
    end_as,
    end_of,
    end_pair,
    kill_self,
    options_of,
    run_to_end,
    start,
    start_processes,
    train,
    train_and_be_killed,
)

KILLED = -signal.SIGKILL
NUMBER_OF_EVENTS = 129  # file operations in the folder of an undisturbed run


def slow(cases):
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


# Before a checkpoint gets its name; within the removal of an old one; anywhere.
@pytest.mark.parametrize("number", [69, *slow([101, *random.Random(0).sample(range(1, NUMBER_OF_EVENTS), 30)])])
def test_killed_at_a_file_operation(number, straight, tmp_path):
    options = options_of(tmp_path / "run")
    status, output = run_to_end(train_and_be_killed, options, number, output=tmp_path / "output")
    assert status == KILLED, output
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"step": 8, "loss/total": 0.\0\xff')  # and a line is torn
    end_as(straight, options, tmp_path / "output")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
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
    end_as(straight, options, tmp_path / "output")


def train_and_die(options, victim, step):
    """Killed within a step if this is the process that is to die."""

    def die(run, batch, losses):
        if run.step == step and os.environ["RANK"] == str(victim):
            kill_self()

    train(options, before_step=die)


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


@pytest.mark.parametrize(
    ("function", "victim", "step", "part"),
    [
        (train_and_die, 1, 4, ()),
        *(
            pytest.param(train_and_die, victim, step, (), marks=pytest.mark.slow)
            for victim in (0, 1)
            for step in (0, 2, 3, 7, 11)
        ),
        *(
            pytest.param(train_and_die_in_a_checkpoint, victim, step, (part,), marks=pytest.mark.slow)
            for victim in (0, 1)
            for step in (3, 9)
            for part in ("before", "after")
        ),
    ],
)
def test_one_of_two_processes_dies(function, victim, step, part, straight_pair, tmp_path):
    """The other ends too, non-zero, and both resume to what two processes end with undisturbed."""
    options = options_of(tmp_path / "run", train_batch_size=2)
    processes = start_processes(2, function, options, victim, step, *part, output=tmp_path / "output")
    statuses = end_of(processes, within=120)
    assert statuses[victim] == KILLED
    assert statuses[1 - victim] not in (0, None)
    if part:  # what is not written whole is no checkpoint
        assert not (tmp_path / "run" / f"checkpoint-{step}").exists()
    end_pair(tmp_path / "output", train, options)
    assert_same_end(tmp_path / "run", straight_pair)
