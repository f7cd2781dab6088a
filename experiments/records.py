"""Finished runs as short records in one JSON file, so that a comparison goes on from what is done."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_gen.provenance import environment, is_number, write_json

FORMAT = "vkd-gen comparison of methods, 1"
SETTINGS = (
    *("method", "denoising_weight", "output_weight", "feature_weight", "feature_weighting"),
    *("feature_decay_start", "feature_decay_end", "feature_loss", "timestep_weighting"),
    *("projector", "projector_start", "feature_normalization", "whitening_exponent", "whitening_rank", "layers"),
    *("learning_rate", "optimizer", "timestep_sampling", "num_training_images"),
)
"""Fields of a run's resolved configuration that its record repeats: what its flags meant at the time."""


class RunRecords:
    """A file of finished runs (`runs`), and of what their teachers and held-out images score (`references`).

    A run is identified by its `flags`, one string that decides its result.

    Args:
        path: JSON, existing or not; its folder is made when it is written.

    Raises:
        ValueError: in one line, if the file is damaged or of another kind.
    """

    def __init__(self, path: Path):
        self.path = path
        self.references: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"cannot read the results in {path}: {error}; repair the file, or move it away") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a file of this command's results; choose another --results")
        self.references, self.runs = content.get("references", {}), content.get("runs", [])
        if not isinstance(self.references, dict) or not isinstance(self.runs, list) or not all(map(_is_run, self.runs)):
            raise ValueError(f"{path} is damaged: a run has no flags or no scores; repair the file, or move it away")

    def find(self, flags: str) -> dict[str, Any] | None:
        """The record of these flags."""
        return next((record for record in self.runs if record["flags"] == flags), None)

    def add(self, record: dict[str, Any], reference: dict[str, Any] | None = None) -> None:
        """Add a finished run, in place of one with the same flags, and write the file.

        Args:
            record: with `flags`, `arm`, `start`, `seed`, `reference`, and what `read_run` gives.
            reference: scores of the teacher and of held-out images under the name `record["reference"]`; the first
                one is kept.
        """
        self.runs = [known for known in self.runs if known["flags"] != record["flags"]] + [record]
        self.runs.sort(key=lambda run: (run["start"], run["arm"], run["seed"], run["flags"]))
        if reference is not None:
            self.references.setdefault(record["reference"], reference)
        content = {"format": FORMAT, "environment": environment(), "references": self.references, "runs": self.runs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, content)


def _is_run(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(name), str) for name in ("flags", "arm", "start", "reference"))
        and all(is_number(record.get(name)) for name in ("seed", "steps", "seconds"))
        and isinstance(record.get("student"), dict)
        and all(map(is_number, record["student"].values()))
    )


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the folder of a finished run of train_student_unet.py says.

    Returns:
        `student` (score -> value), `settings`, `training_seconds`, `images_per_second`, `commit`, and the last
        `diagnostics` if there are; and `rows` and `protocol` of the teacher and the held-out images, None if the run
        did not score its teacher though it had an extractor to do it with.

    Raises:
        ValueError: if the folder does not hold a whole run.
    """
    from vkd_gen.evaluation.report import load_outcome  # here, since it loads torch, which takes seconds

    outcome = load_outcome(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        commit = json.loads((folder / "environment.json").read_text())["commit"]
        rows = {name: row for name, row in outcome.results["rows"].items() if name != "student"}
        student = outcome.results["rows"]["student"]
        seconds, rate = training_speed(outcome.metrics, float(config.get("train_batch_size", 1)))
        record = {"settings": {name: config[name] for name in SETTINGS if name in config}, "student": student}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} does not hold a whole run: {type(error).__name__} {error}") from error
    record |= {"training_seconds": seconds, "images_per_second": rate, "commit": commit}
    last: dict[str, float] = {}
    for line in outcome.metrics:
        last |= {name: float(f"{value:.6g}") for name, value in line.items() if name.startswith("diagnostics/")}
    record |= {"diagnostics": last} if last else {}
    protocol = {name: value for name, value in outcome.results["protocol"].items() if name != "environment"}
    is_scored = any(name.startswith("fid") for name in rows.get("teacher", {})) or config.get("extractor") == "none"
    return record, {"rows": rows, "protocol": protocol} if is_scored else None


def training_speed(metrics: Sequence[Mapping[str, float]], batch_size: float) -> tuple[float, float | None]:
    """Seconds that the steps took, without start, checkpoints and scores, and images per second.

    Args:
        metrics: lines of metrics.jsonl.
        batch_size: images per step.
    """
    seconds, before = 0.0, 0.0
    for line in metrics:
        if line.get("images_per_second"):
            seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return round(seconds, 2), round(before * batch_size / seconds, 1) if seconds else None
