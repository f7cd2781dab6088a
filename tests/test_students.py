"""Smaller UNets made from a teacher."""

import math

import pytest
import torch
from diffusers import UNet2DModel

from tests.conftest import tiny_unet
from vkd_gen import build_student


def forward(unet, size=8):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(2, 1, size, size, generator=generator), torch.tensor([3, 900])).sample


# ---- build_student


@pytest.mark.parametrize(
    ("channels", "groups", "head", "width", "expected"),
    [
        # by hand: channels * width, rounded up to a multiple of the groups (and, with attention, the head's channels)
        ((16, 32), 4, None, 0.5, (8, 16)),
        ((16, 32), 4, None, 0.3, (8, 12)),  # 4.8 and 9.6
        ((16, 32), 4, None, 0.01, (4, 4)),
        ((16, 32), 4, None, 1.0, (16, 32)),
        ((16, 32), 4, None, 1.5, (24, 48)),
        ((16, 32), 4, 8, 0.3, (8, 16)),  # multiples of 8
        ((24, 48), 4, 6, 0.3, (12, 24)),  # of 12, the least common multiple of 4 and 6: 7.2 and 14.4
        ((6, 8), 1, None, 0.5, (4, 4)),  # sines and cosines of the timestep take an even number in the first stage
        ((12, 24), 4, 8, 0.95, (12, 24)),  # a teacher whose heads do not divide its channels is not widened
    ],
)
def test_channels_of_the_student(channels, groups, head, width, expected):
    kind = "Attn" if head else ""
    teacher = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=(f"{kind}DownBlock2D",) * 2,
        up_block_types=(f"{kind}UpBlock2D",) * 2,
        norm_num_groups=groups,
        attention_head_dim=head,
        add_attention=head is not None,
    )
    student = build_student(teacher, width=width)
    assert tuple(student.config.block_out_channels) == expected
    assert forward(student).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("width", [percent / 100 for percent in range(5, 100, 5)])
def test_rounding_up_never_goes_past_the_teacher_or_a_whole_step(width):
    teacher = tiny_unet((20, 36), attention=True)
    student = build_student(teacher, width=width)
    for count, full in zip(student.config.block_out_channels, teacher.config.block_out_channels, strict=True):
        assert count % 4 == 0
        assert width * full <= count + 1e-9 < width * full + 4
        assert count <= full


def test_layers_per_block():
    teacher = tiny_unet(layers_per_block=2)
    student = build_student(teacher, layers_per_block=1)
    assert [len(block.resnets) for block in student.down_blocks] == [1, 1]
    assert [len(block.resnets) for block in student.up_blocks] == [2, 2]  # diffusers' decoder has one more
    assert [len(block.resnets) for block in build_student(teacher).down_blocks] == [2, 2]


def test_everything_else_is_the_teachers():
    teacher = tiny_unet((16, 32), layers_per_block=2, dropout=0.1, act_fn="gelu", size=16)
    student = build_student(teacher, width=0.5, layers_per_block=1)
    assert type(student) is UNet2DModel
    public = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    changed = {name for name, value in public.items() if student.config[name] != value}
    assert changed == {"block_out_channels", "layers_per_block"}


def test_student_does_not_share_or_copy_weights():
    teacher = tiny_unet()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = build_student(teacher, width=1.0)
    assert not torch.equal(student.conv_in.weight, teacher.conv_in.weight)
    with torch.no_grad():
        student.conv_in.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_student_does_not_carry_the_teachers_path(tmp_path):
    """It would be exported: a private path, and a wrong origin."""
    tiny_unet((16, 32)).save_pretrained(tmp_path / "private-folder")
    student = build_student(UNet2DModel.from_pretrained(tmp_path / "private-folder"), width=0.5)
    student.save_pretrained(tmp_path / "student")
    assert "private-folder" not in (tmp_path / "student" / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": width}, "width must be above 0") for width in (0.0, -0.5, math.inf, math.nan)]
    + [({"layers_per_block": count}, "layers_per_block must be at least 1") for count in (0, -1)],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_student(tiny_unet(), **options)
