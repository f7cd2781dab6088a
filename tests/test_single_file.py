"""Checkpoints in one file, by their original names: what is loaded is what the file was made of."""

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import one_line
from tests.original_names import original_checkpoint
from tests.test_text_pipelines import assert_same, images
from tests.text_pipelines import tiny_pipeline
from vkd_gen.pipelines import load_pipeline
from vkd_gen.text_pipelines import load_text_pipeline
from vkd_gen.text_pipelines.single_file import configurations_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_one_file_is_the_folder_that_it_was_made_of(kind, tmp_path):
    pipeline = tiny_pipeline(kind, tmp_path / "folder")
    tensors = original_checkpoint(pipeline, open_clip=kind == "sd2")
    if kind == "sd1":  # as early files have them
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
        tensors["model_ema.decay"] = torch.zeros(())
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    config = str(tmp_path / "folder")
    loaded = load_text_pipeline(str(file), config=config)
    assert_same(loaded, pipeline)
    assert (images(loaded) == images(pipeline)).all()
    assert_same(load_text_pipeline(str(file), config=config, parts=("unet",)), pipeline, {"unet"})


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of a tiny Stable Diffusion 1 by their original names, and the folder they are of."""
    return original_checkpoint(tiny_pipeline("sd1", tmp_path / "folder")), tmp_path


FAULTS = [
    (lambda tensors: {"x": torch.zeros(1)}, {}, "holds no original checkpoint of Stable Diffusion"),
    (lambda tensors: {key: tensors[key] for key in tensors if "first_stage" not in key}, {}, "holds no vae"),
    (
        lambda tensors: {key: tensors[key] for key in tensors if "out.2." not in key},
        {},
        "not laid out|missing",
    ),
    (lambda tensors: {**tensors, "model.diffusion_model.out.2.bias": torch.zeros(9)}, {}, "have another shape"),
    (lambda tensors: tensors, {"config": None}, "needs the configuration.*--teacher_config"),
    (lambda tensors: tensors, {"config": "nowhere"}, "there is no pipeline folder or file nowhere"),
    (lambda tensors: tensors, {"config": "sdxl"}, "(is not laid out|missing|holds no)"),
]


@pytest.mark.parametrize(("damage", "options", "words"), FAULTS)
def test_one_file_that_cannot_be_loaded(checkpoint, damage, options, words):
    tensors, place = checkpoint
    save_file(damage(tensors), place / "model.safetensors")
    options = {"config": str(place / "folder"), **options}
    if options["config"] == "sdxl":
        tiny_pipeline("sdxl", place / "sdxl")
        options["config"] = str(place / "sdxl")
    with one_line(words):
        load_text_pipeline(str(place / "model.safetensors"), **options)


def test_flags_that_commands_of_eval_lack_are_told_with_the_one_that_has_them(checkpoint):
    tensors, place = checkpoint
    save_file(tensors, place / "model.safetensors")
    save_file({"unet.down.lora_A.weight": torch.zeros(1)}, place / "lora.safetensors")
    tiny_pipeline("sd1").save_pretrained(place / "half", variant="fp16", safe_serialization=True)
    for name, flag in (("model.safetensors", "config"), ("lora.safetensors", "lora"), ("half", "variant")):
        with one_line(f"train_student_unet.py.*--teacher_{flag}"):
            load_pipeline(str(place / name))


def test_pickles_in_one_file(tmp_path):
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"pickle")
        with one_line("pickles can run code|is no safetensors file"):
            load_text_pipeline(str(tmp_path / name))
    with one_line("is no safetensors file"):
        load_pipeline(str(tmp_path / "model.safetensors"))


def test_whose_configuration_a_file_has(checkpoint):
    """As diffusers knows it by names and shapes."""
    tensors, place = checkpoint
    save_file(tensors, place / "one.safetensors")
    assert configurations_of(place / "one.safetensors").endswith("stable-diffusion-v1-5")
