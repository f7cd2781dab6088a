"""Which student layer learns from which teacher layer."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from jaxtyping import TypeCheckError

import vkd_gen as vkd
from tests.conftest import make_batch, tiny_condition_unet, tiny_unet
from vkd_gen import REDUCTIONS, LayerPair, Reduction, build_student, pair_layers
from vkd_gen.families import family_of, feature_shapes
from vkd_gen.pairing import pair_table

REFUSED = (ValueError, TypeCheckError)  # the second one where the tests run with shapes and types checked


@pytest.fixture(scope="module")
def attentive():
    """Student and teacher, both with attention everywhere; never changed."""
    return tiny_unet((8, 16), attention=True), tiny_unet((16, 32), attention=True)


def names(pairs):
    return [(pair.student, pair.teacher) for pair in pairs]


def stage_layers(unet):
    return [stage.layer for stage in family_of(unet).stages(unet)]


def same(*layers):
    return [(layer, layer) for layer in layers]


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


@pytest.mark.parametrize(("width", "layers_per_block"), [(0.25, 1), (2.0, 2)])
def test_students_of_any_width_and_depth_pair_with_their_own_stages(width, layers_per_block):
    teacher = tiny_unet((8, 16, 16), layers_per_block=2)
    student = build_student(teacher, width=width, layers_per_block=layers_per_block)
    assert names(pair_layers(student, teacher)) == same(*stage_layers(teacher))


def test_fewer_stages_pair_where_they_work_at_the_same_resolution():
    """Three teacher stages work at 8x8, 4x4 and 2x2, two student stages at 8x8 and 4x4; the last of each ends there."""
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 16, 32)))
    assert pairs == [
        LayerPair("down_blocks.0", "down_blocks.0", (8, 4, 4), (16, 4, 4)),
        LayerPair("down_blocks.1/2", "down_blocks.1", (16, 2, 2), (16, 2, 2)),
        LayerPair("mid_block/2", "mid_block", (16, 2, 2), (32, 2, 2)),
        LayerPair("up_blocks.0", "up_blocks.1", (16, 8, 8), (16, 8, 8)),
        LayerPair("up_blocks.1", "up_blocks.2", (8, 8, 8), (16, 8, 8)),
    ]


def test_of_stages_at_one_resolution_the_last_ones_pair():
    """Maps of 2x2 shrink to 1x1 and stay there."""
    kinds = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    teacher = tiny_condition_unet((8, 8, 16), size=2, **kinds)
    student = build_student(teacher, Reduction(drop_stages=(1,)))
    assert names(pair_layers(student, teacher)) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.2"),
        ("mid_block", "mid_block"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
    ]


def test_more_stages_pool_the_teacher():
    pairs = pair_layers(tiny_unet((8, 16, 16)), tiny_unet((16, 32)))
    assert names(pairs) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1/2"),
        ("mid_block", "mid_block/2"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
    ]


def test_the_published_tiny_student_pairs_stage_by_stage():
    """BK-SDM, table of layers: down 0, 1 and 2 with 0, 1 and 2, up 0, 1 and 2 with 1, 2 and 3."""
    kinds = {
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    }
    teacher = tiny_condition_unet((8, 8, 16, 16), layers_per_block=2, **kinds)
    pairs = pair_layers(build_student(teacher, REDUCTIONS["bk-tiny"]), teacher)
    assert names(pairs) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2/2", "down_blocks.2"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
        ("up_blocks.2", "up_blocks.3"),
    ]


def four_stages(**changes):
    """As in Stable Diffusion, where the lowest stage has no attention."""
    kinds = {
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    }
    return tiny_condition_unet((8, 8, 16, 16), layers_per_block=2, **{**kinds, **changes})


EIGHT = same(*(f"{part}_blocks.{number}" for part in ("down", "up") for number in range(4)))
SIX = [
    *same("down_blocks.0", "down_blocks.1"),
    ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
    *[(f"up_blocks.{number}", f"up_blocks.{number + 1}") for number in range(3)],
]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("name", "published"), [("bk-base", EIGHT), ("bk-small", EIGHT), ("bk-tiny", SIX)])
def test_bk_pairs_what_the_authors_pair_and_the_loss_is_theirs(name, published, linear):
    """BK-SDM, src/kd_train_text_to_image.py: the mean square of each pair's difference, summed over the pairs."""
    teacher = four_stages(use_linear_projection=linear, attention_head_dim=(1, 2, 4, 4))
    student = build_student(teacher, REDUCTIONS[name])
    pairs = pair_layers(student, teacher, layers="bk")
    assert names(pairs) == published

    seen = {}
    for who, unet, side in (("student", student, 0), ("teacher", teacher, 1)):
        for pair in published:
            hook = lambda _module, _inputs, output, key=(who, pair[side]): seen.update({key: output})  # noqa: E731
            unet.get_submodule(pair[side]).register_forward_hook(hook)
    widths = [(pair.student_channels, pair.teacher_channels) for pair in pairs]
    projected = vkd.ProjectedStudent(
        student,
        pairs,
        [vkd.IdentityProjector(*width) for width in widths],
        [vkd.FeatureNormalizer("none", channels=width, num_timestep_bins=1) for _, width in widths],
    )
    frozen = vkd.FrozenTeacher(teacher, [pair.teacher for pair in pairs])
    batch = {**make_batch(channels=4), "conditioning": {"encoder_hidden_states": torch.randn(4, 5, 8)}}
    projected.calibrate(frozen, [batch], schedule := vkd.Schedule.of(DDPMScheduler()))
    losses = vkd.distillation_losses(projected, batch, schedule=schedule, teacher=frozen)

    values = {key: value[0] if isinstance(value, tuple) else value for key, value in seen.items()}
    theirs = [F.mse_loss(values["student", first], values["teacher", second]) for first, second in published]
    assert losses["feature"].item() == pytest.approx(sum(theirs).item(), rel=1e-6)
    assert len([name for name in losses if name.startswith("feature/")]) == len(published)


def test_bk_reads_a_layer_before_resampling_where_there_is_no_attention():
    teacher = tiny_unet((8, 8, 16), layers_per_block=2)
    student = build_student(teacher, Reduction(drop_stages=(2,), drop_mid_block=True, layers_per_block=1))
    assert names(pair_layers(student, teacher, layers="bk")) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1.resnets.0", "down_blocks.1.resnets.1"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
    ]


def test_without_a_middle_the_other_stages_pair():
    teacher = tiny_unet((8, 16))
    student = build_student(teacher, Reduction(drop_mid_block=True))
    assert names(pair_layers(student, teacher)) == same("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1")


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


# ---- self-attention


def deep_condition_unet(channels=(8, 16), depth=(3, 2), layers_per_block=2):
    return tiny_condition_unet(channels, layers_per_block=layers_per_block, transformer_layers_per_block=depth)


def test_self_attention_pairs_by_the_share_of_the_stage():
    teacher = deep_condition_unet()
    student = build_student(teacher, Reduction(width=0.5, layers_per_block=1, transformer_layers=(1, 2)))
    down, mid, up = "down_blocks.0.attentions", "mid_block.attentions.0", "up_blocks.1.attentions"
    # By hand: the encoder's stage has 1 of the student's and 6 of the teacher's, the middle 2 and 2, the decoder 2, 9.
    assert names(pair_layers(student, teacher, layers="self_attention")) == [
        (f"{down}.0.transformer_blocks.0.attn1", f"{down}.1.transformer_blocks.2.attn1"),
        (f"{mid}.transformer_blocks.0.attn1", f"{mid}.transformer_blocks.0.attn1"),
        (f"{mid}.transformer_blocks.1.attn1", f"{mid}.transformer_blocks.1.attn1"),
        (f"{up}.0.transformer_blocks.0.attn1", f"{up}.1.transformer_blocks.1.attn1"),
        (f"{up}.1.transformer_blocks.0.attn1", f"{up}.2.transformer_blocks.2.attn1"),
    ]


def test_self_attention_of_a_dropped_stages_middle_pools_tokens():
    teacher = tiny_condition_unet(
        (8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )
    student = build_student(teacher, Reduction(drop_stages=(-1,)))
    pairs = pair_layers(student, teacher, layers="self_attention")
    (middle,) = [pair for pair in pairs if pair.student.startswith("mid_block")]
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert middle == LayerPair(f"{layer}/2", layer, (4, 16), (4, 16))


def test_self_attention_of_unconditional_unets_and_where_it_is_dropped():
    teacher = tiny_unet((8, 16), attention=True)
    student = build_student(teacher, Reduction(drop_attention=(0,)))
    assert names(pair_layers(student, teacher, layers="self_attention")) == same(
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )


def test_cross_attention_is_no_self_attention():
    teacher = tiny_condition_unet(only_cross_attention=(True, False))
    found = {stage.layer: stage.self_attention for stage in family_of(teacher).stages(teacher)}
    assert found["down_blocks.0"] == ()
    assert found["mid_block"] == ("mid_block.attentions.0.transformer_blocks.0.attn1",)


# ---- named pairs


def test_named_pairs_are_kept_in_their_order():
    wanted = [("mid_block", "down_blocks.1"), ("conv_in", "conv_in")]
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=wanted)
    assert pairs == [
        LayerPair("mid_block", "down_blocks.1", (16, 4, 4), (32, 4, 4)),
        LayerPair("conv_in", "conv_in", (8, 8, 8), (16, 8, 8)),
    ]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("up_blocks.0", "mid_block"), LayerPair("up_blocks.0/2", "mid_block", (16, 4, 4), (32, 4, 4))),
        (("mid_block", "conv_in"), LayerPair("mid_block", "conv_in/2", (16, 4, 4), (16, 4, 4))),
        (("up_blocks.0/4", "mid_block/2"), LayerPair("up_blocks.0/4", "mid_block/2", (16, 2, 2), (32, 2, 2))),
        (("conv_in/2", "mid_block/4"), LayerPair("conv_in/8", "mid_block/4", (8, 1, 1), (32, 1, 1))),
        (
            ("down_blocks.0.attentions.0.to_q", "mid_block.attentions.0.to_q"),
            LayerPair("down_blocks.0.attentions.0.to_q/2", "mid_block.attentions.0.to_q", (16, 8), (16, 32)),
        ),
    ],
)
def test_the_finer_of_a_named_pair_is_pooled(pair, expected, attentive):
    student, teacher = attentive
    (made,) = pair_layers(student, teacher, pairs=[pair])
    assert made == expected
    assert feature_shapes(student, [made.student]) == {made.student: made.student_shape}
    assert feature_shapes(teacher, [made.teacher]) == {made.teacher: made.teacher_shape}


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": [("mid_blok", "mid_block")]}, r"no layer 'mid_blok'.*'mid_block'"),
        ({"pairs": [("mid_block", "mid_blok")]}, r"no layer 'mid_blok'.*'mid_block'"),
        ({"pairs": [("mid_block", "mid_block"), ("mid_block", "down_blocks.1")]}, "paired twice"),
        ({"pairs": [("mid_block", "conv_in/x")]}, r"cannot be pooled by.*as in conv_in/2"),
        ({"pairs": [("mid_block/1", "mid_block")]}, r"cannot be pooled by.*as in mid_block/2"),
        ({"pairs": [("mid_block/2/2", "mid_block")]}, r"cannot be pooled by.*as in mid_block/2"),
        ({"pairs": [("mid_block/3", "mid_block")]}, r"\[1, 16, 4, 4\] cannot be averaged over squares of 3 x 3"),
        (
            {"pairs": [("mid_block", "mid_block.attentions.0.to_q")]},
            r"mid_block \(16, 4, 4\).*to_q \(16, 32\) differ in kind: maps",
        ),
        (
            {"pairs": [("mid_block", "time_embedding")]},
            r"mid_block \(16, 4, 4\).*time_embedding \(64,\) differ in kind",
        ),
        ({"pairs": []}, "no layer pairs are given"),
        ({"layers": "middle"}, "middle"),
    ],
)
def test_what_cannot_be_paired_is_refused_in_words(options, message, attentive):
    with pytest.raises(REFUSED, match=message):
        pair_layers(*attentive, **options)


def test_no_layer_of_that_kind():
    with pytest.raises(ValueError, match=r"no layer of the student.*'self_attention'.*match are down_blocks.0"):
        pair_layers(tiny_unet(), tiny_unet(), layers="self_attention")


@pytest.mark.parametrize("attention", [False, True])
def test_resolutions_that_do_not_divide(attention):
    """Of 10x10, 5x5 and 3x3 the last two differ, and as tokens 25 and 9."""
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    teacher = tiny_condition_unet((8, 8, 16), size=10, **kinds)
    student = build_student(teacher, Reduction(drop_stages=(-1,)))
    with pytest.raises(ValueError, match=r"differ in resolution, and pooling cannot help: neither divides the other"):
        pair_layers(student, teacher, layers="self_attention" if attention else "all")


def test_tokens_of_no_square_map_are_not_pooled():
    teacher = tiny_condition_unet((8, 16), size=(4, 8))
    pairs = [("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "mid_block.attentions.0.proj_out")]
    with pytest.raises(ValueError, match="differ in"):
        pair_layers(teacher, teacher, pairs=pairs)
    tokens = "{}.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(ValueError, match=r"\(32, 8\).*\(8, 16\) differ in resolution, and pooling cannot help"):
        pair_layers(teacher, teacher, pairs=[(tokens.format("down_blocks.0"), tokens.format("mid_block"))])


@pytest.mark.parametrize("pairs", [None, [("mid_block", "mid_block")]])
def test_samples_of_unlike_sizes(pairs):
    with pytest.raises(ValueError, match=r"samples of size 16 and the teacher of 8.*one sample_size"):
        pair_layers(tiny_unet((16,), size=16), tiny_unet((8, 16), size=8), pairs=pairs)


# ---- the table


def test_pair_table():
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 16, 32)), layers="mid_and_up")
    assert pair_table(pairs).splitlines() == [
        "student layer  shape   teacher layer  shape   projector",
        "mid_block/2    16x2x2  mid_block      32x2x2  16 -> 32",
        "up_blocks.0    16x8x8  up_blocks.1    16x8x8  16 -> 16",
        "up_blocks.1    8x8x8   up_blocks.2    16x8x8  8 -> 16",
    ]
    last = [line.split()[-1] for line in pair_table(pairs, {"floor": ["0.1", "0.2", "0.3"]}).splitlines()]
    assert last == ["floor", "0.1", "0.2", "0.3"]
