"""What a result came about by, and results written so that they are whole or not there."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("vkd-gen", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, so that the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


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


def hub_revision(source: str) -> str | None:
    """The commit that a model from the Hugging Face hub was last loaded at, as the hub's cache here notes it.

    Args:
        source: what was loaded, such as `google/ddpm-cifar10-32`.

    Returns:
        40 hexadecimal digits; None for a folder or file, and for what was never loaded.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return None
    from huggingface_hub import constants

    note = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "refs" / "main"
    revision = note.read_text().strip() if note.is_file() else ""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else None
