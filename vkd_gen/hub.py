"""The Hugging Face hub: what ID@REVISION means, and files of it in the cache here."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vkd_gen.text import reason

if TYPE_CHECKING:  # flags are read before anything heavy is loaded
    from diffusers import DiffusionPipeline

WEIGHTS = "diffusion_pytorch_model"
"""The name of a model's weights in its folder, before the suffix."""


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


def hub_folder(source: str, files: Sequence[str]) -> Path:
    """Download files of a model from the Hugging Face hub, or find them in its cache.

    Args:
        source: `ID` or `ID@REVISION`.
        files: patterns of their names, such as `unet/config.json`; those that the repository does not have are left
            out.

    Returns:
        The folder in the hub's cache that has them.

    Raises:
        ValueError: in one line: no such repository or revision, or no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(source)
    problem = hub_problem(repository, revision)
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=bool(problem))
        )
    except Exception as error:
        raise ValueError(f"it is not in the hub's cache here, and {problem}" if problem else reason(error)) from error


def hub_problem(repository: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str:
    """Why nothing can be downloaded right now, in words; empty where the hub has the repository.

    It is asked once, without retries: downloads try each file several times before they say that there is no network.

    Raises:
        ValueError: in one line: no such repository or revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to download"
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(repository, revision=revision, timeout=10)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(reason(error)) from error
    except Exception as error:  # each version of the hub's client has other classes for a network that is down
        return (
            f"the hub cannot be reached ({type(error).__name__}): check the network, or download it once where there "
            "is one, and set HF_HUB_OFFLINE=1"
        )
    return ""


def check_place(source: str) -> None:
    """Refuse what is not here and cannot be on the hub, whose names have at most one slash, between two words.

    Raises:
        ValueError: in one line.
    """
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", split_revision(source)[0], re.ASCII)
    if source and not is_name and not Path(source).exists():
        raise ValueError(f"there is no folder or file {source}")


def part_files(kind: "type[DiffusionPipeline]") -> list[str]:
    """Patterns of the files that `load_parts` needs, for a download."""
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    return [file for name in names for file in model_files(f"{name}/")] + model_files("")


def model_files(prefix: str) -> list[str]:
    """Patterns of a model's or scheduler's files in a repository, beneath a folder such as `unet/`."""
    weights = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}-*-of-*.safetensors", f"{WEIGHTS}.safetensors.index.json")
    return [prefix + name for name in ("config.json", "scheduler_config.json", *weights)]
