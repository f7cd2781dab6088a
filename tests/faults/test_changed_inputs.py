"""What is written over a file after it was loaded changes nothing, and cutting it kills nobody."""

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from tests.conftest import tiny_unet
from tests.eval.conftest import save_pngs
from tests.recipes.conftest import SHORT_STUDENT
from vkd_gen.evaluation.feature_network import FeatureNetwork, load_feature_network, save_feature_network
from vkd_gen.loading import read_tensors
from vkd_gen.pipelines import load_pipeline, stock_pipeline
from vkd_gen.training.loop import Loop
from vkd_gen.training.unets import load_teacher, load_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def overwrite(file):
    """In place, as `cp` does: the same file, other bytes."""
    with file.open("r+b") as opened:
        opened.seek(-2000, 2)
        opened.write(b"\xff" * 2000)


def cut(file):
    with file.open("r+b") as opened:
        opened.truncate(0)


CHANGES = {"overwritten": overwrite, "cut": cut}  # after a cut, reading a mapped page ends the process by SIGBUS


def unet_folder(folder):
    tiny_unet().save_pretrained(folder)
    return folder / WEIGHTS


def pipeline_of(folder):
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder / "unet" / WEIGHTS


def sharded(folder):
    tiny_unet().save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("*.safetensors"))[-1]


def network_of(folder):
    save_feature_network(FeatureNetwork(width=4), folder / "x.safetensors", {})
    return folder / "x.safetensors"


def tensors_of(folder):
    save_file({"x": torch.rand(3000)}, folder / "x.safetensors")
    return folder / "x.safetensors"


LOADED = {
    "teacher": (unet_folder, lambda file: load_teacher(str(file.parent)).unet.state_dict()),
    "teacher in several files": (sharded, lambda file: load_teacher(str(file.parent)).unet.state_dict()),
    "student": (unet_folder, lambda file: load_unet(str(file.parent)).state_dict()),
    "pipeline": (pipeline_of, lambda file: load_pipeline(str(file.parents[1])).unet.state_dict()),
    "feature network": (network_of, lambda file: load_feature_network(file).state_dict()),
    "tensors": (tensors_of, read_tensors),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LOADED)
def test_a_file_that_changes_under_a_run(tmp_path, name, change):
    prepare, load = LOADED[name]
    file = prepare(tmp_path)
    untouched = {key: value.clone() for key, value in load(file).items()}
    tensors = load(file)
    CHANGES[change](file)
    assert tensors.keys() == untouched.keys()
    assert all(torch.equal(value, untouched[key]) for key, value in tensors.items())


@pytest.mark.parametrize("what", ["nothing", "replaced"])
def test_images_that_change_under_a_run(what, tmp_path, run_recipe, monkeypatch, capfd):
    unet_folder(tmp_path / "teacher")
    save_pngs(tmp_path / "images", 12)
    after_step, file = Loop._after_step, tmp_path / "images/000003.png"

    def change(run):
        after_step(run)
        if what == "replaced":
            file.write_bytes((tmp_path / "images/000004.png").read_bytes())

    monkeypatch.setattr(Loop, "_after_step", change)
    flags = (*SHORT_STUDENT, "--teacher", tmp_path / "teacher", "--dataset", tmp_path / "images", "--method", "output")
    run_recipe("train_student_unet", *flags, "--extractor", "none", "--output_dir", tmp_path / "run")
    assert (f"files of {tmp_path / 'images'} changed while the run" in capfd.readouterr().out) == (what != "nothing")
    assert (tmp_path / "run/pipeline/model_index.json").exists()
