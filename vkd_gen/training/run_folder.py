"""The folder of a run: configuration, environment, metrics and checkpoints. Only the main process writes."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from vkd_gen.provenance import environment, write_json
from vkd_gen.training.options import FREE_TO_CHANGE

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """Paths of one run.

    Args:
        path: the run's `--output_dir`.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"

    def check(self, config: dict[str, Any], resume: str | None) -> None:
        """Check that the run may use this folder; call it on every process, before one of them writes. Changes nothing.

        Args:
            config: what decides the result: the flags, and later also the facts that turned up.
            resume: `--resume_from_checkpoint`.

        Raises:
            ValueError: if the folder holds a run that would be overwritten, or the checkpoint is of another run.
        """
        for parent in (self.path, *self.path.parents):
            if parent.exists() and not parent.is_dir():
                raise ValueError(f"--output_dir {self.path} cannot be a folder: {parent} is a file")
        point = self.resume_point(resume)
        if point is None and (self.checkpoints() or (self.path / "pipeline").exists()):
            raise ValueError(
                f"{self.path} already holds a run; go on from one of its checkpoints by --resume_from_checkpoint "
                "latest, or choose another --output_dir"
            )
        if point is None or not (point.parent / "config.json").exists():
            return
        before = json.loads((point.parent / "config.json").read_text())
        changed = [
            f"--{name} was {before[name]!r} and is {value!r}"
            for name, value in config.items()
            if name not in FREE_TO_CHANGE and name in before and before[name] != json.loads(json.dumps(value))
        ]
        if changed:
            raise ValueError(f"{point} is of another run: {'; '.join(changed)}")

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder and write down the configuration, the versions and the commit."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", config)
        write_json(self.path / "environment.json", environment())
        for leftover in self.path.glob(".checkpoint-*"):
            shutil.rmtree(leftover)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=checkpoint_step)

    def resume_point(self, resume: str | None) -> Path | None:
        """The checkpoint to go on from; None to start anew.

        Raises:
            ValueError: if the named checkpoint does not exist.
        """
        if resume is None:
            return None
        if resume == "latest":
            checkpoints = self.checkpoints()
            return checkpoints[-1] if checkpoints else None
        for path in (Path(resume), self.path / resume):
            if path.is_dir() and CHECKPOINT.fullmatch(path.name):
                return path
        known = ", ".join(path.name for path in self.checkpoints()) or "none"
        raise ValueError(f"there is no checkpoint {resume}; {self.path} holds {known}")

    def remove_old_checkpoints(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints."""
        for path in self.checkpoints()[:-keep]:
            shutil.rmtree(path)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines() if line.endswith("}")]

    def cut_metrics(self, step: int) -> None:
        """Drop the metrics after `step`: a resumed run writes them again."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.metrics)


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint folder was made at."""
    return int(path.name.removeprefix("checkpoint-"))
