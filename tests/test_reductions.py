"""Students of any diffusers UNet from its configuration, against the published ones."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.conftest import tiny_condition_unet, tiny_unet
from vkd_gen.evaluation.cost import count_parameters
from vkd_gen.features import example_inputs
from vkd_gen.pairing import pair_layers
from vkd_gen.students import REDUCTIONS, Reduction, build_student, reduce_config

# The configurations of stable-diffusion-v1-5 and stable-diffusion-2-base, as their model cards' config.json have them.
SD1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD2 = {**SD1, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}


def on_meta(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(
    ("config", "name", "parameters"),
    [
        # Parameters of the published UNets: Nota's model cards (BK-SDM, BK-SDM-v2), counted from their weights.
        (SD1, None, 859_520_964),
        (SD1, "bk-base", 579_384_964),
        (SD1, "bk-small", 482_346_884),
        (SD1, "bk-tiny", 323_384_964),
        (SD2, "bk-base", 583_480_964),
        (SD2, "bk-small", 485_787_524),
        (SD2, "bk-tiny", 326_825_604),
    ],
)
def test_published_students_have_the_published_size(config, name, parameters):
    teacher = on_meta(config)
    with torch.device("meta"):
        student = build_student(teacher, REDUCTIONS[name]) if name else teacher
    assert count_parameters(student) == parameters


REDUCED = [
    Reduction(width=0.5),
    Reduction(width=0.3, layers_per_block=1),
    Reduction(width=2.0),
    Reduction(drop_mid_block=True),
    Reduction(drop_stages=(-1,)),
    Reduction(drop_stages=(0,), width=0.5),
    Reduction(layers_per_block=3, drop_mid_block=True, drop_stages=(1,)),
    REDUCTIONS["bk-tiny"],
]
TEACHERS = {
    "plain": lambda: tiny_unet((8, 16, 16)),
    "with attention": lambda: tiny_unet((8, 16, 16), attention=True),
    "two stages": lambda: tiny_unet((8, 16)),
    "cross attention": tiny_condition_unet,
}


@pytest.mark.parametrize("reduction", REDUCED, ids=str)
@pytest.mark.parametrize("family", TEACHERS)
def test_students_run_save_reload_and_pair(family, reduction, tmp_path):
    teacher = TEACHERS[family]()
    student = build_student(teacher, reduction)
    inputs = example_inputs(student)
    prediction = student(**inputs).sample
    assert prediction.shape == inputs["sample"].shape
    prediction.square().mean().backward()
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    torch.testing.assert_close(again(**inputs).sample, prediction)
    pairs = pair_layers(student, teacher)
    assert all(pair.student_shape[1:] == pair.teacher_shape[1:] for pair in pairs)
    if not reduction.drop_stages:
        stages = 2 * len(student.config.block_out_channels) + (not reduction.drop_mid_block)
        assert [pair.student for pair in pairs] == [pair.teacher for pair in pairs]
        assert len(pairs) == stages


def test_attention_is_dropped_where_it_is_named():
    teacher = tiny_unet((8, 16, 16), attention=True)
    student = build_student(teacher, Reduction(drop_attention=(0,)))
    assert tuple(student.config.down_block_types) == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    assert tuple(student.config.up_block_types) == ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert 0 < count_parameters(student) < count_parameters(teacher)


def test_heads_keep_their_channels_where_every_stage_has_its_own_number():
    config = reduce_config(dict(on_meta(SD2).config), Reduction(width=0.5))
    assert config["block_out_channels"] == (192, 320, 640, 640)  # 160 rounded up to heads of 64 channels
    assert config["attention_head_dim"] == (3, 5, 10, 10)
    config = reduce_config(dict(on_meta(SD1).config), Reduction(width=0.5))
    assert config["block_out_channels"] == (160, 320, 640, 640)
    assert config["attention_head_dim"] == 8


def test_layers_for_each_stage():
    student = build_student(tiny_condition_unet(), Reduction(layers_per_block=(2, 1)))
    assert [len(block.resnets) for block in student.down_blocks] == [2, 1]
    with pytest.raises(ValueError, match="UNet2DModel takes one layers_per_block"):
        build_student(tiny_unet(), Reduction(layers_per_block=(2, 1)))


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        (Reduction(width=0), "width must be above 0"),
        (Reduction(width=float("nan")), "width must be above 0"),
        (Reduction(layers_per_block=0), "layers_per_block must be at least 1"),
        (Reduction(layers_per_block=(1, 1, 1)), "names 3 stages; the student has 2"),
        (Reduction(drop_stages=(2,)), "there is no stage 2.*0 to 1"),
        (Reduction(drop_stages=(0, 1)), "at least one stage"),
        (Reduction(drop_attention=(1,)), "has no attention to drop"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(reduction, words):
    with pytest.raises(ValueError, match=words):
        build_student(tiny_condition_unet(), reduction)
