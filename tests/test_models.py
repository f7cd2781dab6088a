"""UNets from folders and files: what is loaded, and that nothing large is made before it is known to be right."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from tests.conftest import one_line, tiny_condition_unet, tiny_unet
from vkd_gen.families import TEACHERS
from vkd_gen.schedule import Schedule
from vkd_gen.training.unets import (
    check_memory,
    load_teacher,
    load_unet,
    read_student_config,
    unet_without_weights,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_same(unet, other):
    values = other.state_dict()
    assert unet.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("inside", ["", "unet"])
def test_weights_of_a_folder(inside, tmp_path):
    unet = tiny_unet(attention=True)
    unet.save_pretrained(tmp_path / inside)
    assert_same(load_unet(str(tmp_path)), unet)


def test_weights_in_several_files(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load_unet(str(tmp_path)), unet)


def test_weights_by_the_names_of_early_diffusers(tmp_path):
    """google/ddpm-cifar10-32 has them: as many numbers, under other names."""
    unet = tiny_unet(attention=True)
    unet.save_pretrained(tmp_path)
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(tmp_path / WEIGHTS).items():
        for new, old in early.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert_same(load_unet(str(tmp_path)), unet)


@pytest.mark.parametrize("where", ["unet/config.json", "unet", "."])
def test_a_teacher_without_weights(where, pipeline_folder):
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(pipeline_folder / "scheduler")
    (pipeline_folder / "unet" / WEIGHTS).unlink()
    loaded = load_teacher(str(pipeline_folder / where), without_weights=True)
    assert {parameter.device.type for parameter in loaded.unet.parameters()} == {"meta"}
    assert loaded.unet.config.block_out_channels == [8, 16]
    assert loaded.noise_scheduler.config.beta_schedule == "squaredcos_cap_v2"
    with pytest.raises(ValueError, match=r"holds no weights|is a file"):
        load_teacher(str(pipeline_folder / where))


@pytest.mark.parametrize("name", TEACHERS)
def test_well_known_teachers_need_no_file(name):
    unet = load_teacher(name, without_weights=True).unet
    entries = {entry: value for entry, value in TEACHERS[name].items() if entry != "_class_name"}
    assert type(unet).__name__ == TEACHERS[name]["_class_name"]
    assert {entry: unet.config[entry] for entry in entries} == entries


def test_a_students_configuration_takes_the_teachers_size(tmp_path):
    tiny_unet((8,), size=4).save_config(tmp_path)
    config = read_student_config(str(tmp_path / "config.json"), tiny_unet(size=16))
    assert (config["sample_size"], config["block_out_channels"]) == (16, [8])


@pytest.mark.parametrize("layers", [{"layers_per_block": 64, "transformer_layers_per_block": 64}])
def test_too_many_layers_together(layers):
    with pytest.raises(ValueError, match="too many stages, layers and transformer layers"):
        unet_without_weights({**TEACHERS["stable-diffusion-1"], **layers}, "it")


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


NO_UNETS = [
    ({"block_out_channels": []}, "that diffusers can build"),
    ({"block_out_channels": [-8, 16]}, "that diffusers can build"),
    ({"block_out_channels": [0, 0]}, "cannot load the UNet"),
    ({"block_out_channels": [[8], [16]]}, "that diffusers can build"),
    ({"block_out_channels": 8}, "that diffusers can build"),
    ({"block_out_channels": "many"}, "no UNet that diffusers can build"),
    ({"block_out_channels": [1024, 1024]}, r"101 have another shape \(conv_in.weight is \[8, 1, 3, 3\], not \[1024"),
    ({"down_block_types": ["DownBlock2D"]}, "that diffusers can build"),
    ({"down_block_types": ["os.system", "DownBlock2D"]}, "that diffusers can build"),
    ({"norm_num_groups": 7}, "that diffusers can build"),
    ({"layers_per_block": "two"}, "layers_per_block is 'two', no number"),
    ({"norm_eps": "small"}, "norm_eps is 'small', no number"),
    ({"act_fn": "os.system"}, "that diffusers can build"),
    ({"num_class_embeds": -5}, "that diffusers can build"),
    ({"sample_size": "8"}, "sample_size is 8, no size"),
    ({"sample_size": 8.5}, "sample_size is 8.5, no size"),
    ({"sample_size": [8, 8, 8]}, r"sample_size is \[8, 8, 8\], no size"),
    ({"sample_size": [8, 16]}, "8 x 16 pixels.*square"),
]
NO_SCHEDULES = [
    ({"num_train_timesteps": 0}, "no schedule of noise: it has 0 betas for 0 steps"),
    ({"num_train_timesteps": 10**12}, "no schedule that could be built: num_train_timesteps is"),
    ({"beta_end": 2}, "each from 0 to 1"),
    ({"beta_start": float("nan")}, "each from 0 to 1"),
    ({"trained_betas": [0.1, 0.2]}, "it has 2 betas for 1000 steps"),
    ({"prediction_type": "flow"}, "prediction type 'flow' is not one of"),
]


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        *(("unet/config.json", *case) for case in NO_UNETS),
        *(("scheduler/scheduler_config.json", *case) for case in NO_SCHEDULES),
    ],
    ids=str,
)
def test_a_teacher_of_nonsense_is_told_in_one_line(file, changes, words, pipeline_folder):
    change(pipeline_folder / file, **changes)
    with one_line(words):
        Schedule.of(load_teacher(str(pipeline_folder)).noise_scheduler)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [("", "it is no JSON"), ("[" * 100_000, r"it is no JSON \(maximum recursion"), ("[]", "not a JSON object")],
)
def test_a_configuration_that_is_none(file, text, words, pipeline_folder):
    (pipeline_folder / file).write_text(text)
    with pytest.raises(ValueError, match=rf"config.json.*{words}"):
        load_teacher(str(pipeline_folder))


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        (lambda: tiny_unet(num_class_embeds=1), "num_class_embeds 1; .*2 is least"),
        (lambda: tiny_unet(class_embed_type="timestep"), "class_embed_type 'timestep'"),
        (
            lambda: UNet2DModel.from_config({**tiny_unet().config, "out_channels": 2}),
            "a UNet that also predicts a variance",
        ),
        (tiny_condition_unet, "UNet2DConditionModel"),
    ],
)
def test_a_teacher_of_another_kind(unet, words, tmp_path):
    unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_teacher(str(tmp_path))


def test_a_teacher_of_another_family(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"FlowMatch.*not a schedule of betas"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "Transformer2DModel"}, "Transformer2DModel; known are UNet2DModel"),
        ({"in_channels": 3, "out_channels": 3}, "has in_channels 3 and the teacher 1"),
        ({"num_class_embeds": 3}, "has num_class_embeds 3 and the teacher None"),
        (
            {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 8, "norm_num_groups": 4},
            "has cross_attention_dim 8 and the teacher None",
        ),
    ],
)
def test_a_student_that_cannot_learn_from_its_teacher(changes, words, tmp_path):
    tiny_unet().save_config(tmp_path)
    change(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=words):
        read_student_config(str(tmp_path / "config.json"), tiny_unet())


def test_weights_larger_than_the_machine():
    with torch.device("meta"):
        unet = tiny_unet((2**16, 2**16))
    with pytest.raises(ValueError, match=r"the weights of it would take [\d,]+ GB; this machine has [\d,]+ GB"):
        check_memory(unet, "it")
    check_memory(tiny_unet(), "it")
