"""What a result came about by, and results written so that they are whole or not there."""

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

from vkd_gen.files import whole_file

RESULT_FILES = ("results.json", "samples.npz", "samples.png", "report.html")
"""What is written into a folder of scores."""
PACKAGES = ("vkd-gen", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, so that the file is whole or not there."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def hash_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """SHA-256 over names, shapes, types and values of tensors, hexadecimal, whatever their order and their device."""
    import torch  # here, so that what writes results alone need not wait for it

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
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


def split_revision(source: str) -> tuple[str, str | None]:
    """What `ID@REVISION` means on the Hugging Face hub: the repository, and the commit, tag or branch to load.

    The hub's own way to write it, as in `hf://` addresses. A folder or file of that name here goes before.

    Args:
        source: such as `google/ddpm-cifar10-32@0123456`, or without a revision.

    Returns:
        The repository, and the revision, None for the newest.

    Raises:
        ValueError: for what cannot be a revision.
    """
    repository, at, revision = source.partition("@")
    if not at or source.startswith((".", "/", "~")) or Path(source).exists():
        return source, None
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", revision) or ".." in revision:
        raise ValueError(f"{source} names no revision: behind the @ stands a commit, a tag or a branch of the hub")
    return repository, revision


def hub_revision(source: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """The commit that something from the Hugging Face hub was last loaded at, as the hub's cache here notes it.

    Args:
        source: what was loaded, such as `google/ddpm-cifar10-32`, with `@REVISION` if one was asked for.
        kind: of the repository.

    Returns:
        40 hexadecimal digits; None for a folder or file, and for what was never loaded.
    """
    if Path(source).exists():
        return None
    repository, revision = split_revision(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return None
    from huggingface_hub import constants

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    note = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}" / "refs" / (revision or "main")
    found = note.read_text().strip() if note.is_file() else ""
    return found if re.fullmatch("[0-9a-f]{40}", found) else None
