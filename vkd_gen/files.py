"""Files and folders that are written whole or not at all, and a folder that one process at a time writes to."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

LOCK = "run.lock"
"""The file by which a folder is held; nothing is in it."""
OWN = ".vkd-gen."
"""How the names begin of what is being written: nobody else's files are called so, and what a kill left can go."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What a file system without locks answers."""


class CannotWriteError(OSError):
    """A file or folder could not be written; the message says which and why. What lay there before is untouched."""


def own_name(path: Path) -> Path:
    """The temporary name beside a file or folder that it is written under."""
    return path.with_name(OWN + path.name)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file's path, to be written to; it takes the name `path` when the context ends without an error.

    Raises:
        CannotWriteError: in one line, as on a full disk; nothing of it is left then.
    """
    temporary = own_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _tell(error, path)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder, to be filled; it replaces the folder `path` when the context ends without an error.

    Raises:
        CannotWriteError: in one line, as on a full disk; nothing of it is left then, and `path` is what it was.
    """
    temporary, old = own_name(path), own_name(path.with_name(path.name + ".old"))
    try:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _tell(error, path)
        raise


def _tell(error: BaseException, path: Path) -> None:
    reason = None if isinstance(error, CannotWriteError) else reason_of(error, path.parent)
    if reason is not None:
        raise CannotWriteError(f"{path} could not be written: {reason}") from error


def reason_of(error: BaseException, folder: Path) -> str | None:
    """Why a file could not be written, in a few words; None for an error that is not of writing.

    torch and safetensors tell of a full disk each in an exception of their own, some without the reason.
    """
    if not isinstance(error, OSError | SafetensorError | RuntimeError) or isinstance(error, NotImplementedError):
        return None
    reason = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else (str(error) or type(error).__name__).splitlines()[0]
    )
    try:
        is_full = shutil.disk_usage(folder).free < 2**20
    except OSError:
        is_full = False
    return os.strerror(errno.ENOSPC) if is_full or os.strerror(errno.ENOSPC) in str(error) else reason


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing here; call it only on a folder that is this package's own, and held."""
    for leftover in folder.glob(OWN + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def hold_folder(folder: Path) -> IO[str] | None:
    """Hold a folder until the file that is returned is closed or the process ends, however it ends.

    The kernel keeps the lock, for this process alone: processes that it forks, as to read images, do not hold it.

    Args:
        folder: is made if it is not there.

    Returns:
        The open file `run.lock`; None where the file system has no locks.

    Raises:
        ValueError: in one line, if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if path.exists() and not path.is_file():  # opening a pipe would not end
        raise ValueError(f"{path} is not a file, and a folder is held by one of that name: move it")
    file = path.open("a")  # never emptied, whoever's it is
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            print(f"note: {folder} is on a file system without locks: see that no second process writes to it")
            return None
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ValueError(
            f"another process is writing to {folder} right now; wait for its end, stop it, or choose another folder"
        ) from error
    return file


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: in VKD_GEN_CACHE, else in vkd_gen in the user's cache folder."""
    if "VKD_GEN_CACHE" in os.environ:
        return Path(os.environ["VKD_GEN_CACHE"]).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vkd_gen" / name
