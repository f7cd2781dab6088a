"""Weights that students take over: by depth, by width, fitted."""

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.conftest import make_batch, tiny_condition_unet, tiny_unet
from vkd_gen.features import example_inputs
from vkd_gen.students import (
    REDUCTIONS,
    Reduction,
    build_student,
    compare_layer_choices,
    inherit_weights,
    layer_choices,
    step0_error,
)
from vkd_gen.students.channels import keep_highest, keep_restorable
from vkd_gen.students.streams import Stream, default_layers, link_layers, match_stages

CHOICES = ("activation", "magnitude", "first", "random")


def unconditional(scale=1, **config):
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8 * scale, 16 * scale),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    torch.manual_seed(0)
    return shaken(UNet2DModel(**{**settings, **config}))


def conditional(scale=1, **config):
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8 * scale, 16 * scale),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
    }
    torch.manual_seed(0)
    return shaken(UNet2DConditionModel(**{**settings, **config}))


def shaken(unet):
    """Biases and norms off their starting values: a wrong channel shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return unet.eval()


FAMILIES = {
    "no attention": lambda scale=1: unconditional(
        scale, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False
    ),
    "attention": unconditional,
    "three layers": lambda scale=1: unconditional(scale, layers_per_block=3),
    "equal stages": lambda scale=1: unconditional(scale, block_out_channels=(16 * scale, 16 * scale)),
    "scale and shift": lambda scale=1: unconditional(scale, resnet_time_scale_shift="scale_shift"),
    "resnet samplers": lambda scale=1: unconditional(scale, downsample_type="resnet", upsample_type="resnet"),
    "classes": lambda scale=1: unconditional(scale, num_class_embeds=5),
    "learned time": lambda scale=1: unconditional(scale, time_embedding_type="learned", num_train_timesteps=1000),
    "no middle": lambda scale=1: unconditional(scale, mid_block_type=None),
    "cross attention": conditional,
    "Stable Diffusion 2": lambda scale=1: conditional(
        scale, attention_head_dim=(2 * scale, 4 * scale), use_linear_projection=True
    ),
    "SDXL": lambda scale=1: conditional(
        scale,
        attention_head_dim=(2 * scale, 4 * scale),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ),
    "class concatenated": lambda scale=1: conditional(scale, num_class_embeds=5, class_embeddings_concat=True),
    "class projected": lambda scale=1: conditional(
        scale, class_embed_type="simple_projection", projection_class_embeddings_input_dim=7
    ),
}


def inputs_of(unet, batch_size=2):
    inputs = example_inputs(unet) if unet.config.class_embed_type is None else conditional_inputs(unet)
    generator = torch.Generator().manual_seed(1)

    def fill(value):
        if isinstance(value, dict):
            return {name: fill(entry) for name, entry in value.items()}
        if value.dtype == torch.long:
            return torch.randint(1, 5, (batch_size,), generator=generator)
        return torch.randn(batch_size, *value.shape[1:], generator=generator)

    return {**fill(inputs), "timestep": torch.tensor([3, 900])[:batch_size]}


def conditional_inputs(unet):
    return {
        "sample": torch.zeros(1, 4, 8, 8),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 8, 6),
        "class_labels": torch.zeros(1, unet.config.projection_class_embeddings_input_dim),
    }


def predict(unet):
    with torch.no_grad():
        return unet.eval()(**inputs_of(unet)).sample


def batches_of(unet, num=2):
    conditioning = {name: value for name, value in inputs_of(unet).items() if name not in ("sample", "timestep")}
    channels = unet.config.in_channels
    return [
        {**make_batch(2, channels=channels, size=8, seed=seed), "conditioning": conditioning} for seed in range(num)
    ]


def inherit(student, teacher, noise_scheduler, **options):
    return inherit_weights(student, teacher, batches=batches_of(teacher), noise_scheduler=noise_scheduler, **options)


# ---- exactness


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_as_wide_and_deep_is_the_teacher(family):
    teacher = FAMILIES[family]()
    torch.manual_seed(1)
    student = build_student(teacher, Reduction())
    assert not torch.equal(predict(student), predict(teacher))
    report = inherit_weights(student, teacher)
    assert not report.sliced
    assert not report.random
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name
    assert torch.equal(predict(student), predict(teacher))


@pytest.mark.parametrize("family", set(FAMILIES) - {"learned time"})
def test_a_wider_student_computes_the_same(family):
    """Every channel stands there twice and counts half: exact but for the frequencies of the time embedding."""
    teacher = FAMILIES[family]()
    with torch.no_grad():
        teacher.time_embedding.linear_1.weight.zero_()  # they are others in a wider student
    student = build_student(teacher, Reduction(width=2.0))
    report = inherit_weights(student, teacher)
    assert not report.random
    torch.testing.assert_close(predict(student), predict(teacher), rtol=1e-4, atol=1e-5)


def with_dead_channels(family):
    """A teacher of twice the width that computes what a small UNet does, and the small UNet.

    Every second channel holds what the one before it does, so that group norms see the same numbers, and is read with
    weights of zero. Built from shapes alone, knowing nothing of streams.
    """
    small, teacher = FAMILIES[family](1), FAMILIES[family](2)
    by_heads = isinstance(teacher, UNet2DModel) or not isinstance(teacher.config.attention_head_dim, int)
    sizes = {  # channels of a head where there are more heads, not larger ones
        name: module.to_q.out_features // module.heads
        for name, module in small.named_modules()
        if hasattr(module, "to_q")
    }
    with torch.no_grad():
        for name, source in small.state_dict().items():
            attention = next((key for key in sizes if name.startswith(key + ".to_")), None)
            unit = sizes[attention] if attention and by_heads else 1
            value = source.clone()
            for axis in range(min(2, value.ndim)):
                if teacher.state_dict()[name].shape[axis] == value.shape[axis]:
                    continue
                table = name.startswith(("class_embedding.weight", "time_proj"))
                reads = axis == 1 and not table
                is_head = attention and (axis == 0) != (".to_out." in name)
                whole = value.unflatten(axis, (-1, unit if is_head else 1))
                dead = reads or (".to_k." in name and not by_heads)
                value = torch.stack([whole, torch.zeros_like(whole) if dead else whole], axis + 1).flatten(
                    axis, axis + 2
                )
            if ".to_q." in name and not by_heads:
                value = value * 2**0.5  # logits are divided by the root of a head's channels
            teacher.state_dict()[name].copy_(value)
    torch.testing.assert_close(predict(teacher), predict(small), rtol=1e-4, atol=1e-5)
    return teacher, small


@pytest.mark.parametrize("rescaling", ["none", "least_squares"])
@pytest.mark.parametrize("choice", ["magnitude", "activation"])
@pytest.mark.parametrize("family", set(FAMILIES) - {"learned time"})
def test_dead_channels_are_the_ones_dropped(family, choice, rescaling, noise_scheduler):
    teacher, small = with_dead_channels(family)
    student = build_student(teacher, Reduction(width=0.5))
    assert dict(student.config)["block_out_channels"] == dict(small.config)["block_out_channels"]
    report = inherit(student, teacher, noise_scheduler, channels=choice, rescaling=rescaling)
    assert not report.random
    torch.testing.assert_close(predict(student), predict(teacher), rtol=1e-3, atol=1e-4)
    if rescaling == "none":
        for name, value in student.state_dict().items():
            torch.testing.assert_close(value, small.state_dict()[name], msg=name)


@pytest.mark.parametrize("family", ["attention", "cross attention"])
def test_living_channels_are_missed(family, noise_scheduler):
    """The test above can fail."""
    teacher, _ = with_dead_channels(family)
    student = build_student(teacher, Reduction(width=0.5))
    inherit(student, teacher, noise_scheduler, channels="random", rescaling="none")
    assert (predict(student) - predict(teacher)).abs().max() > 1e-2
