"""Which runs a comparison makes: its configuration, the presets, and the command of each run."""

import difflib
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from arms import ARMS, BY_ADAMW, STARTS
from vkd_gen.cli import repository_path
from vkd_gen.evaluation.labels import data_label

ROOT = Path(__file__).parents[1]
OWN = ("preset", "output_dir", "resume_from_checkpoint", "seed", "max_train_steps", "train_batch_size", "dry_run")
"""Flags that this command sets itself for every run; --extra must not have them."""
OWN_DATA = ("teacher", "dataset")
"""Flags that replace those of the student preset."""
WHERE = ("jobs", "output_dir", "figures", "dry_run")
"""Fields that say where and how fast runs are made, not which."""
WHICH = ("arms", "control", "starts", "seed", "num_seeds")
"""Fields that choose among the runs of a preset's results file."""
NUM_LOG_LINES = 20
"""Log lines of a run."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Compare methods of distillation. What is done already is not done again."""

    preset: str = "screen"
    """Which comparison to start from; every flag overrides a field of it."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Methods to compare, by their names in arms.py."""
    control: str = "output"
    """The arm that the others are compared to, seed by seed."""
    starts: tuple[Literal["inherited", "random"], ...] = ("inherited",)
    """What students start from: the teacher's weights, or random ones."""
    seed: int = 0
    """First seed; it decides initialisation, data order, noise and timesteps."""
    num_seeds: int = 2
    """Runs of every arm from every start."""
    student_preset: Literal["digits", "mnist", "cifar10", "custom"] = "digits"
    """Preset of train_student_unet.py."""
    teacher: str = ""
    """Folder or hub id of the teacher; by default the student preset's."""
    dataset: str = ""
    """Images to train on, as for train_student_unet.py; by default the student preset's."""
    max_train_steps: int = 1000
    """Optimizer steps of each run, multiplied by the arm's own factor."""
    train_batch_size: int = 32
    """Images per step."""
    learning_rate: float | None = None
    """Peak learning rate; by default the student preset's."""
    num_score_samples: int = 500
    """Samples of each student to score."""
    score_every_steps: int = 0
    """Steps between scores during training, which eval/report.py draws; 0 for none."""
    extra: tuple[str, ...] = ()
    """Further flags of every run, each with its values in one string and without dashes, as "max_train_samples 150"."""
    jobs: int | None = None
    """Runs at a time; by default one per GPU, else one per core. They share the cores, or GPUs, equally."""
    output_dir: str = ""
    """Folder of the runs and of table.md; by default runs/PRESET, or runs/PRESET-NAME for your own data or teacher."""
    results: str = ""
    """File of finished runs; by default the preset's in experiments/results if only arms, starts and seeds differ from
    the preset, else results.json in --output_dir."""
    figures: str = ""
    """Folder of the figure; by default that of the results, or --output_dir if a flag changed the comparison."""
    dry_run: bool = False
    """Print what would be run and what is done, then stop."""

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
            try:
                name = (shlex.split(text) or [""])[0].lstrip("-")
            except ValueError as error:  # a quotation mark without its twin
                raise ValueError(f"--extra {text!r} cannot be read as a shell would: {error}") from error
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
            if self.learning_rate is None and ARMS[arm].rate_factor != 1:
                raise ValueError(f"arm {arm} has a multiple of the others' learning rate: give --learning_rate")
        if self.control not in self.arms:
            raise ValueError(f"--control {self.control} is not among the arms: {', '.join(self.arms)}")

    @property
    def runs_folder(self) -> Path:
        """Folder of the runs."""
        own = self.dataset or self.teacher
        return Path(self.output_dir or f"runs/{self.preset}{'-' + data_label(own) if own else ''}")

    @property
    def results_file(self) -> Path:
        """File of finished runs; the committed ones hold the presets' own comparisons only."""
        if self.results != PRESETS[self.preset].results:  # which the user chose
            return Path(self.results)
        if not self._is_as_preset(but_for=(*WHERE, *WHICH)):
            return self.runs_folder / "results.json"
        return Path(repository_path(self.results or f"experiments/results/{self.preset}.json", __file__))

    @property
    def figures_folder(self) -> Path:
        """Folder of the figure: that of the results only if it shows what the preset compares, by its records."""
        if self.figures:
            return Path(self.figures)
        return self.results_file.parent if self._is_as_preset(but_for=WHERE) else self.runs_folder

    def _is_as_preset(self, but_for: Sequence[str]) -> bool:
        return self == replace(PRESETS[self.preset], **{name: getattr(self, name) for name in but_for})


DEFAULT = "solved-raw-ratio-0.3-early-no-denoising"
BOTH_BRANCHES = "solved-raw-ratio-0.3-early-both-branches-no-denoising"
TWICE = "solved-raw-ratio-0.3-early-twice-no-denoising"
DECAYED = "solved-raw-ratio-0.3-decayed-no-denoising"
CONTROLS = ("denoising", "denoising-same-time", "output", "output-alone", "fitnet")
FINALISTS = (
    *("denoising", "denoising-longer", "output", "output-alone", "fitnet"),
    *("solved-raw", "solved-raw-ratio-0.3-no-denoising", "cka-no-denoising"),
)
SCREEN = ComparisonConfig(
    arms=tuple(arm for arm in BY_ADAMW if arm not in ("denoising-same-time", "bk", DEFAULT, BOTH_BRANCHES, TWICE))
)
CONFIRMATION = replace(SCREEN, preset="confirmation", arms=FINALISTS, seed=100, num_seeds=5, max_train_steps=600)
SECOND_CONFIRMATION = replace(
    CONFIRMATION,
    preset="second-confirmation",
    arms=(
        *("denoising", "denoising-same-time", "denoising-longer", "output", "output-alone", "fitnet"),
        *(DECAYED, DEFAULT),
    ),
    seed=200,
)
RANDOM_START = replace(
    CONFIRMATION,
    preset="random-start",
    arms=(*FINALISTS, DEFAULT),
    starts=("random",),
    results="experiments/results/confirmation.json",
)
MNIST = replace(
    CONFIRMATION,
    preset="mnist",
    student_preset="mnist",
    arms=(*CONTROLS, DECAYED, DEFAULT),
    seed=200,
    max_train_steps=1000,
    learning_rate=2e-3,
    num_score_samples=1000,
    extra=(
        *("teacher recipes/assets/mnist14-teacher-longer", "student ''", "student_width 0.5"),
        "timestep_weighting min_snr",
    ),
)
MNIST_SAME_TIME = replace(
    MNIST,
    preset="mnist-same-time",
    arms=("denoising-same-time", DEFAULT),
    control=DEFAULT,
    num_seeds=25,
    results="experiments/results/mnist.json",
)
DIGITS_TENTH = replace(
    CONFIRMATION,
    preset="digits-tenth",
    arms=(*FINALISTS, DEFAULT),
    num_seeds=3,
    extra=("max_train_samples 150",),
)
CIFAR10 = replace(
    CONFIRMATION,
    preset="cifar10",
    student_preset="cifar10",
    arms=(*CONTROLS, DEFAULT),
    seed=200,
    num_seeds=3,
    max_train_steps=300,
    learning_rate=2e-3,
    extra=(
        *("teacher recipes/assets/cifar16-teacher", "student_width 0.5", "lr_warmup_steps 0"),
        *("dataloader_num_workers 0", "extractor none"),
    ),
)
EMOJI = replace(
    CONFIRMATION,
    preset="emoji",
    student_preset="custom",
    teacher="recipes/assets/emoji-teacher",
    dataset="emoji",
    arms=("denoising", "output", "output-alone", "fitnet", "bk", DEFAULT, BOTH_BRANCHES, TWICE),
    seed=0,
    num_seeds=1,
    max_train_steps=300,
    learning_rate=1e-3,
    extra=(
        # As wide as the teacher, which BK-SDM's recipe asks for, and without its lower stage and middle.
        *("student bk-tiny", "no-random_flip", "dataloader_num_workers 0", "lr_warmup_steps 50"),
        *("checkpointing_steps 100", "extractor none"),
    ),
)
FASTER = ("fitnet", DEFAULT, "muon-output-alone", "muon", "muon-same-time", "muon-half", "muon-third")
FASTER_DIGITS = replace(
    CONFIRMATION,
    preset="faster-digits",
    arms=FASTER,
    control=DEFAULT,
    seed=300,
    num_seeds=3,
    learning_rate=2e-3,
)
FASTER_MNIST = replace(
    MNIST,
    preset="faster-mnist",
    arms=("fitnet", DEFAULT, "muon-output-alone", "muon", "muon-same-time", "muon-half"),
    control=DEFAULT,
    seed=300,
    num_seeds=3,
    max_train_steps=300,
    num_score_samples=500,
)
FASTER_CIFAR10 = replace(
    CIFAR10,
    preset="faster-cifar10",
    arms=(DEFAULT, "muon", "muon-half"),
    control=DEFAULT,
    seed=300,
    num_seeds=3,
)
PRESETS = {
    config.preset: config
    for config in (
        *(
            SCREEN,
            CONFIRMATION,
            SECOND_CONFIRMATION,
            RANDOM_START,
            MNIST,
            MNIST_SAME_TIME,
            DIGITS_TENTH,
            CIFAR10,
            EMOJI,
            FASTER_DIGITS,
            FASTER_MNIST,
            FASTER_CIFAR10,
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """One run to make: its flags decide its result and identify its record."""

    arm: str
    start: str
    seed: int
    steps: int
    flags: str
    folder: Path
    """A run with other flags has another one."""
    note: str = ""
    """What tells it from others of its arm, start and seed, where there are such."""

    @property
    def name(self) -> str:
        """What people read; unique in a comparison."""
        return f"{self.arm}, {self.start}, seed {self.seed}{f', {self.note}' if self.note else ''}"


def teacher_flags(config: ComparisonConfig) -> list[str]:
    """The flags that decide the scores of the teacher and of held-out images; --extra may add to them."""
    subset = max(2, min(250, config.num_score_samples // 2))
    flags = ["--preset", config.student_preset, "--num_score_samples", str(config.num_score_samples)]
    for name in OWN_DATA:
        if value := getattr(config, name):
            flags += [f"--{name}", value]
    return [*flags, "--kid_subset_size", str(subset)]


def extra_flags(config: ComparisonConfig) -> list[str]:
    """--extra as words of a command line; --teacher and --dataset replace those of a preset's --extra."""
    lines = [(words[0].lstrip("-"), *words[1:]) for words in map(shlex.split, config.extra)]
    lines = [words for words in lines if words[0] not in OWN_DATA or not getattr(config, words[0])]
    return [word for name, *values in lines for word in (f"--{name}", *values)]


def plan(config: ComparisonConfig) -> list[Run]:
    """All runs that were asked for, seed by seed, so that a comparison that is cut short compares equal seeds."""
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm in config.arms:
            steps = max(1, round(config.max_train_steps * ARMS[arm].steps_factor))
            for start in config.starts:
                words = [*teacher_flags(config), *ARMS[arm].flags, *STARTS[start], "--seed", str(seed)]
                words += ["--max_train_steps", str(steps), "--train_batch_size", str(config.train_batch_size)]
                if (rate := _learning_rate(config, arm)) is not None:
                    words += ["--learning_rate", str(rate)]
                if config.score_every_steps:
                    words += ["--score_every_steps", str(config.score_every_steps)]
                flags = shlex.join([*words, *extra_flags(config)])
                digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
                folder = config.runs_folder / start / f"{arm}-seed-{seed}-{digest}"
                runs.append(Run(arm, start, seed, steps, flags, folder))
    return runs


def _learning_rate(config: ComparisonConfig, arm: str) -> float | None:
    """The comparison's, untouched unless the arm has a multiple of it: runs are known by their flags."""
    factor = ARMS[arm].rate_factor
    if config.learning_rate is None or factor == 1:
        return config.learning_rate
    return float(f"{config.learning_rate * factor:.6g}")  # .0014, not .0014000000000000002


def command_of(run: Run, *, knows_teacher: bool) -> list[str]:
    """The command that makes a run, or resumes it; a teacher whose scores are known is not scored again."""
    command = [sys.executable, str(ROOT / "recipes" / "train_student_unet.py"), *shlex.split(run.flags)]
    command += ["--output_dir", str(run.folder), "--resume_from_checkpoint", "latest", "--preview_every_steps", "0"]
    command += ["--log_every_steps", str(-(-run.steps // NUM_LOG_LINES)), "--checkpoints_total_limit", "1"]
    return [*command, *(["--no-score_teacher"] if knows_teacher else [])]
