"""Models small enough to train on a CPU within a test."""

import contextlib
import os
import pickle
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of commands that tests start: tiny models lose by more threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from vkd_gen.data.draws import Draws
from vkd_gen.data.samples import Pixels
from vkd_gen.schedule import Schedule

torch.set_num_threads(1)
CIFAR10 = os.environ.get("VKD_GEN_CIFAR10")


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch):
    """Where datasets copies what it loads: a folder of the test's own."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    datasets.disable_progress_bars()
    return folder


def tiny_unet(channels=(8, 16), *, layers_per_block=1, size=8, in_channels=1, attention=False, seed=0, **config):
    """An unconditional UNet of a few thousand parameters."""
    torch.manual_seed(seed)
    kind = "Attn" if attention else ""
    kinds = {
        "down_block_types": (f"{kind}DownBlock2D",) * len(channels),
        "up_block_types": (f"{kind}UpBlock2D",) * len(channels),
        "attention_head_dim": 4,
    }
    return UNet2DModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=in_channels,
        layers_per_block=layers_per_block,
        block_out_channels=channels,
        norm_num_groups=4,
        add_attention=attention,
        **{**kinds, **config},
    )


def tiny_condition_unet(channels=(8, 16), *, layers_per_block=1, size=8, seed=0, **config):
    """A text-conditional UNet with cross attention, as Stable Diffusion's."""
    torch.manual_seed(seed)
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
    }
    return UNet2DConditionModel(
        sample_size=size,
        layers_per_block=layers_per_block,
        block_out_channels=channels,
        norm_num_groups=4,
        **{**kinds, **config},
    )


def make_batch(batch_size=4, *, channels=1, size=8, seed=0):
    """A batch as `distillation_losses` takes it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, channels, size, size)
    return {
        "sample": torch.rand(shape, generator=generator) * 2 - 1,
        "noise": torch.randn(shape, generator=generator),
        "timesteps": torch.randint(0, 1000, (batch_size,), generator=generator),
    }


class Times:
    """In place of a schedule: timesteps are the times themselves."""

    timesteps = staticmethod(lambda time: time)


class DrawsByNumber:
    """Draws one at a time, without the batch dimension, in one flat mapping, with `time` in place of `timesteps`."""

    def __init__(self, images, *, random_flip=False, guidance_dropout=0.0, **options):
        samples = Pixels(images, random_flip=random_flip, guidance_dropout=guidance_dropout)
        self.draws = Draws(samples, Times(), **options)

    def __getitem__(self, number):
        if isinstance(number, list):
            return flat_draws(self.draws[number])
        return {name: value[0] for name, value in flat_draws(self.draws[[number]]).items()}


def flat_draws(batch):
    """A batch of such draws as one flat mapping."""
    batch = dict(batch)
    return {**batch.pop("conditioning"), "time": batch.pop("timesteps"), **batch}


@pytest.fixture
def schedule():
    """The DDPM schedule, epsilon."""
    return Schedule.of(DDPMScheduler())


@pytest.fixture
def pipeline_folder(tmp_path):
    """A saved pipeline with a tiny UNet, as teachers come."""
    from vkd_gen.pipelines import stock_pipeline

    folder = tmp_path / "teacher"
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def executed(tmp_path):
    """The file that a payload makes; it must not be there when the test ends."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


FORMATS = ["zip", "legacy", "pickle", "nested"]


def write_payload(file, executed, kind="zip"):
    match kind:
        case "zip":
            torch.save(Payload(executed), file)
        case "legacy":
            torch.save({"weight": Payload(executed)}, file, _use_new_zipfile_serialization=False)
        case "pickle":
            file.write_bytes(pickle.dumps(Payload(executed)))
        case "nested":
            torch.save({"state": {0: [torch.zeros(2), Payload(executed)]}, "param_groups": []}, file)
    return file


@contextlib.contextmanager
def one_line(words):
    """A ValueError for the user, inside: one line with these words."""
    with pytest.raises(ValueError, match=words) as error:
        yield
    assert "\n" not in str(error.value)


def refused(capture, run, *flags):
    """The one line on standard error of a command that exits with status 2."""
    capture.readouterr()
    with pytest.raises(SystemExit) as exit_status:
        run(*flags)
    assert exit_status.value.code == 2
    lines = [line for line in capture.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1
    return lines[0]
