"""Compare methods of distillation: train_student_unet.py for every arm, start and seed, in one table with intervals.

python experiments/compare_methods.py --preset screen
python experiments/compare_methods.py --preset second-confirmation
python experiments/compare_methods.py --student_preset custom --teacher FOLDER_OR_HUB_ID --dataset IMAGES

A run that the results file holds is not made again, and one that was interrupted goes on from its checkpoint.
"""

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import plan as planning
from arms import ARMS
from plan import PRESETS, ComparisonConfig, Run, extra_flags, plan, teacher_flags
from records import RunRecords, read_run
from side_by_side import Job, places, run_side_by_side
from vkd_gen.cli import run_recipe
from vkd_gen.evaluation.labels import data_label
from vkd_gen.files import hold_folder, whole_file

if TYPE_CHECKING:
    from tables import Comparison


def make_runs(runs: Sequence[Run], config: ComparisonConfig, records: RunRecords) -> dict[str, str]:
    """Make the runs that have no record yet, seed by seed, the longest of a seed first.

    Returns:
        Name of a run that failed -> why.
    """
    missing = [run for run in runs if records.find(run.flags) is None]
    missing.sort(key=lambda run: (run.seed, -run.steps))
    reference = shlex.join([*teacher_flags(config), *extra_flags(config)])
    failed: dict[str, str] = {}

    def on_end(job: Job, seconds: float) -> None:
        run, status, words = job.run, job.process.returncode, f"{seconds:.0f} s"
        try:
            if status:
                raise ValueError(f"status {status}: {job.last_words()}")
            record, teacher = read_run(run.folder)
            head = {"arm": run.arm, "start": run.start, "seed": run.seed, "flags": run.flags, "steps": run.steps}
            cost = {"seconds": seconds, "threads": int(job.place["OMP_NUM_THREADS"]), "reference": reference}
            records.add({**head, **record, **cost}, teacher)
            if "teacher_distance" in record["student"]:
                words += f", teacher distance {record['student']['teacher_distance']:.5f}"
        except ValueError as error:
            failed[run.name] = f"{error} (see {run.folder / 'log.txt'})"
            words += ", failed"
        print(f"{len(failed) + num_done(runs, records)} of {len(runs)}: {run.name}: {words}", flush=True)

    def command_of(run: Run) -> list[str]:
        return planning.command_of(run, knows_teacher=reference in records.references)

    if missing:
        print(f"{len(missing)} of {len(runs)} runs to make, in {config.runs_folder}", flush=True)
        run_side_by_side(missing, places(config.jobs), command_of=command_of, on_end=on_end)
    return failed


def num_done(runs: Sequence[Run], records: RunRecords) -> int:
    """How many of the runs have a record."""
    return sum(records.find(run.flags) is not None for run in runs)


def show_plan(config: ComparisonConfig, runs: Sequence[Run], records: RunRecords) -> None:
    """Print what would be run."""
    for name in config.arms:
        print(f"{name}: {ARMS[name].what}")
    for run in runs:
        word = "to do" if records.find(run.flags) is None else "done"
        print(f"{word}: {run.name}\n    {shlex.join(planning.command_of(run, knows_teacher=False))}")
    print(f"{len(runs)} runs, {num_done(runs, records)} of them done; {len(places(config.jobs))} side by side")


def comparison_of(config: ComparisonConfig, records: RunRecords) -> "Comparison | None":
    """The runs of a comparison that have a record, for tables and figures; None if there are none."""
    from tables import Comparison

    found = [(run, record) for run in plan(config) if (record := records.find(run.flags)) is not None]
    if not found:
        return None
    return Comparison(
        [{**record, "arm": run.arm} for run, record in found],
        arms=config.arms,
        starts=config.starts,
        control=config.control,
        num_seeds=config.num_seeds,
        reference=records.references.get(found[0][1]["reference"], {}),
    )


def show_results(config: ComparisonConfig, records: RunRecords) -> None:
    """Print the tables of the runs that were asked for, write them down, and draw the figure."""
    from figures import draw_differences  # here, since it takes seconds to load: flags are read before
    from tables import markdown_page, notes_of, print_tables, tables_of
    from vkd_gen.evaluation.figures import save_figure

    comparison = comparison_of(config, records)
    if comparison is None:
        return
    print_tables(tables_of(comparison))
    print("", *notes_of(comparison)[:3], sep="\n")
    written = [config.runs_folder / "table.md", records.path]
    with whole_file(written[0]) as temporary:
        temporary.write_text(markdown_page(comparison))
    if (figure := draw_differences(comparison)) is not None:
        config.figures_folder.mkdir(parents=True, exist_ok=True)
        written.append(config.figures_folder / f"{config.preset}.png")
        save_figure(figure, written[-1])
    for path in written:
        print(f"written: {path}")


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as if it were Ctrl-C."""
    raise KeyboardInterrupt(number)


def make_and_show(runs: Sequence[Run], config: ComparisonConfig, records: RunRecords, show: Callable[[], None]) -> None:
    """Make the runs that are missing, then show the results, also if some failed; SIGTERM and Ctrl-C stop both.

    Raises:
        ValueError: in one line, if a run failed.
    """
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with hold_folder(config.runs_folder) or contextlib.nullcontext():
            records.path.parent.mkdir(parents=True, exist_ok=True)  # before the runs, in case it cannot be written
            failed = make_runs(runs, config, records)
            show()
    except KeyboardInterrupt as error:
        done = f"{num_done(runs, records)} of {len(runs)} runs are done and kept"
        print(f"interrupted: {done}; the same command goes on", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
    for name, words in failed.items():
        print(f"failed: {name}: {words}")
    if failed:
        names = "; ".join(failed)
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the same command tries again: {names}")


def main(config: ComparisonConfig) -> None:
    """Make the runs that are missing, then show the results of all."""
    records, runs = RunRecords(config.results_file), plan(config)
    is_own = config.dataset and data_label(config.dataset) != config.student_preset
    if is_own and not any("--teacher" in shlex.split(run.flags) for run in runs):
        print(
            f"note: the teacher of --student_preset {config.student_preset} was not trained on {config.dataset}; for "
            "data of your own: --student_preset custom --teacher FOLDER_OR_HUB_ID"
        )
    if config.dry_run:
        show_plan(config, runs, records)
        return
    make_and_show(runs, config, records, lambda: show_results(config, records))


if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="screen")
