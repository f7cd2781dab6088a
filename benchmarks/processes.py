"""Images per second of the student recipe on two processes against one, a core each, in turn; and whether losses agree.

Beside them two runs that know nothing of each other: what two cores give at best, which may be less than twice one.

python benchmarks/processes.py
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vkd_gen.provenance import environment, write_json
from vkd_gen.training.command_line import run_command

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "train_student_unet.py"
STEPS_PER_LINE = 10


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """How long to measure, and what."""

    rounds: int = 3
    """Runs of either kind."""
    max_train_steps: int = 40
    """Steps of each run; the first 20, in which pools and pages are filled, are not counted."""
    train_batch_size: int = 512
    """Images per step over all processes."""
    output: str = str(HERE / "results" / "processes.json")
    """File for the numbers."""


def run(config: ProcessesConfig, num_processes: int, folder: Path, *, share: int = 1) -> list[dict[str, float]]:
    """Lines of the log of a run of the digits recipe, one thread for each process, nothing scored.

    Args:
        config: of the benchmark.
        num_processes: of the run.
        folder: of the run.
        share: so many runs divide the images of a step among them.
    """
    # The launcher's word for several processes on one machine, which ACCELERATE_USE_CPU turns into CPU processes.
    launch = "--multi_gpu" if num_processes > 1 else "--cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", launch, "--num_processes", str(num_processes)]
    command.append(str(RECIPE))
    flags = {
        "output_dir": folder,
        "train_batch_size": config.train_batch_size // (num_processes * share),
        "max_train_steps": config.max_train_steps,
        "log_every_steps": STEPS_PER_LINE,
        "preview_every_steps": 0,
        "diagnostics_every_steps": config.max_train_steps,
        "extractor": "none",
    }
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    finished = subprocess.run([*command, "--no-score_teacher"], capture_output=True, text=True, env=settings)
    if finished.returncode:
        raise ValueError(f"the run in {folder} failed: {(finished.stderr.strip().splitlines() or ['?'])[-1]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "images_per_second" in line]


def rate_of(lines: list[dict[str, float]]) -> float:
    """Images per second; the first steps, in which pools and pages are filled, do not count."""
    return median(line["images_per_second"] for line in lines[2:])


def rate_apart(config: ProcessesConfig, folder: Path) -> float:
    """Images per second of two runs of one process, side by side, each with half of the images of a step."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, config, 1, folder / f"apart-{number}", share=2) for number in range(2)]
        return sum(rate_of(each.result()) for each in runs)


def main(config: ProcessesConfig) -> None:
    """Run in turn, compare and write."""
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {config.rounds}")
    if config.train_batch_size < 2 or config.train_batch_size % 2:
        raise ValueError(f"--train_batch_size must be even and above 0, not {config.train_batch_size}")
    if config.max_train_steps < 3 * STEPS_PER_LINE:
        raise ValueError(f"--max_train_steps must be at least {3 * STEPS_PER_LINE}, not {config.max_train_steps}")
    protocol = {
        "recipe": "train_student_unet.py --preset digits",
        "train_batch_size": config.train_batch_size,
        "max_train_steps": config.max_train_steps,
        "threads_per_process": 1,
        "clock": "wall",
        "environment": environment(),
    }
    rates: dict[int, list[float]] = {1: [], 2: []}
    apart: list[float] = []
    ratios, difference = [], 0.0
    for number in range(config.rounds):
        losses = {}
        with tempfile.TemporaryDirectory() as place:
            for num_processes in rates:
                lines = run(config, num_processes, Path(place) / str(num_processes))
                rates[num_processes].append(rate_of(lines))
                losses[num_processes] = [line["loss/total"] for line in lines]
            apart.append(rate_apart(config, Path(place)))
        for one, two in zip(losses[1], losses[2], strict=True):
            difference = max(difference, abs(two - one) / abs(one) if one else math.inf)
        ratios.append(rates[2][-1] / rates[1][-1])
        print(
            f"round {number + 1}: one process {rates[1][-1]:.0f} images/s, two {rates[2][-1]:.0f}, "
            f"{ratios[-1]:.2f} times, two runs apart {apart[-1] / rates[1][-1]:.2f} times; losses differ by "
            f"{difference:.1e} at most, relative",
            flush=True,
        )
        found = {"ratios": ratios, "median_ratio": median(ratios), "largest_relative_difference_of_losses": difference}
        found["ratios_of_two_runs_apart"] = [both / one for both, one in zip(apart, rates[1], strict=True)]
        write_json(Path(config.output), {**found, "images_per_second": rates, "protocol": protocol})
    print(
        f"two processes make {median(ratios):.2f} times the images of one, two runs apart "
        f"{median(found['ratios_of_two_runs_apart']):.2f} times; written to {config.output}"
    )


if __name__ == "__main__":
    run_command(main, ProcessesConfig, __doc__)
