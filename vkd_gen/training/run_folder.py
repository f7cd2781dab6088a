"""The folder of a run: configuration, environment, metrics and checkpoints. Only the main process writes."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from vkd_gen.files import hold_folder, own_name, remove_leftovers, whole_file
from vkd_gen.provenance import RESULT_FILES, environment, read_metrics, write_json
from vkd_gen.training.checkpoints import MANIFEST, find_fault, force_to_disk, problem_of, read_manifest, seal
from vkd_gen.training.facts import BATCH, compare_facts

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
FILES = (
    *("config.json", "environment.json", "metrics.jsonl", "skipped_images.json"),
    *RESULT_FILES,
    "diagnostics.png",
)
"""Files that a run writes into its folder."""
FOLDERS = ("previews", "pipeline")
"""Folders that it makes there, beside the checkpoints."""

OWN_FLAGS = {"output_dir", "max_train_steps", "log_every_steps"}
"""Flags of both recipes, by which their config.json is known: scripts of diffusers have some of the names, not all."""


class RunFolder:
    """Paths of one run.

    Args:
        path: the run's `--output_dir`.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self._faults: dict[Path, str | None] = {}
        self._told: set[str] = set()
        self._lock: IO[str] | None = None
        self._is_first_process = os.environ.get("RANK", "0") == "0"  # asked before there is an Accelerator

    def check(self, config: dict[str, Any], point: Path | None) -> None:
        """Check that the run may use this folder; call it on every process, before one of them writes. Changes nothing.

        Args:
            config: what decides the result: the flags, and later also the facts that turned up.
            point: the checkpoint to go on from; None to begin.

        Raises:
            ValueError: if the folder holds a run, or somebody's files, that would be overwritten, or the checkpoint is
                damaged or of another run.
        """
        dataset = config.get("dataset")
        if dataset and os.path.isdir(dataset) and os.path.realpath(dataset) == os.path.realpath(self.path):
            raise ValueError(
                f"--output_dir {self.path} is the folder of the images, among which samples would come to lie: "
                "choose another --output_dir"
            )
        for parent in (self.path, *self.path.parents):
            if parent.exists() and not parent.is_dir():
                raise ValueError(f"--output_dir {self.path} cannot be a folder: {parent} is a file")
        for names, is_right, kind in ((FILES, Path.is_file, "a file"), (FOLDERS, Path.is_dir, "a folder")):
            for path in (self.path / name for name in names):
                if path.exists() and not is_right(path):
                    raise ValueError(
                        f"{path} is not {kind}, as a run writes one there: move it, or choose another folder"
                    )
        if point is None and (self.checkpoints() or (self.path / "pipeline").exists()):
            raise ValueError(
                f"{self.path} already holds a run; go on from one of its checkpoints by --resume_from_checkpoint "
                "latest, or choose another --output_dir"
            )
        if not self.is_own():
            found = [path for path in (self.path / name for name in (*FILES, *FOLDERS)) if path.exists()]
            if found or self.checkpoints():
                raise ValueError(
                    f"{(found or self.checkpoints())[0]} is there already, and no run of these recipes wrote it: "
                    "choose another --output_dir, so that it is not overwritten"
                )
        if point is not None and (point / "config.json").exists():
            compare_facts(_read_config(point / "config.json"), json.loads(json.dumps(config)), point, self._tell)

    def is_own(self) -> bool:
        """Whether a run of these recipes made what lies here: it wrote its configuration, or a checkpoint."""
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_bytes()) if path.is_file() else None
        except (OSError, ValueError, RecursionError):
            config = None
        is_of_a_run = isinstance(config, dict) and set(config) >= OWN_FLAGS
        return is_of_a_run or any((path / MANIFEST).is_file() for path in self.checkpoints())

    def _tell(self, line: str) -> None:
        if self._is_first_process and line not in self._told:
            self._told.add(line)
            print(line, flush=True)

    def hold(self) -> None:
        """Make the folder and hold it until `release` or the end of the process; the main process alone.

        Raises:
            ValueError: in one line, if another process holds it.
        """
        self.release()
        self._lock = hold_folder(self.path)

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder and write down the configuration, the versions and the commit; tidy up after what was killed.

        Args:
            config: with `resume_from_checkpoint`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_own():
            remove_leftovers(self.path)
        write_json(self.path / "config.json", config)
        write_json(self.path / "environment.json", environment())

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first; whether they are whole is for `resume_point` to say."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=checkpoint_step)

    def resume_point(self, resume: str | None) -> Path | None:
        """The checkpoint to go on from; None to start anew. The first process reads every byte of it, once.

        Raises:
            ValueError: if the named checkpoint does not exist or is damaged, or none is whole.
        """
        if resume is None:
            return None
        if resume == "latest":
            checkpoints = self.checkpoints()
            for path in reversed(checkpoints):
                fault = self._fault(path)
                if fault is None:
                    return path
                self._tell(f"{path} is damaged and left out: {fault}")
            if checkpoints:
                faults = "; ".join(f"{path.name}: {self._fault(path)}" for path in checkpoints)
                raise ValueError(f"no checkpoint in {self.path} is whole ({faults}); remove them to start anew")
            return None
        for path in (Path(resume), self.path / resume):
            if path.is_dir() and CHECKPOINT.fullmatch(path.name):
                fault = self._fault(path)
                if fault is not None:
                    raise ValueError(f"{path} is damaged: {fault}; choose another, or latest for the last whole one")
                return path
        known = ", ".join(path.name for path in self.checkpoints()) or "none"
        raise ValueError(f"there is no checkpoint {resume}; {self.path} holds {known}")

    def _fault(self, path: Path) -> str | None:
        if path not in self._faults:
            self._faults[path] = find_fault(path, hash_up_to=math.inf if self._is_first_process else 2**20)
        return self._faults[path]

    def write_checkpoint(self, accelerator: Accelerator, step: int) -> str | None:
        """Write `checkpoint-STEP`; it appears under that name once it is whole and on the disk. For all processes.

        Args:
            accelerator: with everything registered that a checkpoint holds.
            step: that was made last.

        Returns:
            What went wrong on some process, in words; nothing of it is left then.
        """
        temporary = own_name(self.path / f"checkpoint-{step}")

        def begin() -> None:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()  # not its parents: a run's folder that was removed is not made anew

        def write() -> None:
            accelerator.save_state(str(temporary))

        def finish() -> None:
            self.finish_checkpoint(temporary, {"step": step, "num_processes": accelerator.num_processes})

        for action, is_for_all in ((begin, False), (write, True), (finish, False)):
            problem = None
            if is_for_all or accelerator.is_main_process:
                problem = problem_of(action, self.path)
            problems = [found for found in gather_object([problem]) if found]
            if problems:
                if accelerator.is_main_process:
                    shutil.rmtree(temporary, ignore_errors=True)
                return problems[0]
        return None

    def finish_checkpoint(self, temporary: Path, facts: dict[str, Any]) -> None:
        """Give a written checkpoint its manifest and then its name, so that it is whole or not there.

        Args:
            temporary: folder beside it, all files written.
            facts: for the manifest, with `step`.
        """
        if (self.path / "config.json").exists():
            shutil.copyfile(self.path / "config.json", temporary / "config.json")
        seal(temporary, facts)
        if self.metrics.exists():
            force_to_disk(self.metrics)  # a checkpoint's metrics are there whenever it is
        path = self.path / f"checkpoint-{facts['step']}"
        if path.exists():  # a damaged one that was left out when the run was resumed
            _remove(path)
        os.replace(temporary, path)
        force_to_disk(self.path)
        self._faults.pop(path, None)

    def remove_old_checkpoints(self, keep: int, keep_every_steps: int = 0) -> None:
        """Remove all but the `keep` newest checkpoints and those at multiples of `keep_every_steps`."""
        for path in self.checkpoints()[:-keep]:
            if (not keep_every_steps or checkpoint_step(path) % keep_every_steps) and (path / MANIFEST).is_file():
                _remove(path)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after `step`, damaged or of another future: the run will write its own."""
        for path in self.checkpoints():
            if checkpoint_step(path) > step:
                aside, number = path.with_name(f"set-aside-{path.name}"), 1
                while aside.exists():  # nothing that is there is removed
                    number += 1
                    aside = path.with_name(f"set-aside-{path.name}.{number}")
                os.replace(path, aside)
                self._tell(f"{path} is now {aside.name}: the run goes on from step {step}")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl.

        Raises:
            ValueError: if it cannot be written.
        """
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ValueError(
                f"{self.metrics} cannot be written ({error.strerror}); {self.last_checkpoint_in_words()}"
            ) from error

    def cut_metrics(self, step: int) -> None:
        """Drop the metrics after `step`: a resumed run writes them again."""
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.metrics) if line["step"] <= step]
        with whole_file(self.metrics) as temporary:
            temporary.write_text("".join(kept))

    def last_checkpoint_in_words(self) -> str:
        """What is left to go on from, for the end of a message."""
        checkpoints = self.checkpoints()
        if not checkpoints:
            return "there is no checkpoint yet"
        return f"{checkpoints[-1].name} is kept, and --resume_from_checkpoint latest goes on from it"


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint folder was made at."""
    return int(path.name.removeprefix("checkpoint-"))


def num_processes_of(checkpoint: Path) -> int:
    """How many processes made a whole checkpoint."""
    return read_manifest(checkpoint)["num_processes"]


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; if that is interrupted, what is left no longer looks like one."""
    hidden = own_name(checkpoint.with_name(f"{checkpoint.name}.old"))
    if hidden.exists():
        shutil.rmtree(hidden)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _read_config(path: Path) -> dict[str, Any]:
    """The flags that a checkpoint was made by; of the batch's it is known here what they must be."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON; choose another checkpoint") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object; choose another checkpoint")
    for name in BATCH:
        if name in config and (type(config[name]) is not int or config[name] < 1):
            raise ValueError(f"{path} is damaged: {name} is {str(config[name])[:80]!r}; choose another checkpoint")
    return config
