"""eval/generate.py: image i is the same however it is made, and what is there is not made again."""

import json

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from tests.conftest import tiny_unet
from vkd_gen.models import Model
from vkd_gen.pipelines import stock_pipeline

STEPS = ("--num_inference_steps", 3)


def pixels_in(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def test_images_are_those_of_their_seeds_in_any_batch_and_format(tmp_path, checkpoint, run_eval):
    flags = ["--num_images", 9, "--seed", 4, *STEPS]
    run_eval("generate", checkpoint, "--output", tmp_path / "pngs", *flags)
    run_eval("generate", checkpoint, "--output", tmp_path / "odd", *flags, "--batch_size", 2)
    run_eval("generate", checkpoint, "--output", tmp_path / "array.npz", *flags, "--batch_size", 4)
    expected = Model.of_unet(tiny_unet(), DDPMScheduler()).images(range(4, 13), num_inference_steps=3).numpy()[:, 0]
    assert expected.std() > 10
    array = np.load(tmp_path / "array.npz")["arr_0"]
    assert array.shape == (9, 8, 8, 1)
    assert array.dtype == np.uint8
    for found in (pixels_in(tmp_path / "pngs"), pixels_in(tmp_path / "odd"), array[..., 0]):
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # the network's rounding
    assert not (tmp_path / "array.npz.parts").exists()
    for file in ("pngs/protocol.json", "array.npz.protocol.json"):
        assert json.loads((tmp_path / file).read_text())["seeds"] == "4 to 12"


def test_two_processes_make_the_same_files(tmp_path, checkpoint, run_eval, two_processes):
    run_eval("generate", checkpoint, "--num_images", 7, "--batch_size", 2, *STEPS, "--output", tmp_path / "one")
    names = [f"{number:06d}.png" for number in range(7)]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (two_processes / "images" / name).read_bytes()
    left = sorted(path.name for path in (two_processes / "images").glob("*"))
    assert left == sorted([*names, "generate.json", "protocol.json"])


@pytest.mark.parametrize("output", ["array.npz", pytest.param("pngs", marks=pytest.mark.slow)])
def test_an_interrupted_call_is_completed(tmp_path, checkpoint, run_eval, monkeypatch, output, capfd):
    flags = [checkpoint, "--num_images", 6, "--batch_size", 2, *STEPS, "--output", tmp_path / output]
    made = []
    original = Model.images

    def interrupted(model, seeds, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(seeds))
        return original(model, seeds, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "images", interrupted)
        with pytest.raises(SystemExit) as stop:
            run_eval("generate", *flags)
    assert stop.value.code == 130
    with pytest.raises(SystemExit):  # the rest of other images
        run_eval("generate", *flags, "--seed", 1)
    assert "--seed was 0 and is 1" in capfd.readouterr().err
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Model, "images", interrupted)
        run_eval("generate", *flags)
    assert made == [[4, 5]]
    straight = tmp_path / f"straight-{output}"
    run_eval("generate", *flags[:-1], straight)
    if output == "pngs":
        assert (pixels_in(tmp_path / output) == pixels_in(straight)).all()
    else:
        assert (np.load(tmp_path / output)["arr_0"] == np.load(straight)["arr_0"]).all()


@pytest.mark.parametrize(
    ("flag", "difference"),
    [("--sampler ddim", 0), ("--sampler ddpm", 20), ("--sampler dpm-solver", 2), ("--mixed_precision bf16", 0.05)],
)
def test_samplers_and_precision_reach_the_images(tmp_path, checkpoint, run_eval, flag, difference):
    run_eval("generate", checkpoint, "--output", tmp_path / "plain", "--num_images", 3, *STEPS)
    run_eval("generate", checkpoint, "--output", tmp_path / "other", "--num_images", 3, *STEPS, *flag.split())
    plain, other = (pixels_in(tmp_path / name).astype(int) for name in ("plain", "other"))
    found = np.abs(plain - other).mean()
    assert difference <= found <= max(3, 100 * (difference > 1)) * bool(difference)


def test_images_of_a_model_that_has_changed_are_not_kept(tmp_path, run_eval, capfd):
    folder = tmp_path / "model"
    for seed, expected in ((0, None), (1, "weights_sha256")):
        stock_pipeline(tiny_unet(seed=seed), DDPMScheduler()).save_pretrained(folder)
        flags = [folder, "--output", tmp_path / "images", "--num_images", 2, *STEPS]
        if expected is None:
            run_eval("generate", *flags)
        else:
            with pytest.raises(SystemExit):
                run_eval("generate", *flags)
            assert expected in capfd.readouterr().err


def test_fewer_images_than_are_there(tmp_path, checkpoint, run_eval, capfd):
    run_eval("generate", checkpoint, "--output", tmp_path / "images", "--num_images", 4, *STEPS)
    with pytest.raises(SystemExit):
        run_eval("generate", checkpoint, "--output", tmp_path / "images", "--num_images", 3, *STEPS)
    assert "holds more than 3 images" in capfd.readouterr().err
    assert json.loads((tmp_path / "images/protocol.json").read_text())["num_images"] == 4
