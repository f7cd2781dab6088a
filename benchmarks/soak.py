"""Train for half an hour with a checkpoint every 20 steps, and watch memory, file handles, threads and the disk.

python benchmarks/soak.py --minutes 30

Passes if memory, handles and threads do not grow and the checkpoints stay within what --checkpoints_total_limit allows.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats

from measuring import write_results
from vkd_gen.cli import run_command
from vkd_gen.evaluation.tables import print_columns
from vkd_gen.training.checkpoints import find_fault
from vkd_gen.training.run_folder import RunFolder, checkpoint_step

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "train_student_unet.py"
WARM_UP = 0.25
"""Share of the time that slopes leave out, in which the process fills its pools and draws the first preview."""
BLOCKS = 20
"""Slopes are of the means over this many stretches of equal length: neighbouring samples are alike, and taking them for
independent would make the interval too narrow."""
BOUNDS = {
    ("memory_mb", "hours"): 20.0,
    ("memory_mb", "thousand_steps"): 1.0,
    ("handles", "hours"): 1.0,
    ("threads", "hours"): 1.0,
}
"""What the upper end of a slope's interval may be at most. 20 MB per hour are 3 GB per week; steps are counted too,
since a busy machine makes few of them in an hour."""
EVERY_STEPS, KEPT = 20, 2
"""--checkpointing_steps and --checkpoints_total_limit. While one more is written, three are there."""


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """How long to train, and where."""

    output_dir: str = "runs/soak"
    """Folder for the run, every sample (samples.jsonl) and the result (soak.json)."""
    minutes: float = 30.0
    """Time to train."""
    sample_every_seconds: float = 3.0
    """Time between two samples of the processes and the folder."""

    def __post_init__(self) -> None:
        """Check what slopes need."""
        if not 0 < self.sample_every_seconds < float("inf") or not 0 < self.minutes < float("inf"):
            raise ValueError("--minutes and --sample_every_seconds must be above 0 and finite")
        if self.minutes * 60 * (1 - WARM_UP) < 3 * BLOCKS * self.sample_every_seconds:
            raise ValueError("too few samples for a slope: set more --minutes, or fewer --sample_every_seconds")


def usage_of(process: psutil.Process) -> dict[str, float] | None:
    """Memory in MB (10^6 bytes), file handles and threads of a process and all its children; None once it has ended."""
    found = {"memory_mb": 0.0, "handles": 0, "threads": 0}
    try:
        for member in (process, *process.children(recursive=True)):
            with member.oneshot():
                found["memory_mb"] += member.memory_info().rss / 1e6
                found["handles"] += member.num_fds()
                found["threads"] += member.num_threads()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # the process or a child has ended meanwhile
        return None
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; what is removed meanwhile counts nothing."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.lstat().st_size if path.is_file() else 0
    return size


def slope(times: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Least-squares slope over the means of blocks, with its 95% interval.

    Args:
        times: of the samples, in any unit.
        values: as many.

    Raises:
        ValueError: for too few samples, or times that do not pass.
    """
    if len(times) < BLOCKS:
        raise ValueError(f"{len(times)} samples are too few for a slope over {BLOCKS} blocks; set more --minutes")
    parts = np.array_split(np.arange(len(times)), BLOCKS)
    x, y = (np.array([series[part].mean() for part in parts]) for series in (times, values))
    if np.ptp(x) == 0:
        raise ValueError("no checkpoint was made after the warm-up; set more --minutes")
    (rise, _), covariance = np.polyfit(x, y, 1, cov=True)
    error = stats.t.ppf(0.975, BLOCKS - 2) * np.sqrt(covariance[0, 0])
    return {
        "slope": round(float(rise), 4),
        "interval": [round(float(rise - error), 4), round(float(rise + error), 4)],
        "least": float(values.min()),
        "most": float(values.max()),
        "block_means": [round(float(value), 4) for value in y],
    }


def watch(config: SoakConfig, run: Path) -> list[dict[str, float]]:
    """Train until the time is up, then stop the run by SIGTERM; the samples."""
    command = [sys.executable, str(RECIPE), "--output_dir", str(run), "--max_train_steps", str(10**7)]
    command += ["--checkpointing_steps", str(EVERY_STEPS), "--checkpoints_total_limit", str(KEPT)]
    samples: list[dict[str, float]] = []
    output = run.parent / "output.log"
    with output.open("w") as log, (run.parent / "samples.jsonl").open("w") as file:
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            process = psutil.Process(training.pid)
            while not any(run.glob("checkpoint-*")) and training.poll() is None:
                time.sleep(0.2)  # what it takes to start is not counted
            start = time.monotonic()
            while time.monotonic() < start + 60 * config.minutes and training.poll() is None:
                sample = usage_of(process)
                if sample is not None:
                    hours = (time.monotonic() - start) / 3600
                    thousand_steps = checkpoint_step(RunFolder(str(run)).checkpoints()[-1]) / 1000
                    times = {"hours": hours, "thousand_steps": thousand_steps}
                    checkpoints = [path for path in run.glob("*checkpoint-*") if path.is_dir()]  # hidden ones too
                    disk = {"checkpoints_mb": sum(map(size_of, checkpoints)) / 1e6, "folder_mb": size_of(run) / 1e6}
                    samples.append({**times, **sample, **disk})
                    file.write(json.dumps(samples[-1]) + "\n")
                    file.flush()
                time.sleep(config.sample_every_seconds)
            training.send_signal(signal.SIGTERM)
            status = training.wait(timeout=120)
        finally:
            training.kill()
    if status != 128 + signal.SIGTERM:
        raise ValueError(f"the run ended with status {status}; what it printed is in {output}")
    return samples


def judge(samples: Sequence[Mapping[str, float]], run: Path) -> dict[str, Any]:
    """Slopes with their bounds, and the disk with what the kept checkpoints and the one being written take."""
    counted = [sample for sample in samples if sample["hours"] >= WARM_UP * samples[-1]["hours"]]
    series = {name: np.array([sample[name] for sample in counted]) for name in samples[0]}
    result: dict[str, Any] = {}
    for (name, unit), bound in BOUNDS.items():
        found = slope(series[unit], series[name])
        result[f"{name}/{unit}"] = {**found, "bound": bound, "passed": found["interval"][1] <= bound}
    last = RunFolder(str(run)).checkpoints()[-1]
    most, allowed = max(sample["checkpoints_mb"] for sample in samples), (KEPT + 1) * size_of(last) / 1e6
    # One sample may count a checkpoint twice, before and after it is renamed.
    result["checkpoints_mb"] = {"most": most, "bound": round(1.02 * allowed, 4), "passed": most <= 1.02 * allowed}
    result["last_checkpoint"] = {"name": last.name, "fault": find_fault(last), "passed": find_fault(last) is None}
    return result


def main(config: SoakConfig) -> None:
    """Soak, judge, write down; status 1 if a bound is passed."""
    output = Path(config.output_dir)
    run = output / "run"
    if run.exists():
        raise ValueError(f"{run} is there already; choose another --output_dir, or remove it")
    output.mkdir(parents=True, exist_ok=True)
    samples = watch(config, run)
    result = judge(samples, run)
    steps = checkpoint_step(Path(result["last_checkpoint"]["name"]))
    columns = [
        (key, [f"{found[key]:.4g}" if key in found else "" for found in result.values()])
        for key in ("slope", "least", "most", "bound")
    ]
    ends = [" to ".join(f"{value:.4g}" for value in found.get("interval", [])) for found in result.values()]
    passed = ["yes" if found["passed"] else "NO" for found in result.values()]
    print_columns(list(result), [*columns, ("95% interval", ends), ("passed", passed)])
    print(f"{steps} steps, {steps // EVERY_STEPS} checkpoints")
    write_results(
        output / "soak.json",
        result,
        minutes=config.minutes,
        steps=steps,
        checkpoints=steps // EVERY_STEPS,
        checkpointing_steps=EVERY_STEPS,
        checkpoints_total_limit=KEPT,
        samples=len(samples),
        warm_up_share=WARM_UP,
        blocks=BLOCKS,
    )
    if not all(found["passed"] for found in result.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, SoakConfig, __doc__)
