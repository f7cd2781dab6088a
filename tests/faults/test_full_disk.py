"""No room outside of checkpoints, and what stands where a file is to be written."""

import errno
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

from tests.eval.conftest import EVAL
from tests.faults.small_run import options_of, run_student, run_to_end
from tests.recipes.conftest import SHORT_STUDENT
from vkd_gen.evaluation.sources import save_images
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
@pytest.mark.parametrize("before", [None, "what was there"])
def test_a_file_is_whole_or_what_it_was(name, before, short_files, tmp_path):
    path = tmp_path / name
    if before is not None:
        path.write_text(before)
    short_files(True)
    try:
        with pytest.raises(CannotWriteError) as error, whole_file(path) as temporary:
            WRITERS[name](temporary)
    finally:
        short_files(False)
    assert str(error.value).startswith(f"{path} could not be written: ")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else [name])
    assert before is None or path.read_text() == before


def test_several_images_in_one_file_are_whole_or_not_there(short_files, tmp_path):
    images = torch.from_numpy(random_pixels()).permute(2, 0, 1)[None]
    short_files(True)
    try:
        with pytest.raises(CannotWriteError, match=r"samples.npz could not be written: File too large"):
            save_images({"a": images, "b": images}, tmp_path / "samples.npz")
    finally:
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


PLACES = [
    *("calibration.safetensors", ".vkd-gen.pipeline", "samples.npz"),
    *(".vkd-gen.config.json", "environment.json", "skipped_images.json", "metrics.jsonl", "previews"),
    *("scheduler_config.json", "model_index.json", "README.md", "results.json", "samples.png", "report.html"),
    "diagnostics.png",
]
CHEAP = {".vkd-gen.pipeline", "samples.npz"}


def check_one_line(status, output, run):
    assert status == 2, output
    errors = [line for line in output.replace("\r", "\n").splitlines() if line.startswith(("error", "Traceback"))]
    assert len(errors) == 1, output
    assert not list(run.rglob(".*"))
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    return errors[0]


@pytest.fixture
def flags(pipeline_folder, tmp_path):
    """Of a short run that writes all that a run can."""
    given = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--student_width", 0.5, "--output_dir", tmp_path / "run"]
    given += ["--preview_every_steps", 1, "--checkpointing_steps", 1, "--diagnostics_every_steps", 1]
    return [*given, "--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in CHEAP)) for n in PLACES])
def test_no_room_for_any_file_of_a_run(name, flags, tmp_path):
    run = tmp_path / "run"
    # safetensors opens its file past Python's events: that one is too long instead.
    fault, value = (limit_files, 8000) if name.endswith(".safetensors") else (fill_disk_at, name)
    status, output = run_to_end(run_student, flags, fault, value, output=tmp_path / "output", **ENVIRONMENT)
    error = check_one_line(status, output, run)
    assert "No space left on device" in error or "File too large" in error
    # A disk that is full when the end of the run is tried has no step to go on from.
    assert "--resume_from_checkpoint latest goes on" in error or "tried before its first step" in error
    status, output = run_to_end(run_student, flags, output=tmp_path / "again", **ENVIRONMENT)
    assert status == 0, output
    assert {"results.json", "samples.npz", "samples.png", "report.html", "pipeline"} <= {p.name for p in run.iterdir()}
    assert not list(run.rglob(".vkd-gen*"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [6_000, 12_000, 20_000])
def test_files_that_may_not_be_longer(size, flags, tmp_path):
    """`ulimit -f`: whichever file meets it first."""
    status, output = run_to_end(run_student, flags, limit_files, size, output=tmp_path / "output", **ENVIRONMENT)
    check_one_line(status, output, tmp_path / "run")
    status, output = run_to_end(run_student, flags, output=tmp_path / "again", **ENVIRONMENT)
    assert status == 0, output


def run_command_of(name, flags, fault, value):
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"eval_{name}", EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.argv = [f"eval/{name}.py", *map(str, flags)]
    fault(value)
    module.run_command(module.main, getattr(module, f"{name.title()}Config"), module.__doc__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output"),
    [("generate.json", "a"), ("000001.png", "a"), ("protocol.json", "a"), ("a.npz", "a.npz"), ("000001.png", "a.npz")],
)
def test_no_room_for_generated_images(name, output, checkpoint, tmp_path):
    flags = [checkpoint, "--output", tmp_path / output, "--num_images", 3, "--num_inference_steps", 1]
    status, text = run_to_end(
        run_command_of, "generate", flags, fill_disk_at, name, output=tmp_path / "log", **ENVIRONMENT
    )
    assert "No space left on device" in check_one_line(status, text, tmp_path)
    assert not (tmp_path / "a.npz").exists()
    status, text = run_to_end(run_command_of, "generate", flags, str, "", output=tmp_path / "again", **ENVIRONMENT)
    assert status == 0, text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "samples.npz", "samples.png", "report.html", "README.md"])
def test_no_room_for_scores(name, checkpoint, folders, feature_network, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    flags = [model, "--reference", folders[0], "--extractor", feature_network, "--num_score_samples", 12]
    flags += ["--kid_subset_size", 10, "--num_inference_steps", 1, "--output_dir", tmp_path / "scores"]
    flags += ["--update_foreign_cards", "--overwrite"]
    status, text = run_to_end(
        run_command_of, "score", flags, fill_disk_at, name, output=tmp_path / "log", **ENVIRONMENT
    )
    assert "No space left on device" in check_one_line(status, text, tmp_path / "scores")
    assert (model / "README.md").read_text() == "# Mine\n"
    status, text = run_to_end(run_command_of, "score", flags, str, "", output=tmp_path / "again", **ENVIRONMENT)
    assert status == 0, text


# ---- what stands where a file is to be written

KINDS = {
    "a folder": lambda path: path.mkdir(parents=True),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["results.json", "metrics.jsonl", "config.json", "samples.png", "calibration.safetensors"]
)
def test_what_is_no_file_is_refused_at_the_start(kind, name, tmp_path):
    KINDS[kind](tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a file") as error:
        RunFolder(str(tmp_path)).check(flat_config(options_of(tmp_path)), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["previews", "pipeline"])
def test_what_is_no_folder_is_refused_at_the_start(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is not a folder"):
        RunFolder(str(tmp_path)).check(flat_config(options_of(tmp_path)), None)


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_scores_refuse_what_is_no_file(name, checkpoint, run_eval, tmp_path, capsys):
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as exit_status:
        run_eval("score", checkpoint, "--reference", "digits", "--output_dir", tmp_path, "--overwrite")
    assert exit_status.value.code == 2
    assert f"{name} is not a file" in capsys.readouterr().err
