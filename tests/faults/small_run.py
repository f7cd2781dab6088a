"""A run of a few seconds, as the recipes make them, in a process of its own that can be killed.

Processes are forked from a server that has imported everything: tens of milliseconds each, where a command takes
seconds.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

import vkd_gen as vkd
from tests.conftest import tiny_unet
from tests.recipes.conftest import load_recipe, read_metrics, skip_what_costs, without_times
from vkd_gen.cli import one_line_errors
from vkd_gen.data.draws import Draws
from vkd_gen.data.images import Images
from vkd_gen.data.samples import Pixels
from vkd_gen.training.images import Data
from vkd_gen.training.loop import Loop
from vkd_gen.training.options import TrainingOptions, flat_config
from vkd_gen.training.run import Run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.small_run", "sklearn.datasets", "torch_fidelity", "tensorboard"])
STEPS = 12


def options_of(folder, **changes):
    """Options of a run with everything that a checkpoint has to hold."""
    given = {"max_train_steps": STEPS, "train_batch_size": 4, "learning_rate": 1e-2, "lr_warmup_steps": 2}
    given |= {"log_every_steps": 5, "checkpointing_steps": 3, "resume_from_checkpoint": "latest", **changes}
    return TrainingOptions(output_dir=str(folder), **given)


def train(options, *, dropout=0.1, before_step=lambda loop, batch, losses: None, after_build=lambda loop: None):
    """Distil a tiny teacher and write down what a run ends with; `weights.safetensors` is the moving average's."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 8, 8), dtype=np.uint8)
    images = Images(lambda index: Image.fromarray(pixels[index]), 8, 1, "noise", np.arange(32))
    schedule = vkd.Schedule.of(DDPMScheduler())
    with Run(options, flat_config(options)) as run:
        run.data = Data(None, images, images, images, Pixels(images), Pixels(images))
        run.begin({}, {})
        teacher_unet, student = tiny_unet(seed=1), tiny_unet((4, 8), dropout=dropout)
        pairs = vkd.pair_layers(student, teacher_unet)
        teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs])
        draws = Draws(Pixels(images), schedule, seed=options.seed)
        matchings = [
            (
                vkd.OrthogonalProjector(pair.student_channels, pair.teacher_channels, refresh_every_steps=2),
                vkd.FeatureNormalizer("center", channels=pair.teacher_channels, num_timestep_bins=2),
            )
            for pair in pairs
        ]
        projected = vkd.ProjectedStudent(student, pairs, *zip(*matchings, strict=True))
        if run.is_fresh:
            projected.calibrate(teacher, draws.apart(64), schedule)
        groups = vkd.parameter_groups(student, projected.projectors, options.adam_weight_decay)
        loop = Loop(run, projected, draws, average=student, parameter_groups=groups)
        after_build(loop)
        for batch in loop:
            losses = vkd.distillation_losses(loop.module, batch, schedule=schedule, teacher=teacher)
            before_step(loop, batch, losses)
            loop.backward(losses)
        raw = {f"raw/{name}": value.clone() for name, value in projected.state_dict().items()}
        loop.finish()
        averaged = {f"ema/{name}": value.clone() for name, value in student.state_dict().items()}
        if run.accelerator.is_main_process:
            save_file({**raw, **averaged}, run.folder.path / "weights.safetensors")
        run.end()
    return loop


def _main(environment, output, function, arguments):
    os.environ.update({"ACCELERATE_USE_CPU": "1", **environment})
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    multiprocessing.set_start_method("fork", force=True)  # those that read images are children, as a command's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    with one_line_errors("go on"):
        function(*arguments)


def start(function, *arguments, output, **environment):
    """A process that calls `function`, as a command would; what it prints is appended to the file `output`."""
    process = SERVER.Process(target=_main, args=(environment, str(output), function, arguments))
    process.start()
    return process


def run_to_end(function, *arguments, output, within=120, **environment):
    """Exit status and output of a process that calls `function` and ends within so many seconds."""
    process = start(function, *arguments, output=output, **environment)
    process.join(timeout=within)
    return process.exitcode, Path(output).read_text()


def start_processes(count, function, *arguments, output, **environment):
    """As many connected processes, as a launcher would start them; process 0 prints to `output`, n to `output`n."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = environment | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            function,
            *arguments,
            output=f"{output}{index or ''}",
            RANK=str(index),
            LOCAL_RANK=str(index),
            **common,
        )
        for index in range(count)
    ]


def end_of(processes, *, within):
    """Exit statuses, all processes having ended within so many seconds."""
    deadline = time.monotonic() + within
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def error_of(output):
    """The one line that a command which fails ends with; no traceback."""
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1, output
    return lines[0]


def assert_same_end(folder, straight):
    """Weights, moving average, projectors and metrics bit for bit, and nothing left behind."""
    assert (folder / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()
    assert without_times(read_metrics(folder)) == without_times(read_metrics(straight))
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]


def end_as(straight, options, output, function=None, *arguments):
    """What is printed by a run that goes on, as a process of its own, and ends as the undisturbed one."""
    status, output = run_to_end(function or train, options, *arguments, output=output)
    assert status == 0, output
    assert_same_end(Path(options.output_dir), straight)
    return output


def end_pair(output, function, *arguments, statuses=(0, 0), **environment):
    """What process 0 of two connected ones prints, which end with these statuses."""
    processes = start_processes(2, function, *arguments, output=output, **environment)
    found = end_of(processes, within=120)
    assert found == list(statuses), f"{found}: {Path(output).read_text()}"
    return Path(output).read_text()


EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "shutil.rmtree"}


def at_file_event(folder, number, action):
    """Call `action` before the process' n-th file operation inside `folder`, by Python's own audit events."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                action()

    sys.addaudithook(hook)


def kill_self():
    """As the kernel does when memory runs out, or a cluster does after its grace."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_student(flags, fault=None, value=None):
    """The student recipe as its command; `fault(value)` breaks the process or its disk first."""
    torch.set_num_threads(1)
    skip_what_costs(pytest.MonkeyPatch())
    module = load_recipe("train_student_unet")
    sys.argv = ["recipes/train_student_unet.py", *map(str, flags)]
    if fault is not None:
        fault(value)
    module.run_recipe(module.main, module.PRESETS, module.__doc__, "digits", getattr(module, "METHODS", None))


def train_and_be_killed(options, number):
    """Killed before the n-th file operation in the run's folder, or ends if there are fewer."""
    at_file_event(options.output_dir, number, kill_self)
    train(options)
