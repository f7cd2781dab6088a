"""Weights that students take over: by depth, by width, fitted."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from tests.conftest import make_batch, tiny_condition_unet, tiny_unet
from vkd_gen.families import (
    REDUCTIONS,
    Reduction,
    best_layers,
    build_student,
    compare_layer_choices,
    inherit_weights,
    layer_choices,
    restore,
    step0_error,
)
from vkd_gen.families.activations import Reading, read_channels
from vkd_gen.families.channels import choose_channels, keep_highest, keep_restorable
from vkd_gen.families.links import default_layers, link_layers, match_stages
from vkd_gen.families.restore import fit_layers
from vkd_gen.families.streams import Stream
from vkd_gen.families.unet import example

CHOICES = ("activation", "magnitude", "first", "random")


KINDS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def unconditional(scale=1, *, channels=(8, 16), attention=True, **config):
    widths = tuple(scale * count for count in channels)
    return shaken(tiny_unet(widths, attention=attention, **{**KINDS, **config}))


def conditional(scale=1, *, channels=(8, 16), **config):
    return shaken(
        tiny_condition_unet(tuple(scale * count for count in channels), **{"cross_attention_dim": 6, **config})
    )


def shaken(unet):
    """Biases and norms off their starting values: a wrong channel shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return unet.eval()


FAMILIES = {
    "no attention": lambda scale=1: unconditional(scale, attention=False, **PLAIN),
    "attention": unconditional,
    "three layers": lambda scale=1: unconditional(scale, layers_per_block=3),
    "equal stages": lambda scale=1: unconditional(scale, channels=(16, 16)),
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
    "simple cross attention": lambda scale=1: conditional(
        scale,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        attention_head_dim=4,
    ),
    "class concatenated": lambda scale=1: conditional(scale, num_class_embeds=5, class_embeddings_concat=True),
    "class projected": lambda scale=1: conditional(
        scale, class_embed_type="simple_projection", projection_class_embeddings_input_dim=7
    ),
}


WITH_FREQUENCIES = [family for family in FAMILIES if family != "learned time"]


def inputs_of(unet, batch_size=2):
    inputs = example(unet) if unet.config.class_embed_type is None else conditional_inputs(unet)
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


def inherit(student, teacher, schedule, **options):
    return inherit_weights(student, teacher, batches=batches_of(teacher), schedule=schedule, **options)


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
    source = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, source[name]), name
    assert torch.equal(predict(student), predict(teacher))


@pytest.mark.parametrize("family", WITH_FREQUENCIES)
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
    more_heads = {  # instead of larger ones: the channels of a head, or 1
        name: module.to_q.out_features // module.heads if teacher.get_submodule(name).heads > module.heads else 1
        for name, module in small.named_modules()
        if hasattr(module, "to_q")
    }
    target = teacher.state_dict()
    with torch.no_grad():
        for name, source in small.state_dict().items():
            attention = next((key for key in more_heads if name.startswith((key + ".to_", key + ".add_"))), None)
            unit = more_heads.get(attention, 1)
            larger_heads = attention and teacher.get_submodule(attention).heads == small.get_submodule(attention).heads
            value = source.clone()
            for axis in range(min(2, value.ndim)):
                if target[name].shape[axis] == value.shape[axis]:
                    continue
                table = name.startswith(("class_embedding.weight", "time_proj"))
                reads = axis == 1 and not table
                is_head = attention and (axis == 0) != (".to_out." in name)
                whole = value.unflatten(axis, (-1, unit if is_head else 1))
                dead = reads or (larger_heads and (".to_k." in name or ".add_k_" in name))
                value = torch.stack([whole, torch.zeros_like(whole) if dead else whole], axis + 1).flatten(
                    axis, axis + 2
                )
            if ".to_q." in name and larger_heads:
                value = value * 2**0.5  # logits are divided by the root of a head's channels
            target[name].copy_(value)
    torch.testing.assert_close(predict(teacher), predict(small), rtol=1e-4, atol=1e-5)
    return teacher, small


@pytest.mark.parametrize(
    ("family", "choice", "rescaling"),
    [(family, "activation", "none") for family in WITH_FREQUENCIES]
    + [(family, "magnitude", "none") for family in ("attention", "cross attention", "class concatenated")]
    + [(family, "activation", "least_squares") for family in ("attention", "cross attention")],
)
def test_dead_channels_are_the_ones_dropped(family, choice, rescaling, schedule):
    teacher, small = with_dead_channels(family)
    student = build_student(teacher, Reduction(width=0.5))
    assert dict(student.config)["block_out_channels"] == dict(small.config)["block_out_channels"]
    report = inherit(student, teacher, schedule, channels=choice, rescaling=rescaling)
    assert not report.random
    torch.testing.assert_close(predict(student), predict(teacher), rtol=1e-3, atol=1e-4)
    if rescaling == "none":
        expected = small.state_dict()
        for name, value in student.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)


# ---- depth


def stable_diffusion(**config):
    """Stable Diffusion's blocks at a tenth of their widths."""
    kinds = {
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "attention_head_dim": 8,
    }
    return shaken(tiny_condition_unet((32, 64, 128, 128), layers_per_block=2, **{**kinds, **config}))


OUTSIDE = {name: name for name in ("conv_in", "time_embedding", "conv_norm_out", "conv_out")}


def pair(student, teacher):
    """A layer with its attention."""
    return {
        f"{student[0]}.{kind}.{student[1]}": f"{teacher[0]}.{kind}.{teacher[1]}" for kind in ("resnets", "attentions")
    }


def same_down(stages):
    layers = {}
    for stage in range(stages):
        layers |= pair((f"down_blocks.{stage}", 0), (f"down_blocks.{stage}", 0))
        layers |= {f"down_blocks.{stage}.downsamplers": f"down_blocks.{stage}.downsamplers"}
    return layers


def up(student, teacher):
    """The first and the third of three."""
    blocks = f"up_blocks.{student}", f"up_blocks.{teacher}"
    layers = pair((blocks[0], 0), (blocks[1], 0)) | pair((blocks[0], 1), (blocks[1], 2))
    return layers | {f"{blocks[0]}.upsamplers": f"{blocks[1]}.upsamplers"}


PUBLISHED = {
    "bk-base": OUTSIDE | same_down(4) | {"mid_block": "mid_block"} | up(0, 0) | up(1, 1) | up(2, 2) | up(3, 3),
    "bk-small": OUTSIDE | same_down(4) | up(0, 0) | up(1, 1) | up(2, 2) | up(3, 3),
    "bk-tiny": OUTSIDE | same_down(3) | up(0, 1) | up(1, 2) | up(2, 3),
}
"""Student -> the teacher's, by hand: first pair of each down block, first and third of each up block."""


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in PUBLISHED),
        ("bk-tiny", {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}),
    ],
)
def test_published_students_copy_the_named_blocks(name, config):
    teacher = stable_diffusion(**config)
    student = build_student(teacher, REDUCTIONS[name])
    report = inherit_weights(student, teacher)
    assert not report.sliced
    assert not report.random
    source = teacher.state_dict()
    for key, value in student.state_dict().items():
        prefix = next(prefix for prefix in PUBLISHED[name] if key.startswith(prefix + "."))
        assert torch.equal(value, source[PUBLISHED[name][prefix] + key.removeprefix(prefix)]), key


@pytest.mark.parametrize(
    ("counts", "decoder", "expected"),
    [
        ((1, 2), False, (0,)),
        ((2, 3), True, (0, 2)),
        ((2, 4), True, (0, 3)),
        ((3, 3), True, (0, 1, 2)),
        ((3, 2), False, (0, 1, None)),
        ((4, 3), True, (0, 1, None, 2)),
    ],
)
def test_layers_that_are_kept(counts, decoder, expected):
    assert default_layers(*counts, decoder=decoder) == expected


@pytest.mark.parametrize(
    ("channels", "reduction", "expected"),
    [
        ((8, 16, 24), Reduction(drop_stages=(-1,)), (0, 1)),
        ((8, 16, 24), Reduction(drop_stages=(0,)), (1, 2)),
        ((8, 16, 24), Reduction(drop_stages=(1,), width=0.5), (0, 2)),
        ((8, 16, 16), Reduction(drop_stages=(1,)), (0, 1)),  # cannot be told apart: the higher resolution
        ((8, 16, 16), Reduction(), (0, 1, 2)),
    ],
)
def test_stages_are_found(channels, reduction, expected):
    teacher = tiny_unet(channels)
    assert match_stages(build_student(teacher, reduction), teacher) == expected


def test_stages_are_told_apart_by_their_blocks():
    teacher = stable_diffusion()
    assert match_stages(build_student(teacher, Reduction(drop_stages=(2,))), teacher) == (0, 1, 3)
    assert match_stages(build_student(teacher, Reduction(drop_stages=(3,))), teacher) == (0, 1, 2)


def test_all_choices_of_layers_that_fit():
    """By hand: those whose input channels are the student's.

    Inputs of the down blocks' layers: 32 32, 32 64, 64 128, 128 128; the student's, the first of each. Of the up
    blocks', hidden and skip: 256 256 256, 256 256 192, 192 128 96, 96 64 64; the student's, the first and the last.
    """
    teacher = stable_diffusion()
    student = build_student(teacher, REDUCTIONS["bk-base"])
    choices = layer_choices(student, teacher)
    by_block = {name: {choice[name] for choice in choices} for name in choices[0]}
    assert len(choices) == 2 * 1 * 1 * 2 * 3 * 2 * 1 * 2
    assert by_block["down_blocks.0"] == by_block["down_blocks.3"] == {(0,), (1,)}
    assert by_block["down_blocks.1"] == by_block["down_blocks.2"] == {(0,)}
    assert by_block["up_blocks.0"] == {(0, 1), (0, 2), (1, 2)}
    assert by_block["up_blocks.1"] == {(0, 2), (1, 2)}
    assert by_block["up_blocks.2"] == {(0, 2)}
    assert by_block["up_blocks.3"] == {(0, 1), (0, 2)}
    assert choices[0] == {f"down_blocks.{i}": (0,) for i in range(4)} | {f"up_blocks.{i}": (0, 2) for i in range(4)}


def test_choices_of_layers_are_measured(schedule):
    teacher = unconditional(layers_per_block=2)
    student = build_student(teacher, Reduction(layers_per_block=1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    results = compare_layer_choices(student, teacher, batches_of(teacher), schedule)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    errors = [error for error, _ in results]
    assert errors == sorted(errors)
    assert len(errors) == len(layer_choices(student, teacher)) > 1
    error, layers = results[-1]
    inherit_weights(student, teacher, layers=layers)
    assert step0_error(student, teacher, batches_of(teacher), schedule) == pytest.approx(error)
    name, chosen = next(iter(layers.items()))
    source = teacher.get_submodule(name).resnets[chosen[0]]
    assert torch.equal(student.get_submodule(name).resnets[0].conv1.weight, source.conv1.weight)


def test_the_best_layers_are_never_worse_than_the_default(schedule):
    teacher = unconditional(layers_per_block=2, channels=(8, 8), attention=False, **PLAIN)
    student = build_student(teacher, Reduction(layers_per_block=1))
    batches = batches_of(teacher)
    results = compare_layer_choices(student, teacher, batches, schedule)
    errors = {str(sorted(layers.items())): error for error, layers in results}
    found = best_layers(student, teacher, batches, schedule)
    best, default = (errors[str(sorted(layers.items()))] for layers in (found, layer_choices(student, teacher)[0]))
    assert best < default
    assert best <= sorted(errors.values())[len(errors) // 4]  # a search by block need not end at the very best
    assert best_layers(build_student(teacher), teacher, batches, schedule) == {}


REDUCED = [
    Reduction(width=0.5, layers_per_block=1),
    Reduction(width=0.5, drop_mid_block=True),
    Reduction(drop_stages=(-1,)),
    Reduction(drop_stages=(0,)),
    Reduction(drop_stages=(1,), width=0.5),
    Reduction(layers_per_block=3),
    Reduction(drop_attention=(0,), width=0.5),
]


@pytest.mark.parametrize(
    ("family", "reduction"),
    [("attention", reduction) for reduction in REDUCED]
    + [("cross attention", REDUCED[0]), pytest.param("cross attention", REDUCED[1], marks=pytest.mark.slow)],
    ids=str,
)
def test_any_reduction_inherits_and_fitting_helps(family, reduction, schedule):
    widths = {"channels": (8, 16, 16), "layers_per_block": 2}
    if family == "attention":
        blocks = {"down_block_types": ("AttnDownBlock2D", *["DownBlock2D"] * 2)}
        blocks |= {"up_block_types": (*["UpBlock2D"] * 2, "AttnUpBlock2D"), "attention": False}
        teacher = unconditional(**widths, **blocks)
    else:
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
        teacher = conditional(**widths, **blocks)
    errors = {}
    for rescaling in ("none", "least_squares"):
        torch.manual_seed(1)
        student = build_student(teacher, reduction)
        report = inherit(student, teacher, schedule, rescaling=rescaling)
        assert report.copied or report.sliced
        assert all(parameter.isfinite().all() for parameter in student.parameters())
        errors[rescaling] = step0_error(student, teacher, batches_of(teacher), schedule)
        assert bool(report.fitted) == (rescaling == "least_squares")
        assert not report.copied.keys() & report.fitted.keys()
    assert errors["least_squares"] < errors["none"]
    assert errors["least_squares"] < 0.9


def test_added_layers_do_nothing_at_first():
    teacher = unconditional(layers_per_block=1, down_block_types=("DownBlock2D",) * 2)
    student = build_student(teacher, Reduction(layers_per_block=2))
    report = inherit_weights(student, teacher)
    added = student.down_blocks[0].resnets[1]
    sample = torch.randn(2, added.in_channels, 4, 4)
    assert torch.equal(added(sample, torch.randn(2, 32)), sample)
    assert "down_blocks.0.resnets.1.conv1" in report.random


# ---- channels


def test_channels_are_kept_equally_between_the_edges_of_groups():
    stream = Stream(12, 6, edges={0, 4, 8})
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4, 0, 0, 0.5, 0.4])
    assert keep_highest(stream, scores).tolist() == [0, 1, 6, 7, 10, 11]


def test_whole_heads_are_kept_and_queries_follow_values():
    values = Stream(12, 6, heads=(2, 4))
    values.kept = keep_highest(values, torch.tensor([0.0, 0, 0, 5, 5, 5, 1, 1, 1, 2, 2, 2]))
    assert values.kept.tolist() == [3, 4, 5, 9, 10, 11]
    logits = Stream(12, 6, heads=(2, 4), same_heads=values)
    assert keep_highest(logits, -torch.arange(12.0)).tolist() == [3, 4, 5, 9, 10, 11]
    fewer_each = Stream(12, 8, heads=(4, 4))
    assert keep_highest(fewer_each, torch.arange(12.0)).tolist() == [1, 2, 4, 5, 7, 8, 10, 11]


def test_queries_are_read_by_the_keys_of_their_own_head(schedule):
    teacher = conditional(2)
    links = link_layers(build_student(teacher, Reduction(width=0.5)), teacher)
    readings = read_channels(links, teacher, batches_of(teacher), schedule)
    streams = {link.writes[0] for link in links if link.is_logit}
    assert streams
    for stream in streams:
        head = torch.arange(stream.teacher) * stream.heads[1] // stream.teacher
        others = head[:, None] != head
        for reading in readings[stream]:
            assert others.any()
            assert not reading.gram[others].any()
            assert not reading.covariance[others].any()


@pytest.mark.parametrize("seed", range(3))
def test_channels_that_restore_best_against_numpy(seed):
    """One channel at a time: that from which, with those before it, regression restores the readers' outputs best."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(400, 7)) @ generator.normal(size=(7, 7))
    rows -= rows.mean(0)
    readers = [rows, np.maximum(rows, 0) - np.maximum(rows, 0).mean(0)]
    weights = [generator.normal(size=(7, 3)), generator.normal(size=(7, 5))]

    def error(kept):
        total = 0.0
        for inputs, weight in zip(readers, weights, strict=True):
            restored = inputs[:, kept] @ np.linalg.lstsq(inputs[:, kept], inputs, rcond=None)[0]
            total += (((inputs - restored) @ weight) ** 2).sum() / ((inputs @ weight) ** 2).sum()
        return total

    expected = []
    for _ in range(3):
        expected.append(min(set(range(7)) - set(expected), key=lambda channel: error([*expected, channel])))
    readings = [
        Reading(torch.zeros(7).double(), torch.from_numpy(inputs.T @ inputs / 400), torch.from_numpy(weight @ weight.T))
        for inputs, weight in zip(readers, weights, strict=True)
    ]
    assert keep_restorable(Stream(7, 3), readings).tolist() == sorted(expected)


@pytest.mark.parametrize("channels", CHOICES)
def test_choices_are_the_same_every_time_and_random_ones_follow_the_seed(channels, schedule):
    teacher = unconditional(2)
    students = [build_student(teacher, Reduction(width=0.5)) for _ in range(3)]
    for student, seed in zip(students, (0, 0, 1), strict=True):
        inherit(student, teacher, schedule, channels=channels, seed=seed)
    first, again, other = (predict(student) for student in students)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (channels != "random")


def test_first_channels_by_hand():
    """The first of each group: 4 groups of 4 channels, two of each; the skips' and the samples' as they are."""
    teacher = tiny_unet((16, 32), layers_per_block=1)
    student = build_student(teacher, Reduction(width=0.5))
    inherit_weights(student, teacher, channels="first", rescaling="none")
    kept = [0, 1, 4, 5, 8, 9, 12, 13]
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight[kept])
    assert torch.equal(student.conv_in.bias, teacher.conv_in.bias[kept])
    norm = teacher.down_blocks[0].resnets[0].norm1.weight
    assert torch.equal(student.down_blocks[0].resnets[0].norm1.weight, norm[kept])


def test_fan_in():
    teacher = tiny_unet((16, 32), layers_per_block=1)
    students = [build_student(teacher, Reduction(width=0.5)) for _ in range(2)]
    for student, rescaling in zip(students, ("none", "fan_in"), strict=True):
        inherit_weights(student, teacher, channels="first", rescaling=rescaling)
    plain, scaled = (student.state_dict() for student in students)
    for name, factor in (("conv_in.weight", 1), ("conv_out.weight", 2**0.5), ("conv_out.bias", 1)):
        torch.testing.assert_close(scaled[name], plain[name] * factor)


# ---- fitting


@pytest.mark.parametrize("layer", ["down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"])
def test_a_fitted_layer_against_numpy(layer, schedule, monkeypatch):
    """With next to no ridge: the regression of the teacher's output on what the fitted student hands the layer."""
    teacher = shaken(tiny_unet((16, 32)))
    student = build_student(teacher, Reduction(width=0.5))
    links = link_layers(student, teacher)
    choose_channels(links, "first")
    link = next(link for link in links if link.student is student.get_submodule(layer))
    batches = [make_batch(96, seed=seed) for seed in range(2)]
    monkeypatch.setattr(restore, "RIDGE", 1e-9)
    fit_layers(links, student, teacher, batches, schedule)
    read, wanted = [], []
    student.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    teacher.get_submodule(layer).register_forward_hook(lambda _, __, output: wanted.append(output))
    step0_error(student, teacher, batches, schedule)
    module = student.get_submodule(layer)
    rows = torch.cat(read)
    if layer.endswith("conv1"):
        rows = torch.nn.functional.unfold(rows, 3, padding=1).transpose(1, 2).flatten(0, 1)
        targets = torch.cat(wanted).flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        targets = torch.cat(wanted)
    rows = np.concatenate([rows.detach().numpy(), np.ones((len(rows), 1))], 1).astype(np.float64)
    targets = targets.detach().numpy()[:, link.writes[0].kept].astype(np.float64)
    best = np.square(rows @ np.linalg.lstsq(rows, targets, rcond=None)[0] - targets).mean()
    found = torch.cat([module.weight.flatten(1), module.bias[:, None]], 1).detach().numpy().astype(np.float64)
    assert np.square(rows @ found.T - targets).mean() == pytest.approx(best, rel=1e-3)
    assert best > 1e-8


def test_the_teacher_is_left_alone_and_shares_nothing(schedule):
    teacher = unconditional(2).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = build_student(teacher, Reduction(width=0.5))
    inherit(student, teacher, schedule)
    assert teacher.training
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in (*teacher.modules(), *student.modules())
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_report_can_be_read():
    teacher = stable_diffusion()
    text = str(inherit_weights(build_student(teacher, REDUCTIONS["bk-tiny"]), teacher))
    assert "0 left random" in text
    assert "up_blocks.0.resnets.1 <- up_blocks.1.resnets.2" in text
    assert "down_blocks.0.resnets.0" not in text


# ---- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": "best"}, "unknown choice of channels 'best'.*activation"),
        ({"rescaling": "some"}, "unknown rescaling 'some'.*least_squares"),
        ({}, "need batches"),
        ({"channels": "first", "rescaling": "least_squares"}, "need batches"),
        ({"channels": "first", "layers": {"middle": (0,)}}, "'middle', which is no block"),
        ({"channels": "first", "layers": {"up_blocks.0": (0, 7)}}, "up_blocks.0 must name 2 of the teacher's 0 to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(options, words):
    teacher = tiny_unet((16, 32))
    with pytest.raises(ValueError, match=words):
        inherit_weights(build_student(teacher, Reduction(width=0.5)), teacher, **options)


def test_a_student_of_more_stages_and_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="3 stages cannot inherit from a teacher of 2"):
        inherit_weights(tiny_unet((8, 16, 16)), tiny_unet((8, 16)))
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    teacher = UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, add_attention=False, **blocks)
    with pytest.raises(ValueError, match="SkipDownBlock2D cannot be inherited"):
        inherit_weights(build_student(teacher), teacher)


def test_nothing_to_compare(schedule):
    with pytest.raises(ValueError, match="nothing to compare"):
        step0_error(tiny_unet(), tiny_unet(), [], schedule)
