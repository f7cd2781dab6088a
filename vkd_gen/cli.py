"""From a recipe's dataclass to its command line, and from a user's mistake to one line."""

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import tyro
from tqdm import tqdm

from vkd_gen.files import CannotWriteError
from vkd_gen.text import printable
from vkd_gen.version import __version__

Config = TypeVar("Config")

RESUMES = "--resume_from_checkpoint latest goes on from the last checkpoint, if there is one"
GOES_ON = "the same command goes on with what is done already, or starts anew"

HELP_ALL = "--help_all"
T = TypeVar("T")
if TYPE_CHECKING:
    Rare = Annotated[T, None]
else:
    asks = {"--help", "-h"} & set(sys.argv) and not {HELP_ALL, "--help-all"} & set(sys.argv)
    Rare = Annotated[T, tyro.conf.Suppress if asks else None]
"""The type of a flag that few people change: --help leaves it out, --help_all shows it."""

USER_ERROR = 2
"""Exit status for a mistake in the command line, the configuration, the data or the models."""


def parse_command_line(
    presets: Mapping[str, Config], description: str, default: str, methods: Mapping[str, Any] | None = None
) -> Config:
    """Make a recipe's configuration from `--preset NAME` (default: `default`) and flags that override its fields.

    Exits with status 2 and one line on standard error for anything that cannot be understood, 0 after `--help`.

    Args:
        presets: name -> complete configuration, frozen dataclasses of one type with a field `preset`.
        description: first paragraph of the help text.
        default: the preset in use where none is named.
        methods: name -> the value of the field `matching` that `--method NAME` starts from.
    """
    preset: Any = presets[_named("preset", presets, default)]
    if methods is not None:
        preset = dataclasses.replace(preset, matching=methods[_named("method", methods, preset.matching.method)])
    return _parse(type(preset), preset, description, sys.argv[1:])


def _named(flag: str, known: Mapping[str, Any], default: str) -> str:
    """The value of a flag that decides the defaults of others: read before they are."""
    name = default
    for argument, following in pairwise([*sys.argv[1:], ""]):
        if argument == f"--{flag}" and following:
            name = following
        elif argument.startswith(f"--{flag}="):
            name = argument.removeprefix(f"--{flag}=")
    if name not in known:
        _exit(f"there is no {flag} {name!r}; choose one of {', '.join(filter(None, known))}")
    return name


def _parse(kind: type[Config], default: Config | None, description: str, arguments: list[str]) -> Config:
    messages = io.StringIO()
    # Only a line behind an empty one stays a line of its own in the help.
    description = re.sub(r"\n+(?=(?:python|accelerate) )", "\n\n", description)
    if {HELP_ALL, "--help-all"} & set(arguments):
        arguments = ["--help"]
    elif "scores" in getattr(kind, "__dataclass_fields__", ()):
        description = f"{description}\n\n{HELP_ALL} shows the flags that few people change too."
    try:
        with contextlib.redirect_stderr(messages):
            # Underscores, as documents and messages write flags; dashes are read too.
            cli = partial(tyro.cli, description=description, args=arguments, use_underscores=True)
            settings = {} if default is None else {"default": default}
            return _expand_home(cli(kind, config=(tyro.conf.OmitArgPrefixes,), **settings))
    except SystemExit as error:
        if error.code in (0, None):
            raise
        _exit(_condense(messages.getvalue()))
    except ValueError as error:  # from a dataclass' own checks
        _exit(str(error))


def _expand_home(value: Any) -> Any:
    """Texts that begin with ~ as paths in a home folder, wherever they stand in a configuration.

    A shell does that to a word alone, not behind the = of --output_dir=~/runs. No text of a flag that is not a path
    begins so.

    Raises:
        ValueError: for the home of a user that there is not.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        expanded = {name: _expand_home(old) for name, old in fields.items()}
        return dataclasses.replace(value, **expanded) if expanded != fields else value
    if isinstance(value, tuple | list):
        return type(value)(map(_expand_home, value))
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    expanded_path = os.path.expanduser(value)
    if str(expanded_path).startswith("~"):
        raise ValueError(f"{value}: there is no such home folder; write ./{value} for a folder of that name")
    return type(value)(expanded_path)


def _condense(message: str) -> str:
    """Tyro's error box as one line."""
    # Where the terminal has no lines to draw with, the box is made of dashes.
    lines = [re.sub(r"[\u2500-\u257f]+|-{5,}|^\s*[|+]|[|+]\s*$", " ", line) for line in message.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r"^(Parsing error|Required options|Value error|Missing argument|Invalid choice)\s*:?\s*", "", text)
    text = re.sub(r"^Error parsing \w+: ", "", text)
    text = re.sub(r"^(Unrecognized options)\s*:?\s+(?=\1)", "", text)  # a title that the text repeats
    return re.split(r"For full helptext", text)[0].strip() or "the command line could not be understood; see --help"


def _exit(message: str) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message stands at the end of the progress bar's line
    rank = os.environ.get("RANK", "0")
    prefix = "error: " if rank == "0" else f"error in process {rank}: "
    print(prefix + printable(" ".join(message.split())), file=sys.stderr)
    sys.exit(USER_ERROR)


def check_at_least(options: Any, minima: Mapping[str, float]) -> None:
    """Check that options are finite and not too small, None aside.

    Args:
        options: with the names as attributes.
        minima: name of a flag -> its least value.

    Raises:
        ValueError: in one line, naming the flag.
    """
    for name, least in minima.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name} must be at least {least}{' and finite' * (value > least)}, not {value}")


def announce(aim: str) -> None:
    """Say what a command is about to do, before it loads what takes seconds; the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"vkd-gen {__version__}: {aim}", flush=True)


@contextlib.contextmanager
def one_line_errors(hint: str) -> Iterator[None]:
    """Turn a ValueError, an OSError or a lack of memory into one line on standard error and status 2; Ctrl-C into 130.

    Set VKD_GEN_TRACEBACK=1 to see the traceback instead.

    Args:
        hint: what to do after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does: a name may hold what no encoding takes
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("VKD_GEN_TRACEBACK"):
        yield
        return
    try:
        yield
    except BrokenPipeError:  # the reader of standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except CannotWriteError as error:
        _exit(f"{error}; what was there before is kept: once it can be written, {hint}")
    except (ValueError, OSError) as error:
        # A worker that reads images hands over its whole traceback as text.
        text = str(error)
        _exit(text.rsplit("ValueError: ", 1)[-1] if text.startswith("Caught ") else text or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", text):
            raise
        asked = re.search(r"tried to allocate ([\d.,]+ ?\w+)", text, re.IGNORECASE)
        wanted = f", for {asked[1]} at once" if asked else ""
        _exit(f"not enough memory{wanted}: lower the batch sizes, the resolution or the width of the models")
    except KeyboardInterrupt:
        print(f"interrupted; {hint}", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def tensors_alone(is_required: bool = True) -> Iterator[None]:
    """Let torch load nothing but tensors and plain values, also where a package asks it for more; or let it be.

    Accelerate and torch-fidelity call `torch.load(weights_only=False)`; no file that a command is given can run code.
    """
    force, allow = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (force, allow) if name in os.environ}
    os.environ[force] = "1" if is_required else "0"
    try:
        yield
    finally:
        os.environ.pop(force, None)
        os.environ.update(before)


def check_output_file(file: str | Path) -> None:
    """Refuse an output file that cannot be one.

    Args:
        file: that is about to be written; need not be there.

    Raises:
        ValueError: in one line, naming the folder or the file above it.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file")
    for parent in file.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{file} cannot be written: {parent} is a file")


def repository_path(path: str, script: str) -> str:
    """A file or folder of the repository that a script lies in; anything else as it is.

    Presets name what the repository carries, and scripts are started from anywhere.

    Args:
        path: a file's, a folder's, or another name.
        script: the script's `__file__`.
    """
    inside = Path(script).resolve().parents[1] / path
    return str(inside) if path and not Path(path).exists() and inside.exists() else path


def run_recipe(
    main: Callable[[Config], None],
    presets: Mapping[str, Config],
    description: str,
    default: str,
    methods: Mapping[str, Any] | None = None,
) -> None:
    """Parse the command line and run `main` on it, with users' mistakes told in one line."""
    trains = any(hasattr(config, "training") for config in presets.values())
    with one_line_errors(RESUMES if trains else GOES_ON), tensors_alone():
        main(parse_command_line(presets, description, default, methods))


def run_command(
    main: Callable[[Config], None],
    kind: type[Config],
    description: str,
    presets: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Parse the command line into a dataclass and run `main` on it, with users' mistakes told in one line.

    Args:
        main: the command.
        kind: of its configuration.
        description: first paragraph of the help text.
        presets: name -> the flags that `--preset NAME` stands for; those that are given go before them.
    """
    with one_line_errors(GOES_ON), tensors_alone():
        flags = {"": (), **(presets or {})}
        main(_parse(kind, None, description, [*flags[_named("preset", flags, "")], *sys.argv[1:]]))
