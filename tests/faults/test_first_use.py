"""What someone meets who has just installed this: commands answer at once, from anywhere, and say what they do."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("recipes/*.py"), *ROOT.glob("eval/*.py")))
HEAVY = ("torch", "diffusers", "accelerate", "transformers", "datasets", "matplotlib", "sklearn")

PARSE_ALL = """
import contextlib, io, os, runpy, sys
for command in sys.argv[1:]:
    for flags in (["--help"], ["--nonsense"]):
        sys.argv = [command, *flags]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_path(command, run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
        print(command, *flags, status, *(name for name in %r if name in sys.modules))
"""


@pytest.fixture(scope="module")
def answers():
    """Command and flag -> its exit status and the heavy packages that it loaded, as text; all in one process."""
    script = PARSE_ALL % (HEAVY,)
    done = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {tuple(line.split()[:2]): " ".join(line.split()[2:]) for line in done.stdout.splitlines()}


@pytest.mark.parametrize(("flag", "status"), [("--help", "0"), ("--nonsense", "2")])
@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_read_before_anything_heavy_is_loaded(answers, command, flag, status):
    assert answers[command, flag] == status
