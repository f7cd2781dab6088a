"""No room outside of checkpoints, and what stands where a file is to be written."""

import errno
import importlib.util
import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import one_line, refused
from tests.eval.conftest import EVAL
from tests.faults.small_run import error_of, options_of, run_student, run_to_end
from tests.recipes.conftest import SHORT_STUDENT
from vkd_gen.evaluation.image_files import save_images
from vkd_gen.files import CannotWriteError, whole_file
from vkd_gen.training.options import flat_config
from vkd_gen.training.run_folder import RunFolder

# ---- every kind of file


def random_pixels():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


WRITERS = {
    "text.json": lambda path: path.write_text("x" * 10_000),
    "image.png": lambda path: Image.fromarray(random_pixels()).save(path),
    "array.npz": lambda path: np.savez(path, random_pixels()),
    "weights.safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
    "state.pt": lambda path: torch.save({"a": torch.zeros(10_000)}, path),
    "figure.png": lambda path: Figure().savefig(path),
}


@pytest.fixture
def short_files():
    """No file can be longer than 1,000 bytes, as by `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(is_on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if is_on else before[0], before[1]))

    yield limit
    limit(False)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_whole_or_what_it_was(name, short_files, tmp_path):
    path = tmp_path / name
    for before in (None, "what was there"):
        if before is not None:
            path.write_text(before)
        short_files(True)
        with pytest.raises(CannotWriteError) as error, whole_file(path) as temporary:
            WRITERS[name](temporary)
        short_files(False)
        assert str(error.value).startswith(f"{path} could not be written: ")
        assert "\n" not in str(error.value)
        assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else [name])
        assert before is None or path.read_text() == before


def test_several_images_in_one_file_are_whole_or_not_there(short_files, tmp_path):
    images = torch.from_numpy(random_pixels()).permute(2, 0, 1)[None]
    short_files(True)
    with pytest.raises(CannotWriteError, match=r"samples.npz could not be written: File too large"):
        save_images({"a": images, "b": images}, tmp_path / "samples.npz")
    short_files(False)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_program_is_not_told_as_a_full_disk(tmp_path):
    with pytest.raises(KeyError), whole_file(tmp_path / "a") as temporary:
        {}[temporary.write_text("x")]
    assert not list(tmp_path.iterdir())


# ---- every file of a run


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Of features of references; also for the processes that are started here."""
    monkeypatch.setitem(ENVIRONMENT, "VKD_GEN_CACHE", str(tmp_path / "cache"))


ENVIRONMENT: dict[str, str] = {}


def fill_disk_at(name):
    """Whatever is opened to be written or made a folder and has this in its path: ENOSPC."""

    def hook(event, arguments):
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if event in ("open", "os.mkdir") and name in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    sys.addaudithook(hook)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def check_one_line(status, output, run):
    assert status == 2, output
    assert not list(run.rglob(".*"))
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    return error_of(output)


@pytest.fixture
def run_into(tmp_path):
    """Run a function with flags on a disk that is full, until one line says so, and again with room."""

    def run(function, *arguments, fault, within):
        status, output = run_to_end(function, *arguments, *fault, output=tmp_path / "output", **ENVIRONMENT)
        error = check_one_line(status, output, within)
        status, output = run_to_end(function, *arguments, output=tmp_path / "again", **ENVIRONMENT)
        assert status == 0, output
        assert not list(within.rglob(".vkd-gen*"))
        return error

    return run


@pytest.fixture
def flags(pipeline_folder, tmp_path):
    """Of a short run that writes all that a run can."""
    given = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--student_width", 0.5, "--output_dir", tmp_path / "run"]
    given += ["--preview_every_steps", 2, "--checkpointing_steps", 1, "--diagnostics_every_steps", 1]
    return [*given, "--no-score_teacher", "--resume_from_checkpoint", "latest"]


PLACES = [
    *(".vkd-gen.pipeline", ".vkd-gen.config.json", "environment.json"),
    *("skipped_images.json", "metrics.jsonl", "previews", "scheduler_config.json", "model_index.json", "README.md"),
    *("results.json", "samples.npz", "samples.png", "report.html", "diagnostics.png", 6_000, 12_000, 20_000),
]
"""A part of a file's name; or a number of bytes that no file may be longer than, whichever meets it first."""


@pytest.mark.parametrize(
    "place", ["samples.npz", *(pytest.param(p, marks=pytest.mark.slow) for p in PLACES if p != "samples.npz")]
)
def test_no_room_for_any_file_of_a_run(place, flags, run_into, tmp_path):
    fault = (limit_files, place) if isinstance(place, int) else (fill_disk_at, place)
    error = run_into(run_student, flags, fault=fault, within=tmp_path / "run")
    assert "No space left on device" in error or "File too large" in error
    # A disk that is full when the end of the run is tried has no step to go on from.
    assert "--resume_from_checkpoint latest goes on" in error or "tried before its first step" in error
    left = {"results.json", "samples.npz", "samples.png", "report.html", "pipeline"}
    assert left <= {path.name for path in (tmp_path / "run").iterdir()}


def run_command_of(name, flags, fault=None, value=None):
    spec = importlib.util.spec_from_file_location(f"eval_{name}", EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.argv = [f"eval/{name}.py", *map(str, flags)]
    if fault is not None:
        fault(value)
    module.run_command(module.main, getattr(module, f"{name.title()}Config"), module.__doc__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output"),
    [("generate.json", "a"), ("000001.png", "a"), ("protocol.json", "a"), ("a.npz", "a.npz"), ("000001.png", "a.npz")],
)
def test_no_room_for_generated_images(name, output, checkpoint, run_into, tmp_path):
    flags = [checkpoint, "--output", tmp_path / output, "--num_images", 3, "--num_inference_steps", 1]
    error = run_into(run_command_of, "generate", flags, fault=(fill_disk_at, name), within=tmp_path / "a")
    assert "No space left on device" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "samples.npz", "samples.png", "report.html", "README.md"])
def test_no_room_for_scores(name, checkpoint, folders, feature_network, run_into, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    flags = [model, "--reference", folders[0], "--extractor", feature_network, "--num_score_samples", 12]
    flags += ["--kid_subset_size", 10, "--num_inference_steps", 1, "--output_dir", tmp_path / "scores"]
    flags += ["--update_foreign_cards", "--overwrite"]
    error = run_into(run_command_of, "score", flags, fault=(fill_disk_at, name), within=tmp_path / "scores")
    assert "No space left on device" in error


# ---- what stands where a file is to be written


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "config.json", "samples.png"])
def test_what_is_no_file_is_refused_at_the_start(make, name, tmp_path):
    make(tmp_path / name)
    with one_line(f"{name} is not a file"):
        RunFolder(str(tmp_path)).check(flat_config(options_of(tmp_path)), None)


@pytest.mark.parametrize("name", ["previews", "pipeline"])
def test_what_is_no_folder_is_refused_at_the_start(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is not a folder"):
        RunFolder(str(tmp_path)).check(flat_config(options_of(tmp_path)), None)


def test_scores_refuse_what_is_no_file(checkpoint, run_eval, tmp_path, capsys):
    (tmp_path / "results.json").mkdir()
    flags = ["--reference", "digits", "--output_dir", tmp_path, "--overwrite"]
    assert "results.json is a folder" in refused(capsys, run_eval, "score", checkpoint, *flags)
