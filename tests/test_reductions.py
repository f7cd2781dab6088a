"""Students of any diffusers UNet: built, run, saved, reloaded, paired and trained; and what is refused."""

import json

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from tests.conftest import tiny_condition_unet, tiny_unet
from tests.transformers import tiny_dit
from vkd_gen import (
    REDUCTIONS,
    FeatureNormalizer,
    FrozenTeacher,
    LossWeights,
    OrthogonalProjector,
    ProjectedStudent,
    Reduction,
    build_student,
    distillation_losses,
    pair_layers,
    reduce_config,
)
from vkd_gen.evaluation.cost import count_parameters
from vkd_gen.families import TEACHERS as KNOWN
from vkd_gen.families import kept_stages
from vkd_gen.families.unet import example
from vkd_gen.features import split_pooling
from vkd_gen.pipelines import stock_pipeline
from vkd_gen.schedule import Schedule

CHANNELS = (8, 16, 16)
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TEACHERS = {
    "plain": lambda: tiny_unet(CHANNELS),
    "attention": lambda: tiny_unet(CHANNELS, attention=True),
    "classes": lambda: tiny_unet(CHANNELS, attention=True, num_class_embeds=11),
    "ddpm": lambda: tiny_unet(  # google/ddpm-cifar10-32 in small
        CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
    "Stable Diffusion 1": lambda: tiny_condition_unet(CHANNELS, **CROSS),
    "Stable Diffusion 2": lambda: tiny_condition_unet(
        CHANNELS, **CROSS, attention_head_dim=(1, 2, 2), use_linear_projection=True
    ),
    "Stable Diffusion XL": lambda: tiny_condition_unet(
        CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ),
}
REDUCED = {
    "half": Reduction(width=0.5),
    "wider": Reduction(width=2.0),
    "no middle, no lowest stage": REDUCTIONS["bk-tiny"],
    "no highest stage, half": Reduction(drop_stages=(0,), width=0.5),
    "one stage, deeper": Reduction(drop_stages=(1, 2), layers_per_block=2),
    "less attention": Reduction(drop_attention=(1,), width=0.75),
}
REFUSED = {("plain", "less attention"): "DownBlock2D .* has no attention to drop"}
BY_STAGE = {
    "layers by stage": Reduction(layers_per_block=(2, 1, 1)),
    "fewer transformers": Reduction(transformer_layers=1, width=0.5),
    "transformers by stage, no second": Reduction(transformer_layers=(2, 1), drop_stages=(1,)),
}
"""What `UNet2DConditionModel` alone can express."""

BY_DEFAULT = [*zip(TEACHERS, [*REDUCED, "half"], strict=True), *REFUSED, ("plain", "layers by stage")]
BY_DEFAULT += [("Stable Diffusion XL", name) for name in BY_STAGE]
"""Every teacher and every reduction once."""
CASES = [(family, name) for family in TEACHERS for name in REDUCED]
CASES += [(family, name) for family in ("plain", "Stable Diffusion XL") for name in BY_STAGE]
CASES = [case if case in BY_DEFAULT else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


def batch_for(unet, batch_size=2):
    """A batch for `distillation_losses` with what the UNet is conditioned on."""
    inputs = example(unet)
    shape = (batch_size, *inputs.pop("sample").shape[1:])
    del inputs["timestep"]

    def filled(value):
        if isinstance(value, dict):
            return {name: filled(entry) for name, entry in value.items()}
        shape = (batch_size, *value.shape[1:])
        return torch.randn(shape) if value.is_floating_point() else torch.randint(0, 10, shape)

    return {
        "sample": torch.rand(shape) * 2 - 1,
        "noise": torch.randn(shape),
        "timesteps": torch.randint(0, 1000, (batch_size,)),
        "conditioning": filled(inputs),
    }


def project(student, teacher, pairs):
    """The student with a solved projector for each pair, and its frozen teacher."""
    projected = ProjectedStudent(
        student,
        pairs,
        [OrthogonalProjector(pair.student_channels, pair.teacher_channels) for pair in pairs],
        [FeatureNormalizer("none", channels=pair.teacher_channels) for pair in pairs],
    )
    return projected, FrozenTeacher(teacher, [pair.teacher for pair in pairs])


def check_runs_saves_and_reloads(student, batch, folder):
    def predict(unet):
        return unet(batch["sample"], batch["timesteps"], **batch["conditioning"]).sample

    prediction = predict(student)
    assert prediction.shape == batch["sample"].shape
    prediction.square().mean().backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
    student.zero_grad()
    if isinstance(student, UNet2DModel):
        stock_pipeline(student, DDPMScheduler()).save_pretrained(folder)
        again = DDIMPipeline.from_pretrained(folder).unet
    else:  # as a StableDiffusionPipeline has it
        student.save_pretrained(folder / "unet")
        again = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    configs = [json.loads(unet.to_json_string()) for unet in (again, student)]  # where lists and tuples are one
    assert {**configs[0], "_name_or_path": None} == {**configs[1], "_name_or_path": None}
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    torch.testing.assert_close(predict(again), prediction, rtol=1e-4, atol=1e-5)


def expected_pairs(student, teacher):
    """By counting: stage i of both works at size / 2^i, and the decoder runs backwards."""
    numbers = [len(unet.config.block_out_channels) for unet in (student, teacher)]
    shared = range(min(numbers))
    pairs = [(f"down_blocks.{stage}",) * 2 for stage in shared]
    pairs += [("mid_block",) * 2] if student.mid_block is not None and teacher.mid_block is not None else []
    return pairs + [tuple(f"up_blocks.{number - 1 - stage}" for number in numbers) for stage in reversed(shared)]


def check_every_pair_learns(projected, teacher, batch, pairs):
    losses = distillation_losses(
        projected,
        batch,
        schedule=Schedule.of(DDPMScheduler()),
        teacher=teacher,
        weights=LossWeights(denoising=0, output=0),
    )
    for pair in pairs:
        losses[f"feature/{pair.student}"].backward(retain_graph=True)
        layer = projected.student.get_submodule(split_pooling(pair.student)[0])
        gradients = [parameter.grad for parameter in layer.parameters()]
        assert all(gradient is not None for gradient in gradients), pair
        assert any(gradient.count_nonzero() for gradient in gradients), pair
        projected.zero_grad()


def check_trains(projected, teacher, batch):
    before = {name: value.clone() for name, value in projected.student.state_dict().items()}
    optimizer = torch.optim.AdamW(projected.parameters(), lr=1e-3)
    for step in (1, 2):
        losses = distillation_losses(projected, batch, schedule=Schedule.of(DDPMScheduler()), teacher=teacher)
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        projected.after_step(step)
        assert all(value.isfinite() for value in losses.values())
    after = projected.student.state_dict()
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_student_from_its_configuration_to_training(family, name, tmp_path):
    teacher, reduction = TEACHERS[family](), {**REDUCED, **BY_STAGE}[name]
    refused = REFUSED.get((family, name))
    if name in BY_STAGE and isinstance(teacher, UNet2DModel):
        refused = "only UNet2DConditionModel"
    if refused:
        with pytest.raises(ValueError, match=refused):
            build_student(teacher, reduction)
        return
    student = build_student(teacher, reduction)
    batch = batch_for(student)
    check_runs_saves_and_reloads(student, batch, tmp_path)
    pairs = pair_layers(student, teacher)
    assert [tuple(split_pooling(layer)[0] for layer in (pair.student, pair.teacher)) for pair in pairs] == (
        expected_pairs(student, teacher)
    )
    assert all(pair.student_shape[1:] == pair.teacher_shape[1:] for pair in pairs)
    projected, frozen = project(student, teacher, pairs)
    check_every_pair_learns(projected, frozen, batch, pairs)
    check_trains(projected, frozen, batch)


# ---- what the configuration becomes


def test_a_configuration_is_enough():
    """As a config.json has it, with lists, and without what is left at its default."""
    config = {
        name: list(value) if isinstance(value, tuple) else value for name, value in KNOWN["ddpm-cifar10-32"].items()
    }
    with torch.device("meta"):
        student = build_student(config, REDUCTIONS["bk-tiny"])
        teacher = build_student(config)
    assert type(student) is UNet2DModel
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    assert count_parameters(teacher) == 35_746_307
    assert [len(block.resnets) for block in student.down_blocks] == [1, 1, 1]
    assert student.config == build_student(teacher, REDUCTIONS["bk-tiny"]).config


def test_the_class_is_known_without_its_name():
    assert isinstance(build_student(dict(tiny_condition_unet().config)), UNet2DConditionModel)
    assert isinstance(build_student(dict(tiny_unet().config)), UNet2DModel)
    assert isinstance(build_student(dict(tiny_dit().config)), DiTTransformer2DModel)
    with pytest.raises(ValueError, match=r"is of PixArtTransformer2DModel; known are UNet2DModel"):
        build_student({"_class_name": "PixArtTransformer2DModel"})


@pytest.mark.parametrize("family", TEACHERS)
def test_nothing_reduced_is_the_teacher(family):
    teacher = TEACHERS[family]()
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    assert reduce_config(teacher.config, Reduction()) == config


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("family", ["ddpm", "Stable Diffusion XL"])
def test_a_kept_stage_has_the_teachers_blocks(family, dropped):
    teacher = TEACHERS[family]()
    reduction = Reduction(drop_stages=(dropped,))
    student = build_student(teacher, reduction)
    kept = kept_stages(3, reduction)
    for stage, origin in enumerate(kept):
        assert type(student.down_blocks[stage]) is type(teacher.down_blocks[origin])
        up = student.up_blocks[len(kept) - 1 - stage]
        assert type(up) is type(teacher.up_blocks[2 - origin])
        for attention, original in zip(
            getattr(up, "attentions", []), getattr(teacher.up_blocks[2 - origin], "attentions", []), strict=True
        ):
            assert len(getattr(attention, "transformer_blocks", [])) == len(getattr(original, "transformer_blocks", []))


def test_attention_is_dropped_where_it_is_named():
    teacher = tiny_unet((8, 16, 16), attention=True)
    student = build_student(teacher, Reduction(drop_attention=(0,)))
    assert tuple(student.config.down_block_types) == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    assert tuple(student.config.up_block_types) == ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert 0 < count_parameters(student) < count_parameters(teacher)


def test_heads_keep_their_channels_where_every_stage_has_its_own_number():
    config = reduce_config(KNOWN["stable-diffusion-2"], Reduction(width=0.5))
    assert config["block_out_channels"] == (192, 320, 640, 640)  # 160 rounded up to heads of 64 channels
    assert config["attention_head_dim"] == (3, 5, 10, 10)
    config = reduce_config(KNOWN["stable-diffusion-1"], Reduction(width=0.5))
    assert config["block_out_channels"] == (160, 320, 640, 640)
    assert config["attention_head_dim"] == 8


@pytest.mark.parametrize("width", [0.01, 0.37, 1.3])
@pytest.mark.parametrize("family", TEACHERS)
def test_channels_fit_groups_heads_and_timestep(family, width):
    teacher = TEACHERS[family]()
    config = reduce_config(teacher.config, Reduction(width=width))
    for channels, full in zip(config["block_out_channels"], CHANNELS, strict=True):
        assert channels % config["norm_num_groups"] == 0
        assert channels >= full * width
        assert width > 1 or channels <= full
    assert config["block_out_channels"][0] // 2 > config["freq_shift"]
    heads = config["attention_head_dim"]
    if isinstance(heads, tuple):
        assert all(channels == 8 * count for channels, count in zip(config["block_out_channels"], heads, strict=True))
    elif heads:
        assert all(channels % heads == 0 for channels in config["block_out_channels"])


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_a_narrow_first_stage_still_tells_timesteps_apart(freq_shift):
    teacher = tiny_unet((16, 16), freq_shift=freq_shift)
    teacher.register_to_config(norm_num_groups=1, attention_head_dim=1)
    student = build_student(teacher, width=0.05)
    assert student.config.block_out_channels[0] == 2 * (freq_shift + 1)
    codes = student.time_proj(torch.tensor([1, 500]))
    assert codes.isfinite().all()
    assert not torch.equal(codes[0], codes[1])


def test_the_middles_attention_has_groups_of_its_own():
    teacher = tiny_unet((12, 24), attention=True, attn_norm_num_groups=6)
    student = build_student(teacher, width=0.4)
    assert student.config.block_out_channels == (8, 12)  # 9.6 of 24, rounded up to groups of 4 and of 6
    student(torch.zeros(1, 1, 8, 8), 0)


def test_layers_for_each_stage():
    student = build_student(tiny_condition_unet(), Reduction(layers_per_block=(2, 1)))
    assert [len(block.resnets) for block in student.down_blocks] == [2, 1]
    with pytest.raises(ValueError, match="UNet2DModel takes one layers_per_block"):
        build_student(tiny_unet(), Reduction(layers_per_block=(2, 1)))


def own_transformer_layers(**config):
    """As SSD-1B has it: a number of transformer layers for each attention layer."""
    return tiny_condition_unet(
        layers_per_block=2,
        transformer_layers_per_block=[[2, 1], 1],
        reverse_transformer_layers_per_block=[1, [1, 1, 2]],
        **config,
    )


def test_transformer_layers_of_each_layers_own_are_made_even():
    student = build_student(own_transformer_layers(), Reduction(layers_per_block=1, transformer_layers=(2, 1)))
    assert [len(attention.transformer_blocks) for attention in student.up_blocks[1].attentions] == [2, 2]
    assert [len(attention.transformer_blocks) for attention in student.down_blocks[0].attentions] == [2]


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        (Reduction(width=0), "width must be above 0"),
        (Reduction(width=float("nan")), "width must be above 0"),
        (Reduction(width=1e308), "width must be above 0 and finite"),  # as no number of channels is
        (Reduction(layers_per_block=0), "layers_per_block must be at least 1"),
        (Reduction(layers_per_block=(1, 1, 1)), "layers_per_block names 3 stages; the student has 2"),
        (Reduction(transformer_layers=0), "transformer_layers must be at least 1"),
        (Reduction(transformer_layers=(1, 0)), "transformer_layers must be at least 1"),
        (
            Reduction(transformer_layers=(1, 1), drop_stages=(0,)),
            "transformer_layers names 2 stages; the student has 1",
        ),
        (Reduction(drop_stages=(2,)), "there is no stage 2.*0 to 1"),
        (Reduction(drop_stages=(0, 1)), "at least one stage"),
        (Reduction(drop_attention=(1,)), "has no attention to drop"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(reduction, words):
    with pytest.raises(ValueError, match=words):
        build_student(tiny_condition_unet(), reduction)


@pytest.mark.parametrize(
    ("teacher", "reduction", "words"),
    [
        (tiny_unet, Reduction(transformer_layers=1), "UNet2DModel has no transformer layers"),
        (own_transformer_layers, Reduction(layers_per_block=1), "set transformer_layers too"),
        (own_transformer_layers, Reduction(drop_stages=(-1,)), "only be dropped with transformer_layers"),
    ],
)
def test_what_a_teacher_does_not_allow_is_refused_in_words(teacher, reduction, words):
    with pytest.raises(ValueError, match=words):
        build_student(teacher(), reduction)


def test_attention_that_cannot_be_had_without():
    config = {**tiny_condition_unet().config, "down_block_types": ("KCrossAttnDownBlock2D", "DownBlock2D")}
    with pytest.raises(
        ValueError, match=r"KCrossAttnDownBlock2D \(position 0 of down_block_types\) cannot be had without"
    ):
        reduce_config(config, Reduction(drop_attention=(0,)))


def test_a_reduction_or_its_parts():
    with pytest.raises(ValueError, match="not by both"):
        build_student(tiny_unet(), Reduction(width=0.5), width=0.5)
