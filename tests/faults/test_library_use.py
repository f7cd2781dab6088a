"""The library with models in wrappers, in other precisions, and UNets of other conditions: right, or one line."""

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, VQModel

import vkd_gen as vkd
from tests.conftest import make_batch, one_line, refused, tiny_condition_unet, tiny_unet
from tests.recipes.conftest import recipe_runner
from vkd_gen.evaluation.cost import count_macs
from vkd_gen.families import feature_shapes


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel and FSDP hold a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "torch.compile": (lambda model: torch.compile(model, backend="eager"), "pass the bare one, its `._orig_mod`"),
    "DataParallel": (torch.nn.DataParallel, "in a DataParallel; pass the bare one, its `.module`"),
    "another": (Wrapper, "in a Wrapper; pass the bare one"),
}
USES = {
    "build_student": lambda model: vkd.build_student(model, width=0.5),
    "FrozenTeacher": vkd.FrozenTeacher,
    "ProjectedStudent": vkd.ProjectedStudent,
    "pair_layers, student": lambda model: vkd.pair_layers(model, tiny_unet()),
    "pair_layers, teacher": lambda model: vkd.pair_layers(tiny_unet(), model),
    "FeatureCapture": lambda model: vkd.FeatureCapture(model, ["mid_block"]),
    "inherit_weights": lambda model: vkd.inherit_weights(tiny_unet(), model),
    "count_macs": count_macs,
}


@pytest.mark.parametrize(
    ("use", "wrapper"),
    [*((use, "DataParallel") for use in USES), ("FrozenTeacher", "torch.compile"), ("build_student", "another")],
)
def test_a_model_in_a_wrapper(use, wrapper):
    wrap, words = WRAPPERS[wrapper]
    with pytest.raises(ValueError, match=words):
        USES[use](wrap(tiny_unet()))


F, D, B, H = torch.float32, torch.float64, torch.bfloat16, torch.float16


def losses_of(student_dtype, teacher_dtype, projector=vkd.OrthogonalProjector, convert=None):
    """README's step with a student and a teacher in other precisions."""
    torch.manual_seed(0)
    teacher_unet = torch.nn.Module.to(tiny_unet(), teacher_dtype)
    student = torch.nn.Module.to(vkd.build_student(tiny_unet(), width=0.5), student_dtype)
    pairs = vkd.pair_layers(student, teacher_unet)
    model = vkd.ProjectedStudent(
        student,
        pairs,
        [projector(pair.student_channels, pair.teacher_channels) for pair in pairs],
        [vkd.FeatureNormalizer("none", channels=pair.teacher_channels) for pair in pairs],
    )
    if convert is not None:
        model.to(convert)
    teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs])
    torch.set_default_dtype(torch.float32)
    losses = vkd.distillation_losses(model, make_batch(), schedule=vkd.Schedule.of(DDPMScheduler()), teacher=teacher)
    losses["total"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    return losses["total"].item()


@pytest.mark.parametrize(
    ("student", "teacher", "projector"),
    [
        *((*dtypes, vkd.OrthogonalProjector) for dtypes in ((D, F), (D, D), (B, B), (H, F))),
        (F, D, vkd.LinearProjector),
        (B, F, vkd.LinearProjector),
    ],
)
def test_student_and_teacher_in_other_precisions(student, teacher, projector):
    expected = losses_of(F, F, projector)
    rounding = 1e-2 if {B, H} & {student, teacher} else 1e-5
    assert losses_of(student, teacher, projector) == pytest.approx(expected, rel=rounding)


@pytest.fixture
def default_dtype():
    """torch.set_default_dtype, for a while."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def test_projectors_made_in_another_default_precision(default_dtype):
    default_dtype(D)
    assert 0 < losses_of(D, D) < 10
    default_dtype(B)
    with pytest.raises(ValueError, match=f"the projector is in {B}: keep it in float32"):
        losses_of(B, B)


def test_a_whole_student_put_into_another_precision():
    with pytest.raises(ValueError, match="keep it in float32"):
        losses_of(F, F, convert=H)
    assert 0 < losses_of(F, F, convert=D) < 10


NO_UNETS = {
    "a pipeline": (
        lambda: DDIMPipeline(tiny_unet(), DDIMScheduler()),
        "a DDIMPipeline is neither .*; pass its `.unet`",
    ),
    "a decoder": (lambda: VQModel(block_out_channels=(8,), norm_num_groups=4), "a VQModel is neither"),
    "a name": (lambda: "google/ddpm-cifar10-32", "a str is neither a UNet2DModel nor a UNet2DConditionModel"),
}


@pytest.mark.parametrize("name", NO_UNETS)
def test_what_is_no_unet(name):
    make, words = NO_UNETS[name]
    for use in ("build_student", "pair_layers, teacher", "inherit_weights", "count_macs"):
        with pytest.raises(ValueError, match=words):
            USES[use](make())


def losses_of_batch(change, student=None):
    model = vkd.ProjectedStudent(student or tiny_unet(seed=1), [], [], [])
    teacher = vkd.FrozenTeacher(student or tiny_unet())
    schedule, weights = vkd.Schedule.of(DDPMScheduler()), vkd.LossWeights(feature=0.0)
    return vkd.distillation_losses(model, change(make_batch()), schedule=schedule, teacher=teacher, weights=weights)


def with_timesteps(change):
    return lambda batch: {**batch, "timesteps": change(batch["timesteps"])}


BATCHES = {
    "nothing": (lambda batch: {}, "the batch has no sample and no noise and no timesteps"),
    "no noise": (lambda batch: {"sample": batch["sample"], "timesteps": batch["timesteps"]}, "the batch has no noise"),
    "noise of another shape": (lambda batch: {**batch, "noise": batch["noise"][:, :, :4]}, "must have one shape"),
    "no samples": (lambda batch: {name: value[:0] for name, value in batch.items()}, "at least one sample"),
    "times for timesteps": (with_timesteps(lambda value: value / 1000), "whole numbers from 0 to 999, "),
    "beyond the schedule": (with_timesteps(lambda value: value * 0 + 1000), "from 0 to 999, .* from 1000 to 1000"),
    "below 0, which wraps around": (with_timesteps(lambda value: value * 0 - 1), "from 0 to 999, .* from -1 to -1"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BATCHES.values(), ids=BATCHES)
def test_batches_that_are_none(change, words):
    with pytest.raises(ValueError, match=words):
        losses_of_batch(change)


def test_a_student_that_is_the_teacher_itself():
    with pytest.raises(ValueError, match="no parameter of the student requires gradients"):
        losses_of_batch(dict, student=tiny_unet())
    with torch.no_grad():
        assert losses_of_batch(dict, student=tiny_unet())["total"] > 0


def test_a_student_of_another_time_embedding_inherits_nothing():
    for student, teacher in (("fourier", "positional"), ("positional", "learned"), ("learned", "fourier")):
        unets = [
            tiny_unet(time_embedding_type=kind, num_train_timesteps=1000 if kind == "learned" else None)
            for kind in (student, teacher)
        ]
        with pytest.raises(ValueError, match=r"the student's time_proj is a .*: such a student cannot inherit"):
            vkd.inherit_weights(*unets)


SHOWN = {
    "Stable unCLIP": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 48},
    "simple projection": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 48},
    "timestep as class": {"class_embed_type": "timestep"},
    "DeepFloyd IF": {
        "addition_embed_type": "text", "encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 40,
        "addition_embed_type_num_heads": 8, "out_channels": 8,
    },
    "text width of its own": {"encoder_hid_dim": 40},
    "classes and text": {"num_class_embeds": 5},
}  # fmt: skip
REFUSED = {
    "class_embed_type": {"class_embed_type": "identity"},
    "addition_embed_type": {
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "image_proj",
        "encoder_hid_dim": 40,
    },
    "encoder_hid_dim_type": {"encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 40},
    "dual_cross_attention": {"dual_cross_attention": True},
}


@pytest.mark.parametrize("name", SHOWN)
def test_unets_of_other_conditions_have_shapes_and_costs(name):
    unet = tiny_condition_unet(**SHOWN[name])
    assert feature_shapes(unet, ["mid_block"]) == {"mid_block": (16, 4, 4)}
    assert count_macs(unet) > 0


@pytest.mark.parametrize("entry", REFUSED)
def test_unets_of_conditions_that_are_not_known(entry):
    unet = tiny_condition_unet(**REFUSED[entry])
    for use in (count_macs, lambda unet: feature_shapes(unet, ["mid_block"])):
        with pytest.raises(ValueError, match=f"UNet2DConditionModel with {entry} .* not known here"):
            use(unet)


def test_a_unet_that_fails_in_any_other_way():
    """Whatever diffusers and torch raise is one line."""
    unet = tiny_condition_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=20
    )
    for use in (count_macs, lambda unet: feature_shapes(unet, ["mid_block"])):
        with one_line("cannot take a sample of size 8: "):
            use(unet)


@pytest.mark.parametrize("name", ["Stable unCLIP", "dual_cross_attention"])
def test_a_dry_run_of_other_conditions(name, tmp_path, monkeypatch, capfd):
    unet = tiny_condition_unet(**{**SHOWN, **REFUSED}[name])
    (tmp_path / "config.json").write_text(unet.to_json_string())
    assert json.loads(unet.to_json_string())["_class_name"] == "UNet2DConditionModel"
    run = recipe_runner(monkeypatch, tmp_path)
    flags = ["--teacher", tmp_path / "config.json", "--dry_run"]
    if name in SHOWN:
        run("train_student_unet", *flags)
        assert "with the whole pipeline of such a teacher as --teacher" in capfd.readouterr().out
    else:
        assert name in refused(capfd, run, "train_student_unet", *flags)
