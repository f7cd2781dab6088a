"""The versions that `make test-lowest` installs are those that pyproject.toml allows at least."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = {"mypy", "pre-commit", "ruff"}
"""Which check the code, and are no part of what is tested."""


def numbers(version):
    """A version as a tuple, in which 1.0 is 1."""
    found = [int(part) for part in version.split(".")]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def test_every_lower_bound_is_installed_as_it_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    bounds = dict(entry.split(">=") for entry in wanted if not entry.startswith("vkd-gen["))
    pins = dict(re.findall(r"^([\w.-]+)==([\d.]+)$", (ROOT / "tests/lowest.txt").read_text(), re.MULTILINE))
    assert {name: numbers(version) for name, version in pins.items()} == {
        name: numbers(version) for name, version in bounds.items() if name not in TOOLS
    }
