"""Compare methods of distillation: train_student_unet.py for every arm, start and seed, in one table with intervals.

python recipes/compare_methods.py --preset screen
python recipes/compare_methods.py --preset confirmation
python recipes/compare_methods.py --student_preset custom --teacher FOLDER_OR_HUB_ID --dataset IMAGES

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

from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.run_records import NUM_POINTS, RunRecords, read_run
from vkd_gen.files import whole_file
from vkd_gen.training.command_line import repository_path, run_recipe
from vkd_gen.training.side_by_side import Job, Task, alone_in, places, remaining_seconds, run_side_by_side

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Arm:
    """One method: flags of train_student_unet.py, a line for people, and its steps as a multiple of the others'."""

    flags: tuple[str, ...]
    what: str
    steps_factor: float = 1.0


def features(
    projector: str,
    normalization: str = "none",
    *more: str,
    method: str = "vkd",
    loss: str = "mse",
    weighting: str = "constant",
    weight: float = 0.3,
    decay_start: int = 1,
    decay_end: float = 1,
    denoising: int = 1,
) -> tuple[str, ...]:
    """Flags of an arm with a feature loss, said in full: what --method stands for may change."""
    flags = ["--method", method, "--projector", projector, "--feature_normalization", normalization]
    flags += ["--feature_loss", loss, "--feature_weighting", weighting, "--feature_weight", str(weight)]
    flags += ["--feature_decay_start", str(decay_start), "--feature_decay_end", str(decay_end)]
    return (*flags, "--output_weight", "1", "--denoising_weight", str(denoising), *more)


POOLED = ("down_blocks.0/4", "down_blocks.1/4", "mid_block/4", "up_blocks.0/8", "up_blocks.1/8")
NORMED = (
    *("down_blocks.1.resnets.0.norm1", "mid_block.resnets.0.norm1", "up_blocks.0.resnets.0.norm1"),
    *("up_blocks.1.resnets.2.norm2", "conv_norm_out"),
)
FREE = {"projector": "linear", "method": "fitnet"}
CKA = {"projector": "random", "loss": "cka"}
RATIO = {"weighting": "gradient_ratio"}
DECAYED = {"decay_start": 0}
EARLY = {"decay_start": 0, "decay_end": 0.3}

ARMS: dict[str, Arm] = {
    # Without features: A, A+, B, and B without A.
    "denoising": Arm(("--method", "none", "--denoising_weight", "1"), "denoising alone"),
    "denoising-longer": Arm(
        ("--method", "none", "--denoising_weight", "1"),
        "denoising alone, for as long as features take",
        steps_factor=2.5,
    ),
    "denoising-same-time": Arm(
        ("--method", "none", "--denoising_weight", "1"),
        "denoising alone, for twice the steps: a little more time than features take",
        steps_factor=2.0,
    ),
    "output": Arm(("--method", "output", "--denoising_weight", "1"), "denoising, and the teacher's output"),
    "output-alone": Arm(("--method", "output", "--denoising_weight", "0"), "the teacher's output, without denoising"),
    # Denoising, output and features. C and D: a free map that is learned.
    "fitnet": Arm(features(**FREE), "features by a free 1x1 convolution"),
    "fitnet-weight-0.1": Arm(features(**FREE, weight=0.1), "fitnet, weight 0.1"),
    "fitnet-weight-1": Arm(features(**FREE, weight=1), "fitnet, weight 1"),
    "fitnet-layer-norm": Arm(features(**FREE, normalization="layer_norm"), "fitnet, layer-normalised features"),
    # E and F: an orthogonal map that is learned or stays.
    "learned-identity-layer-norm": Arm(
        features("cayley", "layer_norm", "--projector_start", "identity"),
        "a learned orthogonal map that starts at the identity, layer-normalised features",
    ),
    "learned-procrustes-raw": Arm(
        features("cayley", "none", "--projector_start", "procrustes"),
        "a learned orthogonal map that starts at the closed form",
    ),
    "fixed-random-layer-norm": Arm(
        features("random", "layer_norm"), "a random orthogonal map that stays, layer-normalised features"
    ),
    # G and H: the best orthogonal map, in closed form.
    "solved-raw": Arm(features("solved"), "the best orthogonal map, in closed form"),
    "solved-center": Arm(features("solved", "center"), "solved, features centred per timestep bin"),
    "solved-layer-norm": Arm(features("solved", "layer_norm"), "solved, layer-normalised features"),
    "solved-standardize": Arm(features("solved", "standardize"), "solved, standardised features"),
    "solved-rotated": Arm(
        features("solved", "whiten", "--whitening_exponent", "0"),
        "solved, the teacher's leading directions, as many as the student has channels",
    ),
    "solved-whiten-0.5": Arm(
        features("solved", "whiten", "--whitening_exponent", "0.5"), "solved, leading directions half whitened"
    ),
    "solved-whiten-1": Arm(
        features("solved", "whiten", "--whitening_exponent", "1"), "solved, leading directions whitened"
    ),
    "solved-batch-whiten": Arm(
        features("solved", "batch_whiten"), "solved, all directions whitened by batch statistics"
    ),
    # I and J.
    "vkd-paper": Arm(
        features("matrix_exp", "batch_whiten", method="vkd-paper", loss="smooth_l1"),
        "as published: learned orthogonal map, whitening by batch statistics, smooth L1",
    ),
    "solved-raw-pooled": Arm(features("solved", "none", "--layer_pairs", *POOLED), "solved, means over each image"),
    # Crossings of the layers, the weight and its course.
    "solved-raw-normed": Arm(features("solved", "none", "--layer_pairs", *NORMED), "solved, behind group norms"),
    "solved-raw-mid-and-up": Arm(features("solved", "none", "--layers", "mid_and_up"), "solved, middle and decoder"),
    "solved-raw-last-up": Arm(features("solved", "none", "--layers", "last_up"), "solved, last decoder stage"),
    "solved-raw-weight-0.1": Arm(features("solved", weight=0.1), "solved, weight 0.1"),
    "solved-raw-weight-1": Arm(features("solved", weight=1), "solved, weight 1"),
    "solved-raw-decayed": Arm(features("solved", **DECAYED), "solved, weight falling to 0 over the run"),
    "solved-raw-ratio-0.3": Arm(features("solved", **RATIO), "solved, weight by gradient ratio 0.3"),
    "solved-raw-ratio-1": Arm(features("solved", **RATIO, weight=1), "solved, weight by gradient ratio 1"),
    # A free map in closed form, and none.
    "least-squares-raw": Arm(features("least_squares"), "the best free map, in closed form"),
    "least-squares-center": Arm(features("least_squares", "center"), "the same, features centred per timestep bin"),
    "cka": Arm(features(**CKA), "relations between positions, by linear CKA"),
    # Output and features, without denoising.
    "fitnet-no-denoising": Arm(features(**FREE, denoising=0), "fitnet, without denoising"),
    "solved-raw-no-denoising": Arm(features("solved", denoising=0), "solved, without denoising"),
    "solved-raw-weight-0.1-no-denoising": Arm(
        features("solved", weight=0.1, denoising=0), "solved, weight 0.1, without denoising"
    ),
    "solved-raw-decayed-no-denoising": Arm(
        features("solved", **DECAYED, denoising=0),
        "solved, weight falling to 0 over the run, without denoising",
    ),
    "solved-raw-normed-no-denoising": Arm(
        features("solved", "none", "--layer_pairs", *NORMED, denoising=0),
        "solved, behind group norms, without denoising",
    ),
    "solved-raw-ratio-0.3-no-denoising": Arm(
        features("solved", **RATIO, denoising=0), "solved, weight by gradient ratio 0.3, without denoising"
    ),
    "solved-raw-ratio-1-no-denoising": Arm(
        features("solved", **RATIO, weight=1, denoising=0), "solved, weight by gradient ratio 1, without denoising"
    ),
    "solved-raw-ratio-0.1-no-denoising": Arm(
        features("solved", **RATIO, weight=0.1, denoising=0), "solved, weight by gradient ratio 0.1, without denoising"
    ),
    "solved-raw-ratio-0.3-decayed-no-denoising": Arm(
        features("solved", **DECAYED, **RATIO, denoising=0),
        "solved, weight by gradient ratio 0.3 falling to 0 over the run, without denoising",
    ),
    "solved-raw-ratio-0.3-early-no-denoising": Arm(
        features("solved", **EARLY, **RATIO, denoising=0),
        "solved, weight by gradient ratio 0.3 falling to 0 within the first 0.3 of the run, without denoising",
    ),
    "solved-raw-ratio-1-early-no-denoising": Arm(
        features("solved", **EARLY, **RATIO, weight=1, denoising=0),
        "solved, weight by gradient ratio 1 falling to 0 within the first 0.3 of the run, without denoising",
    ),
    "solved-raw-ratio-1-decayed-no-denoising": Arm(
        features("solved", **DECAYED, **RATIO, weight=1, denoising=0),
        "solved, weight by gradient ratio 1 falling to 0 over the run, without denoising",
    ),
    "least-squares-raw-no-denoising": Arm(
        features("least_squares", denoising=0), "the best free map, in closed form, without denoising"
    ),
    "cka-no-denoising": Arm(features(**CKA, denoising=0), "linear CKA, without denoising"),
    "cka-ratio-0.3-no-denoising": Arm(
        features(**CKA, **RATIO, denoising=0), "linear CKA, weight by gradient ratio 0.3, without denoising"
    ),
    "cka-ratio-0.3-decayed-no-denoising": Arm(
        features("random", **DECAYED, loss="cka", **RATIO, denoising=0),
        "linear CKA, weight by gradient ratio 0.3 falling to 0 over the run, without denoising",
    ),
    "cka-ratio-1-no-denoising": Arm(
        features(**CKA, **RATIO, weight=1, denoising=0), "linear CKA, weight by gradient ratio 1, without denoising"
    ),
}
"""What can be compared. The flags say all that sets an arm apart: defaults may change, records must not."""

STARTS = {"inherited": ("--inherit_weights",), "random": ("--no-inherit_weights",)}
"""Flags of what a student starts from."""

OWN = ("preset", "output_dir", "resume_from_checkpoint", "seed", "max_train_steps", "train_batch_size", "dry_run")
"""Flags of a run that --extra must not have: this command sets them."""

OWN_DATA = ("teacher", "dataset")
"""Flags that replace the student preset's."""

TEACHER_IS_KNOWN: tuple[str, ...] = ("--no-score_teacher",)
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
    student_preset: Literal["digits", "mnist", "cifar10", "custom"] = "digits"
    """Preset of train_student_unet.py."""
    teacher: str = ""
    """Folder or hub id of the teacher; by default the student preset's."""
    dataset: str = ""
    """Images to train on, as for train_student_unet.py; by default the student preset's."""
    max_train_steps: int = 1000
    """Optimizer steps of each run, times the arm's own factor."""
    train_batch_size: int = 32
    """Images per step."""
    learning_rate: float | None = None
    """Peak learning rate; by default the student preset's."""
    num_score_samples: int = 500
    """Samples that a student is scored by."""
    score_every_steps: int = 0
    """Steps between scores during training, for the curves; 0 for none."""
    extra: tuple[str, ...] = ()
    """Further flags of every run, each with its values in one string and without dashes, as "max_train_samples 150"."""
    jobs: int | None = None
    """Runs side by side; by default one per GPU, else one per core. The cores, or GPUs, are shared out."""
    output_dir: str = ""
    """Folder of the runs, and of table.md; by default runs/PRESET, or runs/PRESET-NAME for data or a teacher of your
    own."""
    results: str = ""
    """File of finished runs; by default the preset's in docs/results where only arms, starts and seeds differ from the
    preset, else results.json in --output_dir."""
    figures: str = ""
    """Folder of the figures; by default docs for a preset's own comparison, --output_dir where a flag changed it."""
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
        if self.student_preset == "custom" and not (self.teacher and self.dataset):
            raise ValueError("--student_preset custom needs --teacher and --dataset")
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


SCREEN = ComparisonConfig(
    arms=(
        *("denoising", "denoising-longer", "output", "output-alone", "fitnet", "fitnet-layer-norm"),
        *("learned-identity-layer-norm", "fixed-random-layer-norm"),
        *("solved-raw", "solved-center", "solved-layer-norm", "solved-standardize"),
        *("solved-whiten-0.5", "solved-whiten-1", "vkd-paper", "solved-raw-pooled", "cka"),
        *("solved-raw-no-denoising", "solved-raw-ratio-0.3-no-denoising", "cka-no-denoising"),
    )
)
CROSSINGS = replace(
    SCREEN,
    preset="crossings",
    arms=("output", "output-alone", *(arm for arm in ARMS if arm not in SCREEN.arms)),
    num_seeds=1,
    results="docs/results/screen.json",
)
CROSSINGS_RANDOM = replace(
    CROSSINGS,
    preset="crossings-random",
    arms=(
        *("denoising", "output", "output-alone", "fitnet", "fitnet-no-denoising", "solved-raw"),
        *("solved-raw-no-denoising", "solved-raw-ratio-0.3-no-denoising", "solved-raw-ratio-1-no-denoising"),
        *("solved-raw-ratio-0.3-decayed-no-denoising", "solved-raw-ratio-0.3-early-no-denoising"),
        *("least-squares-raw-no-denoising", "cka-no-denoising", "cka-ratio-1-no-denoising"),
    ),
    starts=("random",),
)
FINALISTS = (
    *("denoising", "denoising-longer", "output", "output-alone", "fitnet"),
    *("solved-raw", "solved-raw-ratio-0.3-no-denoising", "cka-no-denoising"),
)
CONFIRMATION = replace(
    SCREEN,
    preset="confirmation",
    arms=FINALISTS,
    starts=("inherited", "random"),
    seed=100,
    num_seeds=5,
    max_train_steps=600,
)
SECOND_CONFIRMATION = replace(
    CONFIRMATION,
    preset="second-confirmation",
    arms=(
        *("denoising", "denoising-same-time", "denoising-longer", "output", "output-alone", "fitnet"),
        *("solved-raw-ratio-0.3-decayed-no-denoising", "solved-raw-ratio-0.3-early-no-denoising"),
    ),
    starts=("inherited",),
    seed=200,
)
CONFIRMATION_LONG = replace(
    CONFIRMATION,
    preset="confirmation-long",
    arms=("denoising", "output", "output-alone", "fitnet", "solved-raw-ratio-0.3-early-no-denoising"),
    starts=("inherited",),
    max_train_steps=1800,
    num_seeds=3,
)
RANDOM_START = replace(
    CONFIRMATION,
    preset="random-start",
    arms=(
        *("denoising", "denoising-longer", "output", "output-alone", "fitnet"),
        *("solved-raw-ratio-0.3-no-denoising", "solved-raw-ratio-0.3-early-no-denoising"),
    ),
    starts=("random",),
    results="docs/results/confirmation.json",
)
MNIST_SHORT = replace(
    CONFIRMATION,
    preset="mnist-short",
    student_preset="mnist",
    starts=("inherited",),
    num_seeds=3,
    learning_rate=2e-3,
    extra=("teacher recipes/assets/mnist14-teacher", "student ''", "student_width 0.5"),
    results="docs/results/mnist.json",
)
MNIST = replace(
    MNIST_SHORT,
    preset="mnist",
    arms=(
        *("denoising", "denoising-same-time", "output", "output-alone", "fitnet"),
        *("solved-raw-ratio-0.3-decayed-no-denoising", "solved-raw-ratio-0.3-early-no-denoising"),
    ),
    seed=200,
    num_seeds=5,
    max_train_steps=1000,
    num_score_samples=1000,
    extra=(
        *("teacher recipes/assets/mnist14-teacher-longer", "student ''", "student_width 0.5"),
        "timestep_weighting min_snr",
    ),
)
MNIST_SAME_TIME = replace(
    MNIST,
    preset="mnist-same-time",
    arms=("denoising-same-time", "solved-raw-ratio-0.3-early-no-denoising"),
    control="solved-raw-ratio-0.3-early-no-denoising",
    num_seeds=25,
)
MNIST_SCREEN = replace(
    MNIST_SHORT,
    preset="mnist-screen",
    arms=(
        *("denoising-same-time", "output", "output-alone", "solved-raw-ratio-0.3-no-denoising"),
        *("solved-raw-ratio-0.3-decayed-no-denoising", "solved-raw-ratio-1-decayed-no-denoising"),
        *("solved-raw-ratio-0.1-no-denoising", "cka-ratio-0.3-decayed-no-denoising"),
    ),
    seed=0,
    num_seeds=1,
    max_train_steps=2000,
    num_score_samples=1000,
    results="docs/results/mnist-screen.json",
)
DIGITS_TENTH = replace(
    CONFIRMATION,
    preset="digits-tenth",
    arms=(*FINALISTS, "solved-raw-ratio-0.3-early-no-denoising"),
    starts=("inherited",),
    num_seeds=3,
    extra=("max_train_samples 150",),
)
CIFAR10 = replace(
    CONFIRMATION,
    preset="cifar10",
    student_preset="cifar10",
    arms=(
        *("denoising", "denoising-same-time", "output", "output-alone", "fitnet"),
        "solved-raw-ratio-0.3-early-no-denoising",
    ),
    starts=("inherited",),
    seed=200,
    num_seeds=3,
    max_train_steps=300,
    learning_rate=2e-3,
    extra=(
        *("teacher recipes/assets/cifar16-teacher", "student_width 0.5", "lr_warmup_steps 0"),
        *("dataloader_num_workers 0", "extractor none"),
    ),
)
PRESETS = {
    config.preset: config
    for config in (
        *(SCREEN, CROSSINGS, CROSSINGS_RANDOM),
        *(CONFIRMATION, SECOND_CONFIRMATION, CONFIRMATION_LONG, RANDOM_START),
        *(MNIST_SHORT, MNIST, MNIST_SAME_TIME, MNIST_SCREEN, DIGITS_TENTH, CIFAR10),
    )
}


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
    for name in OWN_DATA:
        if value := getattr(config, name):
            flags += [f"--{name}", value]
    return [*flags, "--kid_subset_size", str(subset)]


def extra_flags(config: ComparisonConfig) -> list[str]:
    """What --extra says, as words of a command line; a flag of this command's own goes before one in a preset's."""
    lines = [(words[0].lstrip("-"), *words[1:]) for words in map(shlex.split, config.extra)]
    lines = [words for words in lines if words[0] not in OWN_DATA or not getattr(config, words[0])]
    return [word for name, *values in lines for word in (f"--{name}", *values)]


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
    # Here, since they take seconds to load: flags are read before.
    from vkd_gen.evaluation.method_figures import draw_curves, draw_differences, draw_samples
    from vkd_gen.evaluation.method_tables import Comparison, markdown_table, print_tables

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
    with whole_file(table) as temporary:
        temporary.write_text(markdown_table(comparison))
    figures = Path(config.figures)
    figures.mkdir(parents=True, exist_ok=True)
    written = [table, records.path]
    for suffix, draw in (("", draw_differences), ("-curves", draw_curves)):
        if (figure := draw(comparison)) is not None:
            written.append(figures / f"{config.preset}{suffix}.png")
            with whole_file(written[-1]) as temporary:
                figure.savefig(temporary, bbox_inches="tight")
    first = [run for run in runs if run.seed == config.seed]
    sheet = draw_samples({f"{run.arm}, {run.start} weights": run.folder(config.output_dir) for run in first})
    if sheet is not None:
        written.append(figures / f"{config.preset}-samples.png")
        with whole_file(written[-1]) as temporary:
            sheet.save(temporary)
    for path in written:
        console.print(f"written: {path}", highlight=False, markup=False)


WHERE = ("jobs", "output_dir", "figures", "dry_run")
"""Fields that say where and how fast runs are made, not which."""
WHICH = ("arms", "control", "starts", "seed", "num_seeds")
"""Fields that choose among the runs that a preset's results file is for."""


def is_as_preset(config: ComparisonConfig, but_for: Sequence[str] = WHERE) -> bool:
    """Whether it compares what its preset does, by its records; wherever the runs, however many side by side."""
    return config == replace(PRESETS[config.preset], **{name: getattr(config, name) for name in but_for})


def with_places(config: ComparisonConfig) -> ComparisonConfig:
    """Fill in where runs, results and figures go: the committed ones hold the presets' own comparisons alone."""
    own = config.dataset or config.teacher
    folder = config.output_dir or f"runs/{config.preset}{'-' + data_label(own) if own else ''}"
    results = config.results
    if results == PRESETS[config.preset].results:  # which the user did not choose
        is_known = is_as_preset(config, but_for=(*WHERE, *WHICH))
        committed = repository_path(results or f"docs/results/{config.preset}.json", __file__)
        results = committed if is_known else f"{folder}/results.json"
    figures = config.figures or (repository_path("docs", __file__) if is_as_preset(config) else folder)
    return replace(config, output_dir=folder, results=results, figures=figures)


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as if it were Ctrl-C."""
    raise KeyboardInterrupt(number)


def main(config: ComparisonConfig) -> None:
    """Make the runs that are missing, then show what came of all."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    config = with_places(config)
    records = RunRecords(Path(config.results))
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
