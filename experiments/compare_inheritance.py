"""Compare ways to start a student from its teacher: before training, and after a short one by train_student_unet.py.

python experiments/compare_inheritance.py
python experiments/compare_inheritance.py --num_seeds 1 --widths 0.5
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tables import TextTable, decimals_for, print_tables
from vkd_gen.cli import announce, repository_path, run_recipe

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.evaluation.labels import label_of
from vkd_gen.provenance import environment, write_json
from vkd_gen.reductions import Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from vkd_gen.data.images import Images

ROOT = Path(__file__).parents[1]

ARMS = {
    "random initialisation": ("--no-inherit_weights",),
    "random channels, fitted": ("--inherit_channels", "random"),
    "first channels, fitted": ("--inherit_channels", "first"),
    "largest weights, fitted": ("--inherit_channels", "magnitude"),
    "activation-aware, fitted": ("--inherit_channels", "activation"),
    "activation-aware": ("--inherit_channels", "activation", "--inherit_rescaling", "none"),
}
"""Flags of train_student_unet.py for each way that is trained."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Compare ways to start a student from its teacher. What is done already is not done again."""

    preset: str = "default"
    """There is one preset."""
    widths: tuple[float, ...] = (0.5, 0.25)
    """Factors on the teacher's channels."""
    step0_teachers: tuple[str, ...] = ("recipes/assets/digits-teacher=digits", "recipes/assets/mnist-teacher=mnist")
    """Teachers to measure the error before training on, each as FOLDER=DATASET."""
    num_draws: int = 256
    """Draws that students start from, and as many, of other images, to measure them on."""
    num_seeds: int = 3
    """Runs of every way, and random choices before training."""
    max_train_steps: int = 300
    """Steps of each run on the digits; 0 for none."""
    train_batch_size: int = 64
    """Images per step."""
    num_score_samples: int = 300
    """Samples that each run's Frechet distance is computed from."""
    output_dir: str = "runs/inheritance"
    """Folder of the runs."""
    results: str = ""
    """File to write; by default experiments/results/inheritance.json, or inheritance.json in --output_dir where a flag
    changes what is compared."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        least = {"num_draws": 1, "num_seeds": 1, "max_train_steps": 0, "train_batch_size": 1, "num_score_samples": 10}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} must be at least {value}, not {getattr(self, name)}")
        if wrong := [text for text in self.step0_teachers if text.count("=") != 1]:
            raise ValueError(f"--step0_teachers takes FOLDER=DATASET, not {wrong[0]}")


PRESETS = {"default": ComparisonConfig()}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, spread and the values themselves."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_deviation": spread, "values": values}


def load(config: ComparisonConfig, folder: str, dataset: str) -> "tuple[Any, Any, Any, list[dict[str, Tensor]]]":
    """A teacher, its schedule, batches to start students from by seed, and batches of other images to test on."""
    import torch

    from vkd_gen.data.sources import load_images
    from vkd_gen.schedule import Schedule
    from vkd_gen.training.loop import fixed_batches
    from vkd_gen.training.models import load_teacher

    teacher, noise_scheduler, _ = load_teacher(repository_path(folder, __file__))
    schedule = Schedule.of(noise_scheduler)
    images, held_out = load_images(dataset, resolution=teacher.config.sample_size, channels=teacher.config.in_channels)

    def draws(source: "Images", seed: int) -> "list[dict[str, Tensor]]":
        num_draws, device = config.num_draws, torch.device("cpu")
        return list(fixed_batches(source, schedule, seed=seed, num_draws=num_draws, batch_size=64, device=device))

    return teacher, schedule, partial(draws, images), draws(held_out, seed=1_000_003)


def errors_before_training(config: ComparisonConfig, folder: str, dataset: str, width: float) -> dict[str, Any]:
    """For each choice of channels and each rescaling the student's error before any training."""
    import torch

    from vkd_gen.families import build_student, inherit_weights, step0_error

    teacher, schedule, train_batches, tests = load(config, folder, dataset)
    rows: dict[str, list[float]] = {}
    for seed in range(config.num_seeds):
        batches = train_batches(seed)
        channels: Any  # one of the library's names, but for the first
        for channels in ("random initialisation", "random", "first", "magnitude", "activation"):
            for rescaling in ("none", "fan_in", "least_squares"):
                torch.manual_seed(seed)
                student = build_student(teacher, Reduction(width=width))
                name = channels
                if channels != "random initialisation":
                    inherit_weights(
                        student,
                        teacher,
                        channels=channels,
                        rescaling=rescaling,
                        batches=batches,
                        schedule=schedule,
                        seed=seed,
                    )
                    name = f"{channels}, {rescaling}"
                elif rescaling != "none":
                    continue
                error = step0_error(student, teacher, tests, schedule)
                rows.setdefault(name, []).append(error)
        print(f"{dataset} width {width}: seed {seed} of {config.num_seeds} measured", flush=True)
    return {name: summary(values) for name, values in rows.items()}


def errors_by_layers(config: ComparisonConfig, folder: str, dataset: str) -> list[dict[str, Any]]:
    """With one layer in each block: the error before training for every choice of the teacher's layers."""
    from vkd_gen.families import build_student, compare_layer_choices, layer_choices

    teacher, schedule, train_batches, tests = load(config, folder, dataset)
    student = build_student(teacher, Reduction(layers_per_block=1))
    options: dict[str, Any] = {"test_batches": tests, "rescaling": "none"}
    results = compare_layer_choices(student, teacher, train_batches(0), schedule, **options)
    default = layer_choices(student, teacher)[0]
    return [{"error": error, "layers": layers, "default": layers == default} for error, layers in results]


def train(config: ComparisonConfig, width: float, arm: str, seed: int) -> dict[str, float]:
    """The student's row of results.json of one run of train_student_unet.py, which is made if it is not there."""
    name = arm.replace(" ", "-").replace(",", "")
    folder = Path(config.output_dir) / f"width-{width}" / f"{name}-seed-{seed}"
    settings: dict[str, int | str] = {
        "max_train_steps": config.max_train_steps,
        "lr_warmup_steps": min(50, config.max_train_steps),
        "train_batch_size": config.train_batch_size,
        "num_score_samples": config.num_score_samples,
        "num_inference_steps": 50,
        "kid_subset_size": config.num_score_samples // 2,
        "inherit_samples": config.num_draws,
    }
    if (folder / "results.json").exists():
        made_by = json.loads((folder / "config.json").read_text())
        if changed := [
            f"--{name} {made_by.get(name)}" for name, value in settings.items() if made_by.get(name) != value
        ]:
            raise ValueError(f"{folder} holds a run by {' '.join(changed)}; choose another --output_dir")
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "train_student_unet.py")]
        command += ["--student_width", str(width), "--seed", str(seed), "--output_dir", str(folder), *ARMS[arm]]
        settings |= {"resume_from_checkpoint": "latest", "preview_every_steps": 0}
        command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the run in {folder} failed: {done.stderr[-500:]}")
        print(f"{folder}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads((folder / "results.json").read_text())["rows"]["student"]


def before_training_table(*files: dict[str, Any]) -> TextTable:
    """The error before training, for each choice of channels and each rescaling, of every teacher and width."""
    columns = {name: rows for known in files for name, rows in known["before_training"].items()}
    return _table("Error before training", columns, dict.fromkeys(columns, 4))


def layers_table(*files: dict[str, Any]) -> TextTable:
    """For students with one layer in each block: what the choice of the teacher's layers is worth before training."""
    header = ["teacher", "choices", "the rule", "best", "worst with the very last layer", "best without it"]
    rows = []
    for teacher, choices in ((name, rows) for known in files for name, rows in known["layers"].items()):
        if len(choices) < 2:  # as of a teacher with one layer in each block
            continue
        errors = [choice["error"] for choice in choices]  # in rising order
        rule = next(choice["error"] for choice in choices if choice["default"])
        block = max(name for name in choices[0]["layers"] if name.startswith("up_blocks"))
        last = max(max(choice["layers"][block]) for choice in choices)
        with_last = [choice["error"] for choice in choices if last in choice["layers"][block]]
        others = [f"{error:.4f}" for error in errors if error not in with_last] or ["-"]
        place = f"{rule:.4f} (place {errors.index(rule) + 1})"
        rows.append([teacher, str(len(choices)), place, f"{errors[0]:.4f}", f"{max(with_last):.4f}", others[0]])
    return TextTable("Error before training, by layers", header, rows)


def after_training_table(known: dict[str, Any], width: str) -> TextTable:
    """Scores after the runs of one width."""
    scores = known["after_training"][width]
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, cells in scores.items():
        for score, cell in cells.items():
            columns.setdefault(label_of(score), {})[arm] = cell
    decimals = {name: decimals_for([cell["mean"] for cell in rows.values()]) for name, rows in columns.items()}
    return _table(f"After {known['protocol']['max_train_steps']} steps, {width}", columns, decimals)


def _table(title: str, columns: dict[str, dict[str, dict[str, Any]]], decimals: dict[str, int]) -> TextTable:
    """A table of means and standard deviations over seeds: column -> row -> cell."""
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    rows = []
    for name in names:
        cells = [(rows.get(name), decimals[column]) for column, rows in columns.items()]
        rows.append(
            [
                name,
                *(f"{cell['mean']:.{n}f} ± {cell['standard_deviation']:.{n}f}" if cell else "-" for cell, n in cells),
            ]
        )
    return TextTable(title, ["", *columns], rows)


def main(config: ComparisonConfig) -> None:
    """Measure before training, then train, and write after every step what is known so far."""
    is_as_preset = config == replace(PRESETS["default"], output_dir=config.output_dir, results=config.results)
    committed = ROOT / "experiments" / "results" / "inheritance.json"  # of the preset's own comparison alone
    path = Path(config.results or (committed if is_as_preset else f"{config.output_dir}/inheritance.json"))
    try:
        known = dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"cannot read the results in {path}: {error}; repair the file, or move it away") from error
    names = ("num_draws", "num_seeds", "max_train_steps", "train_batch_size", "num_score_samples")
    protocol = {name: getattr(config, name) for name in names}
    if known.get("protocol") != protocol:
        known = {"protocol": protocol, "before_training": {}, "layers": {}, "after_training": {}}
    announce(f"comparing starts of students, into {path}")
    known["environment"] = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in config.step0_teachers:
        folder, dataset = text.split("=")
        if Path(folder).name not in known.setdefault("layers", {}):
            known["layers"][Path(folder).name] = errors_by_layers(config, folder, dataset)
            write_json(path, known)
        for width in config.widths:
            name = f"{Path(folder).name} width {width}"
            if name not in known["before_training"]:
                known["before_training"][name] = errors_before_training(config, folder, dataset, width)
                write_json(path, known)
    console = Console(width=140)
    print_tables([before_training_table(known), layers_table(known)], console)
    if not config.max_train_steps:
        return
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    # Whole rounds, so that a comparison that is cut short compares like with like.
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
    print_tables([after_training_table(known, width) for width in known["after_training"]], console)


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="default")
