"""What a result came about by, and results written so that they are whole or not there."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkd_gen.files import CannotWriteError, whole_file
from vkd_gen.text import printable, reason

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

RESULT_FILES = ("results.json", "samples.npz", "samples.png", "report.html")
"""What is written into a folder of scores."""
PACKAGES = ("vkd-gen", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, so that the file is whole or not there."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def only_warns(what: str, advice: str) -> Iterator[None]:
    """For what stands beside weights and numbers, as pictures do: if it fails, that costs a line and not the run.

    Args:
        what: is made.
        advice: what to do where it could not be made.

    Raises:
        CannotWriteError: for a disk that takes no more, which what follows would meet too.
    """
    try:
        yield
    except CannotWriteError:
        raise
    except Exception as error:  # a missing font, a broken library: whatever it is
        from tqdm import tqdm

        tqdm.write(printable(f"warning: {what} could not be made ({reason(error)}); {advice}"), file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order: `step`, a whole number, and other numbers by name.

    What is torn, as by a crash, or of another kind is left out, each line on its own, and counted in a note. None where
    there is no file.
    """
    lines: list[dict[str, Any]] = []
    num_left_out = 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int) and is_number(step):
            lines.append({name: value for name, value in line.items() if is_number(value)})
            num_left_out += len(lines[-1]) < len(line)
        else:
            num_left_out += 1
    if num_left_out:
        logger.warning("note: %d lines of %s are torn or hold what is no number; that is left out", num_left_out, path)
    return lines


def is_number(value: object) -> bool:
    """Whether JSON's value is a number that a float can hold; NaN and infinity are."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) < 2**63


def plain_tensors(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Tensors as they are, and of those of a class of its own, such as weights in 8 bits, what they are made of."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        plain |= plain_tensors({f"{name}.{part}": getattr(value, part) for part in parts}) if parts else {name: value}
    return plain


def hash_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """SHA-256 over names, shapes, types and values of tensors, hexadecimal, whatever their order and their device."""
    import torch  # here, so that what writes results alone need not wait for it

    digest = hashlib.sha256()
    for name, value in sorted(plain_tensors(tensors).items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().data if value.dim() else str(value).encode()
        )
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Versions and commit that a result depends on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "commit": _commit()}


@functools.cache
def _commit() -> str:
    """Of the checkout that this package runs from; none if it is installed, also inside another repository."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == package.parent:
            return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown"
