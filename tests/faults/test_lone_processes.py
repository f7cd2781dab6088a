"""Processes that were started together and do not know of each other: each would do the whole work in one folder."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from tests.conftest import one_line, refused
from tests.faults.small_run import end_pair, error_of, options_of, train
from tests.recipes.conftest import SHORT_STUDENT, launch
from vkd_gen.training.accelerator import check_processes

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on GPUs are connected")


@pytest.fixture
def accelerator(monkeypatch):
    """One process, whatever is set afterwards."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_RANK", "RANK", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORLD_SIZE", "2", "WORLD_SIZE is 2 .*alone.*ACCELERATE_USE_CPU=1"),
        ("OMPI_COMM_WORLD_SIZE", "2", "OMPI_COMM_WORLD_SIZE is 2 .*alone"),
        # It would hold itself for one that prints nothing and checks no checkpoint to its end.
        ("RANK", "1", "RANK is 1 .*alone: unset it"),
    ],
)
def test_one_of_several_that_is_alone_is_refused(name, value, words, accelerator, monkeypatch):
    monkeypatch.setenv(name, value)
    with one_line(words):
        check_processes(accelerator)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_NTASKS": "8"}, {"PMI_SIZE": "2"}])
def test_one_that_was_started_alone_goes_on(variables, accelerator, monkeypatch, capsys):
    """Also a job array's: a cluster counts processes that have nothing to do with each other."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_processes(accelerator)
    assert capsys.readouterr().out == ""


def test_a_launcher_that_started_one_of_several_is_told_of(accelerator, monkeypatch, capsys):
    """What accelerate 1.7 to 1.15 set for MULTI_CPU with num_processes 2 and no mpirun."""
    for name, value in (("ACCELERATE_DYNAMO_BACKEND", "NO"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    check_processes(accelerator)
    out = capsys.readouterr().out
    assert out.startswith("note: ")
    assert "it has started one" in out
    assert "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node" in out


@NEEDS_NO_GPU
def test_two_lone_processes_end_before_they_write(tmp_path):
    options = options_of(tmp_path / "run")
    end_pair(tmp_path / "output", train, options, statuses=(2, 2), ACCELERATE_USE_CPU="0")
    for name in ("output", "output1"):
        assert "WORLD_SIZE is 2" in error_of((tmp_path / name).read_text())
    assert not (tmp_path / "run").exists()


def test_commands_that_evaluate_refuse_it_too(run_eval, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "0")
    for command, flags in (("generate", ["--output"]), ("score", ["--reference", "digits", "--output_dir"])):
        assert "WORLD_SIZE is 2" in refused(capsys, run_eval, command, checkpoint, *flags, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CONFIG = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1,
    "num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "main_training_function": "main", "debug": False,
}  # fmt: skip


@pytest.mark.slow
@NEEDS_NO_GPU
@pytest.mark.parametrize(
    ("config", "flags", "status"),
    [
        (None, ["--multi_gpu", "--num_processes", "2"], 1),  # a launcher's own status
        (CONFIG, [], 1),
        ({**CONFIG, "distributed_type": "MULTI_CPU"}, [], 0),
    ],
    ids=["flags", "a config file", "MULTI_CPU"],
)
def test_launchers_that_start_lone_processes(config, flags, status, pipeline_folder, tmp_path, monkeypatch):
    if config is not None:
        (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        flags = ["--config_file", tmp_path / "config.yaml"]
    given = [*SHORT_STUDENT, "--teacher", pipeline_folder, "--extractor", "none", "--method", "output"]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    done = launch("train_student_unet", *given, "--output_dir", tmp_path / "run", launcher=flags)
    assert done.returncode == status, done.stderr
    if status:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "error in process"))]
        assert lines
        assert all("WORLD_SIZE is 2" in line and "ACCELERATE_USE_CPU=1" in line for line in lines)
        assert not (tmp_path / "run").exists()
    else:
        assert "it has started one" in done.stdout
