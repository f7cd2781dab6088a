"""Compare ways to start a student from its teacher: before training, and after a short one by train_student_unet.py.

python experiments/compare_inheritance.py
python experiments/compare_inheritance.py --num_seeds 1 --widths 0.5
"""

import hashlib
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tables import decimals_for, print_tables

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.cli import announce, repository_path, run_command
from vkd_gen.evaluation.labels import label_of
from vkd_gen.evaluation.tables import Table
from vkd_gen.provenance import environment, write_json
from vkd_gen.reductions import Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from vkd_gen.data.images import Images

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "experiments" / "results" / "inheritance.json"

ARMS = {
    "random initialisation": ("--no-inherit_weights",),
    "random channels, fitted": ("--inherit_channels", "random"),
    "first channels, fitted": ("--inherit_channels", "first"),
    "largest weights, fitted": ("--inherit_channels", "magnitude"),
    "activation-aware, fitted": ("--inherit_channels", "activation"),
}
"""Flags of train_student_unet.py for each way that is trained."""
TRAINING = {"train_batch_size": 64, "num_score_samples": 300}
"""Flags of all runs that the results file names."""


@dataclass(frozen=True, kw_only=True)
class InheritanceConfig:
    """Compare ways to start a student from its teacher. What is done already is not done again."""

    widths: tuple[float, ...] = (0.5, 0.25)
    """Factors on the teacher's channels."""
    step0_teachers: tuple[str, ...] = ("recipes/assets/digits-teacher=digits", "recipes/assets/mnist-teacher=mnist")
    """Teachers whose students' errors are measured before training, each as FOLDER=DATASET."""
    num_draws: int = 256
    """Draws that students start from, and draws of other images to measure them on."""
    num_seeds: int = 3
    """Runs of each way, and random choices before training."""
    max_train_steps: int = 300
    """Steps of each run on the digits; 0 for no runs."""
    output_dir: str = "runs/inheritance"
    """Folder of the runs."""
    results: str = ""
    """File to write; by default experiments/results/inheritance.json, or inheritance.json in --output_dir if a flag
    changes what is compared."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name, value in {"num_draws": 1, "num_seeds": 1, "max_train_steps": 0}.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} must be at least {value}, not {getattr(self, name)}")
        if wrong := [text for text in self.step0_teachers if text.count("=") != 1]:
            raise ValueError(f"--step0_teachers takes FOLDER=DATASET, not {wrong[0]}")

    @property
    def results_file(self) -> Path:
        """The committed file for the default comparison only."""
        is_default = self == replace(InheritanceConfig(), output_dir=self.output_dir, results=self.results)
        return Path(self.results or (COMMITTED if is_default else f"{self.output_dir}/inheritance.json"))


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, spread and the values themselves."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_deviation": spread, "values": values}


def load(config: InheritanceConfig, folder: str, dataset: str) -> "tuple[Any, Any, Any, list[dict[str, Tensor]]]":
    """A teacher, its schedule, a function seed -> batches to start students from, and batches of other images."""
    from vkd_gen.data.draws import Draws
    from vkd_gen.data.samples import Pixels
    from vkd_gen.data.sources import load_images
    from vkd_gen.schedule import Schedule
    from vkd_gen.training.unets import load_teacher

    teacher, noise_scheduler, _ = load_teacher(repository_path(folder, __file__))
    schedule = Schedule.of(noise_scheduler)
    images, held_out = load_images(dataset, resolution=teacher.config.sample_size, channels=teacher.config.in_channels)

    def draws(source: "Images", seed: int) -> "list[dict[str, Tensor]]":
        return list(Draws(Pixels(source), schedule, seed=seed).apart(config.num_draws))

    return teacher, schedule, partial(draws, images), draws(held_out, seed=1_000_003)


def errors_before_training(config: InheritanceConfig, folder: str, dataset: str, width: float) -> dict[str, Any]:
    """For each choice of channels and each rescaling the student's error before any training."""
    import torch

    from vkd_gen.families import build_student, inherit_weights, step0_error

    teacher, schedule, train_batches, tests = load(config, folder, dataset)
    ways: list[Any] = [None]
    ways += itertools.product(("random", "first", "magnitude", "activation"), ("none", "fan_in", "least_squares"))
    rows: dict[str, list[float]] = {}
    for seed in range(config.num_seeds):
        batches = train_batches(seed)
        for way in ways:
            torch.manual_seed(seed)
            student = build_student(teacher, Reduction(width=width))
            if way:
                options = dict(zip(("channels", "rescaling"), way, strict=True))
                inherit_weights(student, teacher, **options, batches=batches, schedule=schedule, seed=seed)
            name = ", ".join(way) if way else "random initialisation"
            rows.setdefault(name, []).append(step0_error(student, teacher, tests, schedule))
        print(f"{dataset} width {width}: seed {seed} of {config.num_seeds} measured", flush=True)
    return {name: summary(values) for name, values in rows.items()}


def errors_by_layers(config: InheritanceConfig, folder: str, dataset: str) -> list[dict[str, Any]]:
    """With one layer in each block: the error before training for every choice of the teacher's layers."""
    from vkd_gen.families import build_student, compare_layer_choices, layer_choices

    teacher, schedule, _, tests = load(config, folder, dataset)
    student = build_student(teacher, Reduction(layers_per_block=1))
    results = compare_layer_choices(student, teacher, tests, schedule)
    default = layer_choices(student, teacher)[0]
    return [{"error": error, "layers": layers, "default": layers == default} for error, layers in results]


def train(config: InheritanceConfig, width: float, arm: str, seed: int) -> dict[str, float]:
    """The student's scores from one run of train_student_unet.py, which is made if it is not there."""
    settings = {
        "student_width": width,
        "seed": seed,
        "max_train_steps": config.max_train_steps,
        "lr_warmup_steps": min(50, config.max_train_steps),
        "inherit_samples": config.num_draws,
        **TRAINING,
        "num_inference_steps": 50,
        "kid_subset_size": 150,
        "optimizer": "adamw",
        "timestep_sampling": "random",
    }
    flags = [*ARMS[arm], *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]  # a run of other flags has another folder
    folder = Path(config.output_dir) / f"{arm.replace(' ', '-').replace(',', '')}-seed-{seed}-{digest}"
    if not (folder / "results.json").exists():
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "train_student_unet.py")]
        command += [*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        done = subprocess.run([*command, "--preview_every_steps", "0"], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the run in {folder} failed: {done.stderr[-500:]}")
        print(f"{folder}: done", flush=True)
    return json.loads((folder / "results.json").read_text())["rows"]["student"]


def layers_table(*files: dict[str, Any]) -> Table:
    """The error before training of students with one layer in each block, by the choice of the teacher's layers."""
    header = ["choices", "the rule", "best", "worst with the very last layer", "best without it"]
    rows: dict[str, list[str]] = {}
    for teacher, choices in ((name, rows) for known in files for name, rows in known["layers"].items()):
        if len(choices) < 2:  # the teacher has one layer in each block
            continue
        errors = [choice["error"] for choice in choices]  # in rising order
        rule = next(choice["error"] for choice in choices if choice["default"])
        block = max(name for name in choices[0]["layers"] if name.startswith("up_blocks"))
        last = max(max(choice["layers"][block]) for choice in choices)
        with_last = [choice["error"] for choice in choices if last in choice["layers"][block]]
        others = [f"{error:.4f}" for error in errors if error not in with_last] or ["-"]
        place = f"{rule:.4f} (place {errors.index(rule) + 1})"
        rows[teacher] = [str(len(choices)), place, f"{errors[0]:.4f}", f"{max(with_last):.4f}", others[0]]
    return Table(list(rows), [(heading, [cells[i] for cells in rows.values()]) for i, heading in enumerate(header)])


def tables_before_training(*files: dict[str, Any]) -> dict[str, Table]:
    """Title -> table of every teacher and width; none without results."""
    columns = {name: rows for known in files for name, rows in known["before_training"].items()}
    tables = {"Error before training": _table(columns, 4), "Error before training, by layers": layers_table(*files)}
    return {title: table for title, table in tables.items() if table.names}


def tables_after_training(known: dict[str, Any]) -> dict[str, Table]:
    """Title -> table of the scores after the runs, for each width."""
    tables = {}
    for width, arms in known["after_training"].items():
        scores = dict.fromkeys(score for cells in arms.values() for score in cells)
        columns = {label_of(score): {arm: cells[score] for arm, cells in arms.items()} for score in scores}
        tables[f"After {known['protocol']['max_train_steps']} steps, {width}"] = _table(columns)
    return tables


def _table(columns: dict[str, dict[str, dict[str, Any]]], decimals: int | None = None) -> Table:
    """Means and standard deviations over seeds, from column -> row -> cell."""
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    table = []
    for heading, rows in columns.items():
        places = decimals_for([cell["mean"] for cell in rows.values()]) if decimals is None else decimals
        spreads = {name: (cell["mean"], cell["standard_deviation"]) for name, cell in rows.items()}
        texts = {name: f"{mean:.{places}f} ± {spread:.{places}f}" for name, (mean, spread) in spreads.items()}
        table.append((heading, [texts.get(name, "-") for name in names]))
    return Table(names, table)


def read_results(config: InheritanceConfig) -> dict[str, Any]:
    """What is known already of the same comparison; what is there of another one is dropped."""
    path = config.results_file
    try:
        known = dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"cannot read the results in {path}: {error}; repair the file, or move it away") from error
    protocol = {name: getattr(config, name) for name in ("num_draws", "num_seeds", "max_train_steps")} | TRAINING
    if known.get("protocol") != protocol:
        known = {"protocol": protocol, "before_training": {}, "layers": {}, "after_training": {}}
    return known | {"environment": environment()}


def main(config: InheritanceConfig) -> None:
    """Measure before training, then train, and write after every step what is known so far."""
    path, known = config.results_file, read_results(config)
    announce(f"comparing starts of students, into {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in config.step0_teachers:
        folder, dataset = text.split("=")
        name = Path(folder).name
        if name not in known["layers"]:
            known["layers"][name] = errors_by_layers(config, folder, dataset)
            write_json(path, known)
        for width in config.widths:
            column = f"{name} width {width}"
            if column not in known["before_training"]:
                known["before_training"][column] = errors_before_training(config, folder, dataset, width)
                write_json(path, known)
    print_tables(tables_before_training(known))
    if not config.max_train_steps:
        return
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    # Seed by seed, so that a comparison that is cut short compares equal seeds.
    for seed, width, arm in itertools.product(range(config.num_seeds), config.widths, ARMS):
        row = train(config, width, arm, seed)
        cells = scores.setdefault(f"width {width}", {}).setdefault(arm, {})
        for score in ("fid_digits", "teacher_distance", "denoising_error"):
            cells.setdefault(score, []).append(row[score])
        known["after_training"] = {
            title: {name: {key: summary(values) for key, values in cells.items()} for name, cells in rows.items()}
            for title, rows in scores.items()
        }
        write_json(path, known)
    print_tables(tables_after_training(known))


if __name__ == "__main__":
    run_command(main, InheritanceConfig, __doc__)
