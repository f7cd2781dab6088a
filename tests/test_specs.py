"""Named students and what is published about them, from configurations alone."""

import pytest
import torch

from tests.conftest import tiny_unet
from vkd_gen.evaluation.cost import count_macs, count_parameters
from vkd_gen.families import PUBLISHED, REDUCTIONS, TEACHERS, Reduction, build_student, published_cost, reduce_config


def on_meta(teacher, student=None):
    with torch.device("meta"):
        return build_student(TEACHERS[teacher], REDUCTIONS[student] if student else None)


EXACT = {
    # Counted from the published weights: stable-diffusion-v1-5, Nota's BK-SDM and BK-SDM-v2, google/ddpm-cifar10-32,
    # stable-diffusion-xl-base-1.0.
    ("stable-diffusion-1", None): 859_520_964,
    ("stable-diffusion-1", "bk-base"): 579_384_964,
    ("stable-diffusion-1", "bk-small"): 482_346_884,
    ("stable-diffusion-1", "bk-tiny"): 323_384_964,
    ("stable-diffusion-2", "bk-base"): 583_480_964,
    ("stable-diffusion-2", "bk-small"): 485_787_524,
    ("stable-diffusion-2", "bk-tiny"): 326_825_604,
    ("ddpm-cifar10-32", None): 35_746_307,
    ("stable-diffusion-xl", None): 2_567_463_684,
}


@pytest.mark.parametrize("names", EXACT, ids=lambda names: "-".join(map(str, names)))
def test_parameters_equal_those_of_the_published_weights(names):
    assert count_parameters(on_meta(*names)) == EXACT[names]


@pytest.mark.parametrize("names", PUBLISHED, ids=lambda names: "-".join(map(str, names)))
def test_published_costs(names):
    """KOALA's numbers are cut to millions (865.9 M stands as 865M); Diff-Pruning's student is not this one exactly."""
    unet, published = on_meta(*names), PUBLISHED[names]
    assert published_cost(unet.config) == published
    assert count_parameters(unet) == pytest.approx(
        published.parameters, rel=0.02 if {"ddpm-20m", "ssd-1b-like"} & {*names} else 2e-3
    )
    if published.macs:
        # Their counter leaves attention's products out: five layers at 16 x 16 positions, the middle's at 4 x 4.
        channels = unet.config.block_out_channels[1]
        products = 2 * channels * (5 * 256**2 + 16**2)
        assert round(count_macs(unet) - products, -8) == published.macs
    assert published.source


def test_the_cifar10_student_has_the_share_that_was_published():
    teacher, student = on_meta("ddpm-cifar10-32"), on_meta("ddpm-cifar10-32", "ddpm-20m")
    assert tuple(student.config.block_out_channels) == (96, 192, 192, 192)
    assert count_parameters(student) == 20_118_915  # 19.8 M published: 1.6 % more
    assert count_parameters(student) / count_parameters(teacher) == pytest.approx(19.8 / 35.7, abs=0.01)
    assert count_macs(student) / count_macs(teacher) == pytest.approx(3.4 / 6.1, abs=0.015)


def test_koalas_configuration():
    student = on_meta("stable-diffusion-xl", "koala-700m")
    assert student.mid_block is None
    transformers = [
        [len(attention.transformer_blocks) for attention in getattr(block, "attentions", [])]
        for block in (*student.down_blocks, *student.up_blocks)
    ]
    assert transformers == [[], [2], [5], [5, 5], [2, 2], []]  # the model card: Tx blocks 0, 2, 5
    assert len(on_meta("stable-diffusion-xl", "koala-1b").mid_block.attentions[0].transformer_blocks) == 6


@pytest.mark.parametrize("name", ["koala-1b", "koala-700m"])
def test_koalas_are_of_stable_diffusion_xl(name):
    with pytest.raises(ValueError, match="names 3 stages; the student has 4"):
        reduce_config(TEACHERS["stable-diffusion-1"], REDUCTIONS[name])
    with pytest.raises(ValueError, match="UNet2DModel has no transformer layers"):
        reduce_config(TEACHERS["ddpm-cifar10-32"], REDUCTIONS[name])


def test_published_cost_reads_any_form_of_a_configuration():
    published = PUBLISHED["stable-diffusion-2", "bk-tiny"]
    config = reduce_config(TEACHERS["stable-diffusion-2"], REDUCTIONS["bk-tiny"])
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    assert published_cost(as_json) == published
    assert (
        published_cost({**as_json, "layers_per_block": [1, 1, 1], "_class_name": "UNet2DConditionModel"}) == published
    )
    assert published_cost({**as_json, "upcast_attention": True, "norm_eps": 1e-6}) == published
    short = {name: as_json[name] for name in (*TEACHERS["stable-diffusion-2"], "mid_block_type") if name in as_json}
    assert published_cost(short) == published


def test_published_macs_are_those_of_one_sample_size():
    config = {**TEACHERS["ddpm-cifar10-32"], "sample_size": 64}
    assert published_cost(config).parameters == 35_700_000
    assert published_cost(config).macs is None
    assert published_cost(TEACHERS["ddpm-cifar10-32"]).macs == 6_100_000_000


@pytest.mark.parametrize(
    "config",
    [
        tiny_unet().config,
        {**TEACHERS["ddpm-cifar10-32"], "num_class_embeds": 10},
        {**TEACHERS["stable-diffusion-1"], "in_channels": 9},  # its inpainting form
        reduce_config(TEACHERS["stable-diffusion-1"], Reduction(width=0.5)),
    ],
    ids=["tiny", "classes", "inpainting", "narrow"],
)
def test_nothing_is_published_about_other_unets(config):
    assert published_cost(config) is None
