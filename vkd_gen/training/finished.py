"""A finished run that is started again."""

import json
import os
from collections.abc import Callable
from typing import Any

from vkd_gen.training.options import TrainingOptions
from vkd_gen.training.run_folder import RunFolder, checkpoint_step


def show_if_finished(
    folder: RunFolder, options: TrainingOptions, scored_by: dict[str, Any], show: Callable[[dict[str, Any]], None]
) -> bool:
    """Show the table of a run that is trained, exported and scored as asked for, and say that it is finished.

    Args:
        folder: of the run.
        options: of the run that is started; one that is to be uploaded is never finished.
        scored_by: options of the scores; results.json repeats those that it came about by.
        show: prints results.

    Returns:
        Whether nothing is left to do.
    """
    point = folder.resume_point(options.resume_from_checkpoint)
    if point is None or checkpoint_step(point) != options.max_train_steps or options.push_to_hub:
        return False
    try:
        results = json.loads((folder.path / "results.json").read_bytes())
        made = ("pipeline/model_index.json", "samples.npz", "samples.png", "report.html")
        if results["scored_by"] != scored_by or not all((folder.path / name).is_file() for name in made):
            return False
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{folder.path} is finished: {options.max_train_steps:,} steps, exported and scored. For another run "
                "choose another --output_dir"
            )
            show(results)
            print(f"pipeline: {folder.path / 'pipeline'}\nreport: {folder.path / 'report.html'}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False  # not there, damaged, or of an older version: it is scored again
    return True
