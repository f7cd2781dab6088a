"""Evaluation commands run in this process, as their command line would run them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from tests.conftest import tiny_unet
from vkd_gen.evaluation.feature_network import FeatureNetwork, save_feature_network
from vkd_gen.pipelines import stock_pipeline

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """No test sees what another one, or the user, has kept."""
    monkeypatch.setenv("VKD_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run_eval(monkeypatch):
    """Run an evaluation command in this process with the given flags."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def run(name, *flags):
        spec = importlib.util.spec_from_file_location(f"eval_{name}", EVAL / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"eval/{name}.py", *map(str, flags)])
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        config = next(getattr(module, kind) for kind in vars(module) if kind == f"{name.title()}Config")
        module.run_command(module.main, config, module.__doc__, getattr(module, "PRESETS", None))

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A pipeline with a tiny UNet of random weights for grey 8x8 images."""
    folder = tmp_path_factory.mktemp("checkpoint") / "pipeline"
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def feature_network(tmp_path_factory):
    """A feature network of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "features.safetensors"
    network = FeatureNetwork(width=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # so that images of unlike brightness lie well apart
    save_feature_network(network, path, {"dataset": "stripes"})
    return path


def save_pngs(folder, count, *, size=8, seed=0, mode="L", brightness=0):
    """Smooth random images as PNGs."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,)}[mode]
    for number in range(count):
        coarse = generator.integers(0, 200, (4, 4, *channels), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(image, dtype=int) + brightness, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of grey images, unlike each other."""
    root = tmp_path_factory.mktemp("images")
    return save_pngs(root / "dark", 40), save_pngs(root / "bright", 30, seed=1, brightness=40)


BOTH = """
import runpy, sys

for given in {calls}:
    sys.argv = given
    runpy.run_path(given[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory, checkpoint, folders, feature_network):
    """What one start of two processes makes: seven images in `images`, and scores in `scores`; batches of 2 and 7."""
    root = tmp_path_factory.mktemp("two")
    made = [checkpoint, "--num_images", 7, "--batch_size", 2, "--num_inference_steps", 3, "--output", root / "images"]
    scored = [folders[0], "--reference", folders[1], "--extractor", feature_network, "--kid_subset_size", 20]
    scored += ["--batch_size", 7, "--output_dir", root / "scores"]
    calls = [["generate.py", *made], ["score.py", *scored]]
    calls = [[str(EVAL / name), *map(str, flags)] for name, *flags in calls]
    (root / "both.py").write_text(BOTH.format(calls=calls))
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "VKD_GEN_CACHE": str(root / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(EVAL.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, *command, str(root / "both.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Seeded random weights of torch-fidelity's Inception in the format that it downloads."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with (
        mock.patch.object(nn.Module, "load_state_dict"),
        mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"),
    ):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path
