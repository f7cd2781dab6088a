"""Recipes run in this process, as their command line would run them."""

import importlib.util
import sys
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

import vkd_gen.evaluation.cost as cost
from vkd_gen.training.loop import TrainingRun

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


def an_empty_figure(figure, file, **_):
    """In place of a figure that would be drawn for seconds."""
    Image.new("L", (8, 8)).save(file, format="png")


def no_macs(unet):
    return unet.num_parameters()


def no_times(unets, **_):
    return dict.fromkeys(unets, 1.0)


def skip_what_costs(monkeypatch):
    """Neither figures nor what a model costs are drawn and measured: half the time of a run of two steps."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", an_empty_figure)
    # By their code, for whoever has imported them by name.
    monkeypatch.setattr(cost.count_macs, "__code__", no_macs.__code__)
    monkeypatch.setattr(cost.milliseconds_per_image, "__code__", no_times.__code__)


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
        module.run_recipe(module.main, module.PRESETS, module.__doc__, default="digits")

    return run


@pytest.fixture
def run_recipe(monkeypatch, tmp_path):
    """Run a recipe in this process with the given flags."""
    return recipe_runner(monkeypatch, tmp_path)


@pytest.fixture
def run_interrupted(run_recipe, monkeypatch):
    """Run a recipe, interrupted after step 3, then run it again with other random numbers at its start."""
    after_step = TrainingRun._after_step

    def interrupt(run):
        after_step(run)
        if run.step == 3:
            raise KeyboardInterrupt

    def run(name, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "_after_step", interrupt)
            with pytest.raises(SystemExit):
                run_recipe(name, *flags)
        torch.manual_seed(7)
        run_recipe(name, *flags)

    return run
