"""Compare methods of distillation: train_student_unet.py for every arm, start and seed, in one table with intervals.

python recipes/compare_methods.py --preset screen
python recipes/compare_methods.py --preset confirmation

A run that the results file holds is not made again, and one that was interrupted goes on from its checkpoint.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vkd_gen.provenance import environment, write_json
from vkd_gen.training.command_line import USER_ERROR, run_recipe

ROOT = Path(__file__).parents[1]
FORMAT = "vkd-gen comparison of methods, 1"


@dataclass(frozen=True)
class Arm:
    """One method: flags of train_student_unet.py, a line for people, and its steps as a multiple of the others'."""

    flags: tuple[str, ...]
    what: str
    steps_factor: float = 1.0


MSE = ("--feature_loss", "mse", "--feature_normalization")
SOLVED = ("--method", "vkd", "--projector", "solved", *MSE)
LINEAR = ("--method", "fitnet", "--projector", "linear", *MSE)
POOLED = ("down_blocks.0/4", "down_blocks.1/4", "mid_block/4", "up_blocks.0/8", "up_blocks.1/8")

ARMS: dict[str, Arm] = {
    "denoising": Arm(("--method", "none"), "denoising alone"),
    "denoising-longer": Arm(("--method", "none"), "denoising alone, for as long as features take", steps_factor=2.5),
    "output": Arm(("--method", "output"), "the teacher's output"),
    "fitnet": Arm((*LINEAR, "none"), "output, and features by a free 1x1 convolution"),
    "fitnet-layer-norm": Arm((*LINEAR, "layer_norm"), "the same to layer-normalised features"),
    "learned-identity-layer-norm": Arm(
        ("--method", "vkd", "--projector", "cayley", "--projector_start", "identity", *MSE, "layer_norm"),
        "output, and features by a learned orthogonal map that starts at the identity",
    ),
    "fixed-random-layer-norm": Arm(
        ("--method", "vkd", "--projector", "random", *MSE, "layer_norm"),
        "output, and features by a random orthogonal map that stays",
    ),
    "solved-raw": Arm((*SOLVED, "none"), "output, and features by the best orthogonal map, in closed form"),
    "solved-center": Arm((*SOLVED, "center"), "the same to features centred per timestep bin"),
    "solved-layer-norm": Arm((*SOLVED, "layer_norm"), "the same to layer-normalised features"),
    "solved-standardize": Arm((*SOLVED, "standardize"), "the same to standardised features"),
    "solved-whiten-0.5": Arm((*SOLVED, "whiten", "--whitening_exponent", "0.5"), "the same to half whitened features"),
    "solved-whiten-1": Arm((*SOLVED, "whiten", "--whitening_exponent", "1"), "the same to whitened features"),
    "vkd-paper": Arm(("--method", "vkd-paper"), "as published: learned orthogonal map, batch whitening, smooth L1"),
    "solved-raw-pooled": Arm((*SOLVED, "none", "--layer_pairs", *POOLED), "as solved-raw, on means over each image"),
}
"""What can be compared. The flags say all that sets an arm apart: defaults may change, records must not."""

STARTS = {"inherited": ("--inherit_weights",), "random": ("--no-inherit_weights",)}
"""Flags of what a student starts from."""

TEACHER_IS_KNOWN: tuple[str, ...] = ()
"""Flags of runs that need not score the teacher again, once the results file has its scores."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Compare methods of distillation. What is done already is not done again."""

    preset: str = "screen"
    """Which comparison to start from; every flag overrides a field of it."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Methods to compare, by their names in ARMS."""
    control: str = "output"
    """The arm that the others are compared to, seed by seed."""
    starts: tuple[Literal["inherited", "random"], ...] = ("inherited",)
    """What students start from: the teacher's weights, or random ones."""
    seed: int = 0
    """First seed: of initialisation, data order, noise and timesteps."""
    num_seeds: int = 2
    """Runs of every arm from every start."""
    student_preset: Literal["digits", "mnist"] = "digits"
    """Preset of train_student_unet.py."""
    max_train_steps: int = 1000
    """Optimizer steps of each run, times the arm's own factor."""
    train_batch_size: int = 32
    """Images per step."""
    learning_rate: float | None = None
    """Peak learning rate; by default the student preset's."""
    num_score_samples: int = 1000
    """Samples that a student is scored by."""
    score_every_steps: int = 0
    """Steps between scores during training, for the curves; 0 for none."""
    extra: tuple[str, ...] = ()
    """Further flags of every run, each with its values in one string and without dashes, as "max_train_samples 150"."""
    jobs: int | None = None
    """Runs side by side; by default one per GPU, else one per core. The cores, or GPUs, are shared out."""
    output_dir: str = "runs/comparison"
    """Folder of the runs, and of table.md."""
    results: str | None = None
    """File of finished runs; by default docs/results/PRESET.json."""
    figures: str = "docs"
    """Folder of the figures."""
    dry_run: bool = False
    """Print what would be run and what is done already, then stop."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        least = {"seed": 0, "num_seeds": 1, "max_train_steps": 1, "train_batch_size": 1, "num_score_samples": 10}
        for name, value in {**least, "score_every_steps": 0, "jobs": 1}.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"--{name} must be at least {value}, not {given}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate must be above 0 and finite, not {self.learning_rate}")
        if any(not shlex.split(text) for text in self.extra):
            raise ValueError("--extra takes flags without dashes, each with its values in one string")
        for name in ("arms", "starts"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must name at least one, and none twice")
        for arm in (*self.arms, self.control):
            if arm not in ARMS:
                near = difflib.get_close_matches(arm, ARMS, n=3, cutoff=0) if arm else list(ARMS)
                raise ValueError(f"there is no arm {arm!r}; the nearest are {', '.join(near)}")
        if self.control not in self.arms:
            raise ValueError(f"--control {self.control} is not among the arms: {', '.join(self.arms)}")


SCREEN = ComparisonConfig(output_dir="runs/screen")
CONFIRMATION = replace(
    SCREEN,
    preset="confirmation",
    arms=("denoising", "denoising-longer", "output", "fitnet", "solved-raw", "solved-center", "solved-standardize"),
    starts=("inherited", "random"),
    seed=100,
    num_seeds=5,
    output_dir="runs/confirmation",
)
CONFIRMATION_LONG = replace(
    CONFIRMATION, preset="confirmation-long", max_train_steps=3000, num_seeds=3, output_dir="runs/confirmation-long"
)
MNIST = replace(CONFIRMATION, preset="mnist", student_preset="mnist", num_seeds=3, output_dir="runs/comparison-mnist")
DIGITS_TENTH = replace(
    CONFIRMATION, preset="digits-tenth", num_seeds=3, extra=("max_train_samples 150",), output_dir="runs/digits-tenth"
)
PRESETS = {config.preset: config for config in (SCREEN, CONFIRMATION, CONFIRMATION_LONG, MNIST, DIGITS_TENTH)}


@dataclass(frozen=True)
class Run:
    """One run to make: its flags decide its result, and are what its record is known by."""

    arm: str
    start: str
    seed: int
    steps: int
    flags: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, {self.start}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Inside of the output folder: no other flags share it."""
        digest = hashlib.sha256(self.flags.encode()).hexdigest()[:8]
        return Path(self.start) / f"{self.arm}-seed-{self.seed}-{digest}"


def score_flags(config: ComparisonConfig) -> tuple[str, ...]:
    """What decides the teacher's and the held-out images' scores."""
    subset = max(2, min(250, config.num_score_samples // 2))
    flags = ["--preset", config.student_preset, "--num_score_samples", str(config.num_score_samples)]
    flags += ["--kid_subset_size", str(subset)]
    return (*flags, *extra_flags(config))


def extra_flags(config: ComparisonConfig) -> tuple[str, ...]:
    """What --extra says, as words of a command line."""
    lines = [shlex.split(text) for text in config.extra]
    return tuple(word for words in lines for word in ("--" + words[0].lstrip("-"), *words[1:]))


def plan(config: ComparisonConfig) -> list[Run]:
    """All runs that were asked for: whole rounds, seed by seed, so that a comparison cut short compares like with like.

    The longest runs of a round come first.
    """
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        steps = {arm: max(1, round(config.max_train_steps * ARMS[arm].steps_factor)) for arm in config.arms}
        for arm in sorted(config.arms, key=lambda arm: -steps[arm]):
            for start in config.starts:
                flags = [*score_flags(config), *ARMS[arm].flags, *STARTS[start], "--seed", str(seed)]
                flags += ["--max_train_steps", str(steps[arm]), "--train_batch_size", str(config.train_batch_size)]
                if config.learning_rate is not None:
                    flags += ["--learning_rate", str(config.learning_rate)]
                if config.score_every_steps:
                    flags += ["--score_every_steps", str(config.score_every_steps)]
                runs.append(Run(arm, start, seed, steps[arm], shlex.join([*flags, *extra_flags(config)])))
    return runs


def command_of(run: Run, folder: Path, known_teacher: bool) -> list[str]:
    """The command that makes a run, or goes on with it."""
    command = [sys.executable, str(ROOT / "recipes" / "train_student_unet.py"), *shlex.split(run.flags)]
    command += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest", "--preview_every_steps", "0"]
    command += ["--log_every_steps", str(-(-run.steps // NUM_POINTS)), "--checkpoints_total_limit", "1"]
    return [*command, *(TEACHER_IS_KNOWN if known_teacher else ())]


# What is known.

NUM_POINTS = 20
"""Points of a curve in the results file."""
SETTINGS = (
    *("method", "output_weight", "feature_weight", "feature_loss", "projector", "projector_start"),
    *("feature_normalization", "feature_weighting", "whitening_exponent", "whitening_rank", "layers", "learning_rate"),
)
"""Fields of a run's resolved configuration that its record repeats."""


class Results:
    """The results file: finished runs, and the scores of the teacher and of held-out images.

    Args:
        path: a JSON file, existing or not.

    Raises:
        ValueError: in one line, if the file is damaged or another one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "references": {}, "runs": []}
        if path.exists():
            try:
                content = json.loads(path.read_text())
            except (ValueError, OSError) as error:
                raise ValueError(f"cannot read --results {path}: {error}; repair it, or move it away") from error
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"--results {path} is no file of this command; choose another name")
            self.content = content

    def record(self, run: Run) -> dict[str, Any] | None:
        """Of a run with these flags, if there is one."""
        found = [record for record in self.content["runs"] if record["flags"] == run.flags]
        return {**found[0], "arm": run.arm} if found else None

    def add(self, record: dict[str, Any], reference: dict[str, Any] | None = None) -> None:
        """Add a finished run, and write."""
        self.content["runs"].append(record)
        self.content["runs"].sort(key=lambda record: (record["start"], record["arm"], record["seed"], record["flags"]))
        if reference:
            self.content["references"].setdefault(record["reference"], reference)
        self.content["environment"] = environment()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def read_run(run: Run, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record of a finished run, and what it says of its teacher.

    Raises:
        ValueError: if the folder does not hold a whole run.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row = results["rows"]["student"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no whole run: {error}") from error
    record = {
        "steps": run.steps,
        "settings": {name: config[name] for name in SETTINGS if name in config},
        "student": row,
        "curve": curve_of(lines),
        "training_seconds": training_seconds(lines, config.get("train_batch_size", 0)),
    }
    diagnostics = [line for line in lines if any(name.startswith("diagnostics/") for name in line)]
    if diagnostics:
        record["diagnostics"] = {k: short(v) for k, v in diagnostics[-1].items() if k.startswith("diagnostics/")}
    others = {name: row for name, row in results["rows"].items() if name != "student"}
    protocol = {name: value for name, value in results.get("protocol", {}).items() if name != "environment"}
    has_scores = any(name.startswith("fid") for name in others.get("teacher", {}))
    return record, {"rows": others, "protocol": protocol} if has_scores else None


def short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def curve_of(lines: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most 20 lines of losses and as many of scores, the last one always among them."""
    curve = []
    for prefix in ("loss/", "score/"):
        found = [
            {
                name: short(value)
                for name, value in line.items()
                if name == "step" or (name.startswith(prefix) and name.count("/") == 1)
            }
            for line in lines
            if any(name.startswith(prefix) for name in line)
        ]
        stride = max(1, -(-len(found) // NUM_POINTS))
        curve += found[::-1][::stride][::-1]
    return sorted(curve, key=lambda line: line["step"])


def training_seconds(lines: Sequence[dict[str, float]], batch_size: int) -> float:
    """Seconds that the steps took, without start, checkpoints and scores."""
    seconds, before = 0.0, 0.0
    for line in lines:
        if line.get("images_per_second"):
            seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return round(seconds, 2)


# Running.


def places(jobs: int | None) -> list[dict[str, str]]:
    """What each of the runs side by side is given, as environment variables: its share of the cores, or a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [str(number) for number in range(torch.cuda.device_count())]
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = named[: len(gpus)] if named != [""] else gpus
    jobs = jobs or len(gpus) or cores
    threads = str(max(1, cores // jobs))
    shares = []
    for number in range(jobs):
        share = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        shares.append(share | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}))
    return shares


@dataclass
class Job:
    """A run that is being made."""

    run: Run
    folder: Path
    process: subprocess.Popen[bytes]
    place: dict[str, str]
    started: float

    def note_seconds(self) -> float:
        """Note in the run's folder how long it took this time; the sum of all times."""
        path = self.folder / "seconds.json"
        parts = json.loads(path.read_text()) if path.exists() else []
        parts.append(round(time.perf_counter() - self.started, 2))
        write_json(path, parts)
        return round(sum(parts), 2)


def start_job(run: Run, output_dir: Path, place: dict[str, str], known_teacher: bool) -> Job:
    """Start a run; what it prints goes to its log.txt."""
    folder = output_dir / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    # By this variable it knows that it was launched, and stops with a checkpoint when this process dies.
    variables = {**os.environ, **place, "ACCELERATE_DYNAMO_BACKEND": "NO"}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command_of(run, folder, known_teacher),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # Ctrl-C is for this process, which hands it on once
        )
    return Job(run, folder, process, place, time.perf_counter())


def last_words(folder: Path) -> str:
    """The end of a run's log."""
    text = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else "\n".join(lines[-3:]) or "its log is empty"


def remaining_seconds(
    waiting: Sequence[Run], running: Sequence[Job], records: Sequence[dict[str, Any]], jobs: int
) -> float | None:
    """How long it will take, from the seconds per step of finished runs, each arm's own where there are some."""
    rates: dict[str, list[float]] = {}
    for record in records:
        rates.setdefault(record["arm"], []).append(record["seconds"] / record["steps"])
    if not rates:
        return None
    means = {arm: sum(values) / len(values) for arm, values in rates.items()}
    other = sum(means.values()) / len(means)
    seconds = sum(means.get(run.arm, other) * run.steps for run in waiting)
    now = time.perf_counter()
    seconds += sum(max(0, means.get(job.run.arm, other) * job.run.steps - (now - job.started)) for job in running)
    return seconds / max(1, min(jobs, len(waiting) + len(running)))


def in_words(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "unknown"
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def make_runs(runs: Sequence[Run], config: ComparisonConfig, results: Results, console: Console) -> dict[str, str]:
    """Make the runs that are not in the results file yet; what failed, with the last words of its log."""
    waiting = [run for run in runs if results.record(run) is None]
    if not waiting:
        return {}
    free = places(config.jobs)
    num_places = len(free)
    output_dir = Path(config.output_dir)
    reference = shlex.join(score_flags(config))
    running: list[Job] = []
    failed: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as progress:
        task = progress.add_task("runs", total=len(runs), completed=len(runs) - len(waiting), note="")
        try:
            while waiting or running:
                while waiting and free:
                    known = reference in results.content["references"]
                    running.append(start_job(waiting.pop(0), output_dir, free.pop(0), known))
                time.sleep(0.1)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.place)
                    finish(job, reference, results, failed, console)
                    progress.advance(task)
                left = remaining_seconds(waiting, running, results.content["runs"], num_places)
                names = "; ".join(job.run.name for job in running)
                progress.update(task, note=f"{in_words(left)} left; {names}")
        except KeyboardInterrupt:
            end(running)
            raise
    return failed


def finish(job: Job, reference: str, results: Results, failed: dict[str, str], console: Console) -> None:
    """Take down a run that has ended."""
    run, seconds = job.run, job.note_seconds()
    status = job.process.returncode
    if status == 0:
        try:
            record, references = read_run(run, job.folder)
        except ValueError as error:
            failed[run.name] = str(error)
        else:
            head = {"arm": run.arm, "start": run.start, "seed": run.seed, "flags": run.flags}
            made = {"seconds": seconds, "threads": int(job.place["OMP_NUM_THREADS"]), "reference": reference}
            results.add({**head, **record, **made}, references)
            row = record["student"]
            distance = f", teacher distance {row['teacher_distance']:.4f}" if "teacher_distance" in row else ""
            console.print(f"{run.name}: {in_words(seconds)}{distance}", highlight=False)
            return
    else:
        failed[run.name] = f"status {status}, {job.folder / 'log.txt'}: {last_words(job.folder)}"
    console.print(f"{run.name} failed: {failed[run.name]}", highlight=False, markup=False)


def end(running: Sequence[Job], seconds: float = 60.0) -> None:
    """Ask runs to stop, which they do after their step and with a checkpoint; kill what has not after some time."""
    for job in running:
        with contextlib.suppress(ProcessLookupError):
            job.process.terminate()
    until = time.monotonic() + seconds
    for job in running:
        try:
            job.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        job.note_seconds()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Only one comparison at a time in a folder.

    Raises:
        ValueError: if there is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another comparison is running in {folder}; choose another --output_dir") from error
        yield


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as if it were Ctrl-C."""
    raise KeyboardInterrupt(number)


def show_plan(config: ComparisonConfig, runs: Sequence[Run], results: Results, console: Console) -> None:
    """What would be run."""
    for run in runs:
        state = "done" if results.record(run) else "to do"
        folder = Path(config.output_dir) / run.folder
        console.print(
            f"{state}: {run.name}\n  {shlex.join(command_of(run, folder, False))}", highlight=False, soft_wrap=True
        )
    done = sum(results.record(run) is not None for run in runs)
    console.print(
        f"{len(runs)} runs, {done} of them done already; {len(places(config.jobs))} side by side", highlight=False
    )


def main(config: ComparisonConfig) -> None:
    """Make the runs that are missing, then show the table and draw the figures."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = Results(Path(config.results or ROOT / "docs" / "results" / f"{config.preset}.json"))
    runs = plan(config)
    if config.dry_run:
        show_plan(config, runs, results, console)
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with alone_in(Path(config.output_dir)):
            failed = make_runs(runs, config, results, console)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        done = sum(results.record(run) is not None for run in runs)
        print(f"interrupted: {done} of {len(runs)} runs are kept; the same command goes on", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        for name, words in failed.items():
            console.print(f"{name}: {words}", highlight=False, markup=False)
        print(f"error: {len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="screen")
