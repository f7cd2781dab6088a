"""Recipes run in this process, as their command line would run them."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import sklearn.datasets
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file

import vkd_gen.evaluation.cost as cost
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.prompt_errors import prompt_errors
from vkd_gen.training import students
from vkd_gen.training.checkpoints import read_manifest, seal
from vkd_gen.training.loop import Loop

RECIPES = Path(__file__).parents[2] / "recipes"

SHORT_SCORES = ("--num_score_samples", "12", "--kid_subset_size", "10", "--num_inference_steps", "2")
SHORT = ("--max_train_steps", "2", "--train_batch_size", "4", "--log_every_steps", "1", *SHORT_SCORES)
SHORT_STUDENT = (*SHORT, "--calibration_samples", "192", "--inherit_samples", "16")


def load_recipe(name):
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)  # a table of text, read for each run


def an_empty_figure(figure, file, **_):
    """In place of a figure that would be drawn for seconds."""
    Image.new("L", (8, 8)).save(file, format="png")


def no_macs(unet):
    return unet.num_parameters()


def no_times(unets, **_):
    return dict.fromkeys(unets, 1.0)


def skip_what_costs(monkeypatch):
    """No figures, no costs, no table of memory, few held-out images: half the time of a run of two steps."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", an_empty_figure)
    # By their code, for whoever has imported them by name.
    monkeypatch.setattr(cost.count_macs, "__code__", no_macs.__code__)
    monkeypatch.setattr(cost.milliseconds_per_image, "__code__", no_times.__code__)
    monkeypatch.setattr(students, "show_memory", lambda *_: None)
    monkeypatch.setitem(held_out_errors.__wrapped__.__kwdefaults__, "num_draws", 64)
    for name, count in {"num_draws": 8, "num_ranked": 4}.items():
        monkeypatch.setitem(prompt_errors.__wrapped__.__kwdefaults__, name, count)


def recipe_runner(monkeypatch, folder, *, whole=False):
    """A function that runs a recipe in this process with the given flags; `whole`: with figures and costs."""
    if not whole:
        skip_what_costs(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("VKD_GEN_CACHE", str(folder / "cache"))

    def run(name, *flags):
        module = load_recipe(name)
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, flags)])
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        module.run_recipe(module.main, module.PRESETS, module.__doc__, "digits", getattr(module, "METHODS", None))

    return run


@pytest.fixture
def run_recipe(monkeypatch, tmp_path):
    """Run a recipe in this process with the given flags."""
    return recipe_runner(monkeypatch, tmp_path)


def run_until(step, run, *flags):
    """Ctrl-C after a step."""
    after_step = Loop._after_step

    def interrupt(run):
        after_step(run)
        if run.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_after_step", interrupt)
        with pytest.raises(SystemExit) as exit_status:
            run(*flags)
    assert exit_status.value.code == 130


@pytest.fixture
def run_interrupted(run_recipe):
    """Run a recipe, interrupted after step 3, then run it again with other random numbers at its start."""

    def run(name, *flags, step=3):
        run_until(step, run_recipe, name, *flags)
        torch.manual_seed(7)
        run_recipe(name, *flags)

    return run


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics):
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in metrics]


def weights_of(run):
    (file,) = (path for path in run.glob("pipeline/*/*.safetensors") if path.parent.name in ("unet", "transformer"))
    return load_file(file)


def assert_same_weights(run, other):
    first, second = weights_of(run), weights_of(other)
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def assert_same_run(run, other):
    """Bit for bit, and nothing left behind."""
    assert without_times(read_metrics(run)) == without_times(read_metrics(other))
    assert_same_weights(run, other)
    assert not list(run.glob(".*"))


def images_in(folder, count=6, side=8, mode="L", **others):
    """Random images, and files beside them that are none: name -> content."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number}.png")
    for name, content in others.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


def reseal(checkpoint):
    """The manifest made anew, as whoever tampers with a checkpoint would."""
    said = {name: value for name, value in read_manifest(checkpoint).items() if name != "files"}
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, said)


TWO = ("--multi_gpu", "--num_processes", 2)


def launch(recipe, *flags, launcher=TWO, **environment):
    """The recipe as its users start it, by `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, RECIPES / f"{recipe}.py", *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
