"""Checkpoint folders that are whole, or known not to be: files forced to disk, and a manifest of sizes and hashes."""

import hashlib
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from accelerate.utils import load

from vkd_gen.files import reason_of
from vkd_gen.loading import check_file
from vkd_gen.text import one_line

MANIFEST = "manifest.json"


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Force the folder's files to disk and write its manifest, the last file of a checkpoint.

    Args:
        folder: of a checkpoint, under its temporary name.
        facts: what the manifest says beside the files, such as the step.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        force_to_disk(folder / name)
    content = {**facts, "files": dict(zip(names, _describe(folder, names), strict=True))}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**content, "sha256": _hash_of(content)}, indent=2))
    force_to_disk(manifest)
    force_to_disk(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote.

    Raises:
        ValueError: if there is no manifest, or it is not as it was written.
    """
    if not (folder / MANIFEST).is_file():  # a pipe would never end
        raise ValueError(f"{MANIFEST} is missing")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        hash_then = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if _hash_of(manifest) != hash_then:
        raise ValueError(f"{MANIFEST} is not as it was written")
    counts = [manifest.get("step"), manifest.get("num_processes", 1)]
    files = manifest.get("files")
    are_files = isinstance(files, dict) and all(_is_file(name, file) for name, file in files.items())
    if not are_files or not all(type(count) is int for count in counts):
        raise ValueError(f"{MANIFEST} is of no checkpoint")
    return manifest


def find_fault(folder: Path, *, hash_up_to: float = math.inf) -> str | None:
    """The first thing that is wrong with a checkpoint, in words; None for a whole one.

    Args:
        folder: of the checkpoint.
        hash_up_to: bytes of the largest file to read; of larger ones the size is checked alone.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if folder.name != f"checkpoint-{manifest['step']}":
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["size"]:
            return f"{name} has {path.stat().st_size:,} bytes of {file['size']:,}"
    read = [name for name, file in manifest["files"].items() if file["size"] <= hash_up_to]
    try:
        found = _describe(folder, read)
    except OSError as error:
        return f"a file cannot be read: {error}"
    for name, now in zip(read, found, strict=True):
        if manifest["files"][name] != now:
            return f"{name} is not as it was written"
    return None


def check_checkpoint(folder: Path | None) -> None:
    """Refuse a checkpoint with a file that would run code, or cannot be read, before anything of it is loaded.

    Beside the weights there are pickles: optimizer.bin, scaler.pt, random_states_*.pkl, and custom_checkpoint_*.pkl of
    what is registered with Accelerate, which it reads with `weights_only=False`. Here all are read with
    `weights_only=True` first; values stay on disk. Folders of shards (FSDP, DeepSpeed) are refused: their own loaders
    unpickle whatever they hold.

    Args:
        folder: of the checkpoint; None for a run that starts anew.

    Raises:
        ValueError: in one line, naming the file.
    """
    if folder is None:
        return
    if (folder / "training.pt").exists():
        raise ValueError(
            f"{folder} was made by an earlier version, whose checkpoints hold other files: finish that run with its "
            "version, or start a new one"
        )
    shards = sorted(path for path in folder.iterdir() if path.is_dir())
    if shards:
        raise ValueError(
            f"the checkpoint holds a folder, {shards[0]}; shards (FSDP, DeepSpeed) are unpickled by their own loaders "
            "and not loaded here"
        )
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".pt", ".pth")):
        try:
            check_file(path)
            with warnings.catch_warnings(action="ignore"):  # of pickles of another kind than its own
                load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged, truncated and executable files each have a class of their own
            is_code = isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error)
            reason = "it holds more than numbers, and could run code" if is_code else one_line(error)[:200]
            raise ValueError(
                f"the checkpoint's file {path} is not loaded: {reason}; resume from another one"
            ) from error


def problem_of(action: Callable[[], None], folder: Path) -> str | None:
    """Run what writes to a folder; what went wrong in a few words, None if nothing did."""
    try:
        action()
    except Exception as error:
        return reason_of(error, folder) or one_line(error)
    return None


def force_to_disk(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    def describe(name: str) -> dict[str, Any]:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves Python's lock to others
        return list(pool.map(describe, names))


def _is_file(name: str, file: Any) -> bool:
    """Whether a manifest's entry is a file's, inside of its folder."""
    path = PurePosixPath(name)
    stays = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return stays and isinstance(file, dict) and type(file.get("size")) is int


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
