"""The uninterrupted run that all others are compared with, and commands run in this process."""

import pytest

from tests.eval.conftest import checkpoint, feature_network, folders, run_eval  # noqa: F401
from tests.faults.small_run import end_pair, options_of, run_to_end, train
from tests.recipes.conftest import run_recipe  # noqa: F401


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Folder of a run on one process that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    status, output = run_to_end(train, options_of(folder / "run"), output=folder / "output")
    assert status == 0, output
    return folder / "run"


@pytest.fixture(scope="session")
def straight_pair(tmp_path_factory):
    """Folder of a run on two processes, with the same images per step, that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight_pair")
    end_pair(folder / "output", train, options_of(folder / "run", train_batch_size=2))
    return folder / "run"
