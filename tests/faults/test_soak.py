"""What benchmarks/soak.py makes of its samples, a leak being told from noise; and many steps of a tiny run."""

import gc
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.small_run import options_of, run_to_end, train
from vkd_gen.training.checkpoints import seal

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    specification = importlib.util.spec_from_file_location("soak", SOAK)
    module = importlib.util.module_from_spec(specification)
    sys.modules["soak"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "file").write_bytes(bytes(10**6))
    seal(tmp_path / "checkpoint-20", {"step": 20, "num_processes": 1})
    return tmp_path


def samples_of(*, memory_per_hour=0.0, handles_per_hour=0.0, checkpoints_mb=2.0, steps_per_hour=20_000):
    """Half an hour, a sample every three seconds, memory with noise and a warm-up that rises."""
    noise = np.random.default_rng(0).normal(0, 0.3, 600)
    hours = np.arange(600) / 1200
    memory = 1000 + np.minimum(hours, 0.1) * 200 + memory_per_hour * hours + noise
    return [
        {
            "hours": hour,
            "thousand_steps": hour * steps_per_hour / 1000,
            "memory_mb": value,
            "handles": 3 + int(handles_per_hour * hour),
            "threads": 3 + (number % 50 == 0),
            "checkpoints_mb": checkpoints_mb,
        }
        for number, (hour, value) in enumerate(zip(hours.tolist(), memory.tolist(), strict=True))
    ]


def test_a_slope_is_that_of_a_line_and_its_interval_holds_it(soak):
    """In 95% of cases, also where neighbouring samples are alike."""
    hours, inside = np.linspace(0, 1, 600), 0
    assert soak.slope(hours, 5 + 3 * hours)["slope"] == pytest.approx(3)
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=606)
        low, high = soak.slope(hours, 2 * hours + np.convolve(noise, np.ones(7) / 7, "valid"))["interval"]
        inside += low <= 2 <= high
    assert 178 <= inside < 200


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, set()),
        ({"memory_per_hour": 10}, set()),
        ({"memory_per_hour": 25}, {"memory_mb/hours", "memory_mb/thousand_steps"}),
        ({"memory_per_hour": 10, "steps_per_hour": 2000}, {"memory_mb/thousand_steps"}),
        ({"handles_per_hour": 8}, {"handles/hours"}),
        ({"checkpoints_mb": 4.5}, {"checkpoints_mb"}),
    ],
)
def test_a_leak_is_found(soak, run, changes, failed):
    found = soak.judge(samples_of(**changes), run)
    assert {name for name, entry in found.items() if not entry["passed"]} == failed


def test_a_damaged_checkpoint_at_the_end_is_found_and_too_little_refused(soak, run):
    (run / "checkpoint-20" / "file").write_bytes(b"")
    assert not soak.judge(samples_of(), run)["last_checkpoint"]["passed"]
    with pytest.raises(ValueError, match="no checkpoint was made"):
        soak.judge(samples_of(steps_per_hour=0), run)
    with pytest.raises(ValueError, match="too few for a slope"):
        soak.judge(samples_of()[:20], run)


def train_and_look(options, file):
    """Write down what the process holds every 250 steps."""
    seen = []

    def look(run, batch, losses):
        if run.step % 250 == 0:
            gc.collect()
            process = psutil.Process()
            held = {"objects": len(gc.get_objects()), "memory_mb": process.memory_info().rss / 1e6}
            seen.append({**held, "handles": process.num_fds(), "threads": process.num_threads()})

    train(options, before_step=look)
    Path(file).write_text(json.dumps(seen))


@pytest.mark.slow
def test_nothing_is_kept_of_a_step_or_a_checkpoint(tmp_path):
    options = options_of(tmp_path / "run", max_train_steps=1501, checkpointing_steps=20)
    status, output = run_to_end(train_and_look, options, str(tmp_path / "seen"), output=tmp_path / "output", within=600)
    assert status == 0, output
    before, *_, after = json.loads((tmp_path / "seen").read_text())[2:]  # 750 steps in: what grows once has grown
    assert abs(after["objects"] - before["objects"]) < 100
    assert after["memory_mb"] - before["memory_mb"] < 0.5
    assert (after["handles"], after["threads"]) == (before["handles"], before["threads"])
    assert len(list((tmp_path / "run").glob("*checkpoint*"))) == 2
