"""Compare methods of distillation: train_student_unet.py for every arm, start and seed, in one table with intervals.

python recipes/compare_methods.py --preset screen
python recipes/compare_methods.py --preset confirmation

A run that the results file holds is not made again, and one that was interrupted goes on from its checkpoint.
"""

import difflib
import hashlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vkd_gen.evaluation.method_figures import draw_curves, draw_differences, draw_samples
from vkd_gen.evaluation.method_tables import Comparison, markdown_table, print_tables
from vkd_gen.evaluation.run_records import NUM_POINTS, RunRecords, read_run
from vkd_gen.training.command_line import run_recipe
from vkd_gen.training.side_by_side import Job, Task, alone_in, places, remaining_seconds, run_side_by_side

ROOT = Path(__file__).parents[1]


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

OWN = ("preset", "output_dir", "resume_from_checkpoint", "seed", "max_train_steps", "train_batch_size", "dry_run")
"""Flags of a run that --extra must not have: this command sets them."""

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
    output_dir: str = "runs/screen"
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
        for text in self.extra:
            name = (shlex.split(text) or [""])[0].lstrip("-")
            if not name or name in OWN:
                what = f"{name} is this command's own" if name else "there is an empty one"
                raise ValueError(f"--extra takes flags, each with its values in one string: {what}")
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


SCREEN = ComparisonConfig()
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
        """For people; no other run of a comparison has it."""
        return f"{self.arm}, {self.start}, seed {self.seed}"

    def folder(self, output_dir: str) -> Path:
        """No run with other flags has it."""
        digest = hashlib.sha256(self.flags.encode()).hexdigest()[:8]
        return Path(output_dir) / self.start / f"{self.arm}-seed-{self.seed}-{digest}"


def score_flags(config: ComparisonConfig) -> list[str]:
    """What decides the scores of the teacher and of held-out images, but for --extra."""
    subset = max(2, min(250, config.num_score_samples // 2))
    flags = ["--preset", config.student_preset, "--num_score_samples", str(config.num_score_samples)]
    return [*flags, "--kid_subset_size", str(subset)]


def extra_flags(config: ComparisonConfig) -> list[str]:
    """What --extra says, as words of a command line."""
    lines = [shlex.split(text) for text in config.extra]
    return [word for words in lines for word in ("--" + words[0].lstrip("-"), *words[1:])]


def plan(config: ComparisonConfig) -> list[Run]:
    """All runs that were asked for, in whole rounds, so that a comparison cut short compares like with like."""
    steps = {arm: max(1, round(config.max_train_steps * ARMS[arm].steps_factor)) for arm in config.arms}
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm in config.arms:
            for start in config.starts:
                flags = [*score_flags(config), *ARMS[arm].flags, *STARTS[start], "--seed", str(seed)]
                flags += ["--max_train_steps", str(steps[arm]), "--train_batch_size", str(config.train_batch_size)]
                if config.learning_rate is not None:
                    flags += ["--learning_rate", str(config.learning_rate)]
                if config.score_every_steps:
                    flags += ["--score_every_steps", str(config.score_every_steps)]
                runs.append(Run(arm, start, seed, steps[arm], shlex.join([*flags, *extra_flags(config)])))
    return runs


def command_of(run: Run, folder: Path, *, knows_teacher: bool) -> list[str]:
    """The command that makes a run, or goes on with it."""
    command = [sys.executable, str(ROOT / "recipes" / "train_student_unet.py"), *shlex.split(run.flags)]
    command += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest", "--preview_every_steps", "0"]
    command += ["--log_every_steps", str(-(-run.steps // NUM_POINTS)), "--checkpoints_total_limit", "1"]
    return [*command, *(TEACHER_IS_KNOWN if knows_teacher else ())]


def seconds_per_step(records: Sequence[dict]) -> dict[str, float]:
    """Arm -> seconds per step of its finished runs; under "" the mean of all arms."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["arm"], []).append(record["seconds"] / record["steps"])
    means = {arm: sum(values) / len(values) for arm, values in found.items()}
    return {**means, "": sum(means.values()) / len(means)} if means else {}


def expected_seconds(run: Run, rates: dict[str, float]) -> float:
    """What a run will take; where nothing is known yet, its steps stand for it."""
    return run.steps * rates.get(run.arm, rates.get("", 1.0))


def make_runs(
    runs: Sequence[Run], config: ComparisonConfig, records: RunRecords, console: Console, lock: int
) -> dict[str, str]:
    """Make the runs that have no record yet, seed by seed, the longest of a seed first.

    Returns:
        Name of a run that failed -> why.
    """
    rates = seconds_per_step(records.runs)
    missing = [run for run in runs if records.find(run.flags) is None]
    missing.sort(key=lambda run: (run.seed, -expected_seconds(run, rates)))
    if not missing:
        return {}
    shares = places(config.jobs)
    reference = shlex.join([*score_flags(config), *extra_flags(config)])
    by_name = {run.name: run for run in missing}
    failed: dict[str, str] = {}

    def next_command(task: Task) -> list[str]:
        return command_of(by_name[task.name], task.folder, knows_teacher=reference in records.references)

    def on_end(job: Job, seconds: float) -> None:
        run, status = by_name[job.task.name], job.process.returncode
        words = f"{in_words(seconds)}"
        try:
            if status:
                raise ValueError(f"status {status}: {job.last_words()}")
            record, teacher = read_run(job.task.folder)
            head = {"arm": run.arm, "start": run.start, "seed": run.seed, "steps": run.steps, "flags": run.flags}
            cost = {"seconds": seconds, "threads": int(job.place["OMP_NUM_THREADS"]), "reference": reference}
            records.add({**head, **record, **cost}, teacher)
            if "teacher_distance" in record["student"]:
                words += f", teacher distance {record['student']['teacher_distance']:.5f}"
        except ValueError as error:
            failed[run.name] = f"{error} (see {job.task.folder / 'log.txt'})"
            words += ", failed"
        progress.advance(bar)
        console.print(f"{progress.tasks[0].completed:.0f} of {len(runs)}: {escape(run.name)}: {words}", highlight=False)

    def on_tick(waiting: Sequence[Task], running: Sequence[Job]) -> None:
        rates, now = seconds_per_step(records.runs), time.perf_counter()
        left = remaining_seconds(
            [expected_seconds(by_name[task.name], rates) for task in waiting],
            [(expected_seconds(by_name[job.task.name], rates), now - job.started) for job in running],
            len(shares),
        )
        names = "; ".join(job.task.name for job in running)
        progress.update(bar, note=f"{f'about {in_words(left)} left; ' if rates else ''}{names}")

    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, note, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(runs), completed=len(runs) - len(missing), note="")
        tasks = [Task(run.name, run.folder(config.output_dir)) for run in missing]
        run_side_by_side(tasks, shares, command_of=next_command, on_end=on_end, on_tick=on_tick, lock=lock)
    return failed


def in_words(seconds: float) -> str:
    """A duration for people."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def show_plan(config: ComparisonConfig, runs: Sequence[Run], records: RunRecords, console: Console) -> None:
    """What would be run."""
    for name in config.arms:
        console.print(f"{name}: {ARMS[name].what}", highlight=False, markup=False)
    done = 0
    for run in runs:
        is_done = records.find(run.flags) is not None
        done += is_done
        command = shlex.join(command_of(run, run.folder(config.output_dir), knows_teacher=False))
        console.print(f"{'done' if is_done else 'to do'}: {run.name}", highlight=False, markup=False)
        console.print(f"    {command}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(runs)} runs, {done} of them done; {len(places(config.jobs))} side by side", highlight=False)


def show_results(config: ComparisonConfig, runs: Sequence[Run], records: RunRecords, console: Console) -> None:
    """Print the table of the runs that were asked for, write it down, and draw the figures."""
    found = [(run, record) for run in runs if (record := records.find(run.flags)) is not None]
    if not found:
        return
    comparison = Comparison(
        [{**record, "arm": run.arm} for run, record in found],
        arms=config.arms,
        starts=config.starts,
        control=config.control,
        num_seeds=config.num_seeds,
        reference=records.references.get(found[0][1]["reference"], {}),
    )
    print_tables(comparison, console)
    table = Path(config.output_dir) / "table.md"
    table.write_text(markdown_table(comparison))
    figures = Path(config.figures)
    figures.mkdir(parents=True, exist_ok=True)
    written = [table, records.path]
    for suffix, draw in (("", draw_differences), ("-curves", draw_curves)):
        if (figure := draw(comparison)) is not None:
            written.append(figures / f"{config.preset}{suffix}.png")
            figure.savefig(written[-1], bbox_inches="tight")
    first = [run for run in runs if run.seed == config.seed]
    sheet = draw_samples({f"{run.arm}, {run.start} weights": run.folder(config.output_dir) for run in first})
    if sheet is not None:
        written.append(figures / f"{config.preset}-samples.png")
        sheet.save(written[-1])
    for path in written:
        console.print(f"written: {path}", highlight=False, markup=False)


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as if it were Ctrl-C."""
    raise KeyboardInterrupt(number)


def main(config: ComparisonConfig) -> None:
    """Make the runs that are missing, then show what came of all."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    records = RunRecords(Path(config.results or f"docs/results/{config.preset}.json"))
    runs = plan(config)
    if config.dry_run:
        show_plan(config, runs, records, console)
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with alone_in(Path(config.output_dir)) as lock:
            records.path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the runs
            failed = make_runs(runs, config, records, console, lock)
            show_results(config, runs, records, console)
    except KeyboardInterrupt as error:
        done = sum(records.find(run.flags) is not None for run in runs)
        print(f"interrupted: {done} of {len(runs)} runs are done and kept; the same command goes on", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        for name, words in failed.items():
            console.print(f"failed: {name}: {words}", highlight=False, markup=False)
        names = "; ".join(failed)
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the same command tries again: {names}")


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="screen")
