"""How much less time, and how many fewer steps, each arm takes to be as good as a control is after all of its steps.

python experiments/time_to_quality.py --preset time-digits
python experiments/time_to_quality.py --preset time-digits --comparison faster-mnist --output_dir runs/time-mnist

A run's learning rate ends with its steps, so an arm's curve is made of whole runs of several budgets, shares of the N
steps of a comparison of compare_methods.py. They are runs like its own, kept in its results file: what it has made is
not made again. For each seed the control's score after N steps is the bar. Where an arm reaches it is read off its
curve, log score against log steps, linear between neighbouring budgets. As scores are noisy, a budget counts only if
all larger ones reach the bar too. An arm may have reached it by its smallest budget ("≤" that, a gain "≥"), or not by
its largest (">" that, a gain "<"). Machines are noisy as well, so the seconds of an arm are its steps times the median
of the seconds per step (`training_seconds`: without start, checkpoints and scores) of all of its runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arms import ARMS
from compare_methods import make_and_show, show_plan
from curves import NOTE, Curves, curve_tables, draw_curves
from plan import PRESETS, ComparisonConfig, Run, plan
from records import RunRecords
from tables import markdown_tables, print_tables
from vkd_gen.cli import run_recipe
from vkd_gen.evaluation.figures import save_figure
from vkd_gen.files import whole_file


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """Compare the time and steps that methods take to one quality. What is done already is not done again."""

    preset: str = "time-digits"
    """Which curves to start from; every flag overrides a field of it."""
    comparison: str = "faster-digits"
    """The preset of compare_methods.py that says what is trained on what, and for how many steps (N)."""
    arms: tuple[str, ...] = ("fitnet", "muon")
    """Methods to compare, by their names in arms.py."""
    control: str = "fitnet"
    """The arm whose score after N steps is to be reached; for students narrower than the teacher, the peers' recipe."""
    shares: tuple[float, ...] = (1, 1 / 2, 1 / 3)
    """Budgets of every arm as shares of N; 1 must be among them."""
    seed: int | None = None
    """First seed; by default the comparison's, as the next two."""
    num_seeds: int | None = None
    """Runs of every arm with every budget."""
    max_train_steps: int | None = None
    """N; with another one than the comparison's the records go to results.json in --output_dir."""
    jobs: int | None = None
    """Runs at a time; by default one per GPU, else one per core. They share the cores, or GPUs, equally."""
    output_dir: str = ""
    """Folder of the runs and of PRESET.md; by default runs/COMPARISON."""
    results: str = ""
    """File of finished runs; by default the comparison's."""
    dry_run: bool = False
    """Print what would be run and what is done, then stop."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.comparison not in PRESETS:
            raise ValueError(f"there is no comparison {self.comparison!r}; choose one of {', '.join(PRESETS)}")
        if 1 not in self.shares or not all(0 < share < math.inf for share in self.shares):
            raise ValueError(f"--shares are above 0, with 1 among them, not {' '.join(map(str, self.shares))}")
        for arm in self.base.arms:  # which checks the rest
            if ARMS[arm].steps_factor != 1:
                raise ValueError(f"arm {arm} has steps of its own: name the arm that it is a part or multiple of")

    @property
    def base(self) -> ComparisonConfig:
        """The comparison of these arms at N steps."""
        own = PRESETS[self.comparison]
        given = {name: getattr(self, name) for name in ("seed", "num_seeds", "max_train_steps", "jobs")}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"output_dir": self.output_dir, "results": self.results or own.results, "starts": own.starts[:1]}
        return replace(own, arms=self.arms, control=self.control, **given)

    @property
    def figure_file(self) -> Path:
        """The figure lies beside the results if it shows what the preset compares, or they are of the user's choice."""
        where = ("jobs", "output_dir", "results", "dry_run")
        is_as_preset = self == replace(TIME_PRESETS[self.preset], **{name: getattr(self, name) for name in where})
        base = self.base
        return (base.results_file.parent if is_as_preset or self.results else base.runs_folder) / f"{self.preset}.png"


TIME_PRESETS = {config.preset: config for config in (TimeConfig(),)}


def plan_budgets(config: TimeConfig) -> list[Run]:
    """The runs of all arms with all budgets, each as the comparison makes it."""
    base = config.base
    budgets = sorted({max(1, round(base.max_train_steps * share)) for share in config.shares}, reverse=True)
    runs = [run for steps in budgets for run in plan(replace(base, max_train_steps=steps))]
    return [replace(run, note=f"{run.steps} steps") for run in runs]


def curves_of(config: TimeConfig, records: RunRecords) -> Curves:
    """The runs that have a record, by arm, seed and steps."""
    found: dict[str, dict[int, dict[int, Mapping[str, Any]]]] = {arm: {} for arm in config.arms}
    runs = plan_budgets(config)
    for run in runs:
        if (record := records.find(run.flags)) is not None:
            found[run.arm].setdefault(run.seed, {})[run.steps] = record
    return Curves(found, config.control, config.base.max_train_steps, len(runs) // len(config.arms))


def what_is_missing(config: TimeConfig, records: RunRecords) -> str:
    """One line on the runs without a record; empty if there are none."""
    runs = plan_budgets(config)
    missing = [run.name for run in runs if records.find(run.flags) is None]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"missing: {len(missing)} of {len(runs)} runs: {'; '.join(missing[:3])}{more}" if missing else ""


def show_results(config: TimeConfig, records: RunRecords) -> None:
    """Print the tables of the runs that were asked for, write them down, and draw the figure."""
    if missing := what_is_missing(config, records):
        print(missing)
    curves = curves_of(config, records)
    if not curves.shown_scores:
        return
    print_tables(curve_tables(curves))
    print("", NOTE, sep="\n")
    page = config.base.runs_folder / f"{config.preset}.md"
    with whole_file(page) as temporary:
        temporary.write_text(f"{markdown_tables(curve_tables(curves))}\n{NOTE}\n")
    config.figure_file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_curves(curves), config.figure_file)
    for path in (page, records.path, config.figure_file):
        print(f"written: {path}")


def main(config: TimeConfig) -> None:
    """Make the runs that are missing, then show the results of all."""
    base, runs = config.base, plan_budgets(config)
    records = RunRecords(base.results_file)
    if config.dry_run:
        show_plan(base, runs, records)
    else:
        make_and_show(runs, base, records, lambda: show_results(config, records))


if __name__ == "__main__":
    run_recipe(main, TIME_PRESETS, __doc__, default="time-digits")
