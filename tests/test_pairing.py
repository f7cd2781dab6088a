"""Which student layer learns from which teacher layer."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.conftest import tiny_condition_unet, tiny_unet
from vkd_gen import LayerPair, build_student, pair_layers
from vkd_gen.pairing import stage_layers

REFUSED = (ValueError, TypeCheckError)  # the second one where the tests run with shapes and types checked


def names(pairs):
    return [(pair.student, pair.teacher) for pair in pairs]


def same(*layers):
    return [(layer, layer) for layer in layers]


def test_stages_in_the_order_they_run():
    assert stage_layers(tiny_unet((8, 8, 16))) == [
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
        "up_blocks.2",
    ]


def test_stages_run_in_that_order():
    unet = tiny_unet((8, 8, 16))
    ran = []
    for name in stage_layers(unet):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    unet(torch.zeros(1, 1, 8, 8), 0)
    assert ran == stage_layers(unet)


def test_narrower_student_pairs_stage_by_stage():
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)))
    # Shapes by hand: the first of two stages halves 8x8, the second does not; the decoder doubles at its first stage.
    assert pairs == [
        LayerPair("down_blocks.0", "down_blocks.0", (8, 4, 4), (16, 4, 4)),
        LayerPair("down_blocks.1", "down_blocks.1", (16, 4, 4), (32, 4, 4)),
        LayerPair("mid_block", "mid_block", (16, 4, 4), (32, 4, 4)),
        LayerPair("up_blocks.0", "up_blocks.0", (16, 8, 8), (32, 8, 8)),
        LayerPair("up_blocks.1", "up_blocks.1", (8, 8, 8), (16, 8, 8)),
    ]
    assert [(pair.student_channels, pair.teacher_channels) for pair in pairs] == [
        (8, 16), (16, 32), (16, 32), (16, 32), (8, 16),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_students_of_any_width_and_depth_pair_with_their_own_stages(width, layers_per_block):
    teacher = tiny_unet((8, 16, 16), layers_per_block=2)
    student = build_student(teacher, width=width, layers_per_block=layers_per_block)
    assert names(pair_layers(student, teacher)) == same(*stage_layers(teacher))


def test_fewer_stages_pair_by_resolution():
    """Three teacher stages end at 4x4, 2x2 and 2x2, two student stages at 4x4 and 4x4."""
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 16, 32)))
    for pair in pairs:
        assert pair.student_shape[1:] == pair.teacher_shape[1:]
    # Encoder: only the teacher's first stage is 4x4; counted from the end, the student's last learns from it.
    # Middle: 4x4 and 2x2, no pair. Decoder: 8x8 and 8x8 against 4x4, 8x8 and 8x8.
    assert names(pairs) == [
        ("down_blocks.1", "down_blocks.0"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
    ]


@pytest.mark.parametrize(("student", "teacher"), [((8, 16), (16, 16, 32)), ((8, 8, 16), (16, 32)), ((8,), (8, 8, 8))])
def test_matched_stages_keep_their_order_and_are_used_once(student, teacher):
    student, teacher = tiny_unet(student), tiny_unet(teacher)
    pairs = pair_layers(student, teacher)
    for side, unet in (("student", student), ("teacher", teacher)):
        used = [getattr(pair, side) for pair in pairs]
        assert used == [name for name in stage_layers(unet) if name in used]
    assert all(pair.student.split(".")[0] == pair.teacher.split(".")[0] for pair in pairs)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", same("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")),
        ("mid_and_up", same("mid_block", "up_blocks.0", "up_blocks.1")),
        ("last_up", same("up_blocks.1")),
    ],
)
def test_choice_of_stages(layers, expected):
    assert names(pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), layers=layers)) == expected


def test_conditional_unets_pair_too():
    pairs = pair_layers(tiny_condition_unet((8, 16)), tiny_condition_unet((16, 32)))
    assert names(pairs) == same("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")


# ---- named pairs


def test_named_pairs_are_kept_in_their_order():
    wanted = [("mid_block", "down_blocks.1"), ("conv_in", "conv_in")]
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=wanted)
    assert pairs == [
        LayerPair("mid_block", "down_blocks.1", (16, 4, 4), (32, 4, 4)),
        LayerPair("conv_in", "conv_in", (8, 8, 8), (16, 8, 8)),
    ]


def test_a_teacher_layer_may_be_named_twice():
    wanted = [("down_blocks.1", "mid_block"), ("mid_block", "mid_block")]
    assert names(pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=wanted)) == wanted


def test_token_layers_count_channels_last():
    layer = "mid_block.attentions.0.to_q"
    (pair,) = pair_layers(tiny_unet((8, 16), attention=True), tiny_unet((16, 32), attention=True), pairs=same(layer))
    assert (pair.student_shape, pair.teacher_shape) == ((16, 16), (16, 32))  # 4x4 positions, channels
    assert (pair.student_channels, pair.teacher_channels) == (16, 32)


# ---- errors


@pytest.mark.parametrize("pair", [("mid_blok", "mid_block"), ("mid_block", "mid_blok")])
def test_unknown_name(pair):
    with pytest.raises(ValueError, match=r"no layer 'mid_blok'.*'mid_block'"):
        pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=[pair])


def test_student_layer_named_twice():
    with pytest.raises(ValueError, match="paired twice"):
        pair_layers(tiny_unet(), tiny_unet(), pairs=[("mid_block", "mid_block"), ("mid_block", "down_blocks.1")])


@pytest.mark.parametrize("pair", [("up_blocks.0", "mid_block"), ("mid_block", "conv_in")])
def test_unlike_resolutions_of_maps(pair):
    with pytest.raises(ValueError, match="differ in resolution"):
        pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=[pair])


def test_unlike_numbers_of_tokens():
    """64 tokens of the 8x8 stage against 16 of the 4x4 middle: also unlike resolutions."""
    with pytest.raises(ValueError, match="differ in resolution"):
        pair_layers(
            tiny_unet((8, 16), attention=True),
            tiny_unet((16, 32), attention=True),
            pairs=[("down_blocks.0.attentions.0.to_q", "mid_block.attentions.0.to_q")],
        )


def test_map_against_tokens():
    with pytest.raises(ValueError, match="differ in resolution"):
        pair_layers(
            tiny_unet((8, 16), attention=True),
            tiny_unet((16, 32), attention=True),
            pairs=[("mid_block", "mid_block.attentions.0.to_q")],
        )


def test_no_pairs_given():
    with pytest.raises(ValueError, match="no layer pairs are given"):
        pair_layers(tiny_unet(), tiny_unet(), pairs=[])


@pytest.mark.parametrize("layers", ["all", "last_up"])
def test_no_stage_alike(layers):
    """Of 16x16 and 8x8 images, no stage at the student's single resolution."""
    with pytest.raises(
        ValueError, match=r"no stage of the student.*mid_block 16x16x16.*mid_block 16x4x4.*name the pairs"
    ):
        pair_layers(tiny_unet((16,), size=16), tiny_unet((8, 16), size=8), layers=layers)


def test_unknown_choice():
    with pytest.raises(REFUSED, match="middle"):
        pair_layers(tiny_unet(), tiny_unet(), layers="middle")
