"""The step that the recipes share: its terms, its cost, where its gradients go, and what wraps it."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel
from torch import nn

from tests.conftest import make_batch, tiny_condition_unet, tiny_unet
from vkd_gen import (
    FeatureCapture,
    FeatureNormalizer,
    FrozenTeacher,
    IdentityProjector,
    LinearProjector,
    LossWeights,
    OrthogonalProjector,
    ProjectedStudent,
    calibrate,
    distillation_losses,
    pair_layers,
)
from vkd_gen.families.unet import call
from vkd_gen.losses import feature_losses
from vkd_gen.schedule import Schedule

FEATURE_ONLY = LossWeights(denoising=0.0, output=0.0, feature=1.0)
NO_FEATURES = LossWeights(denoising=1.0, output=1.0, feature=0.0)
STAGES = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")


def make_projector(method, student_channels, target_channels):
    match method:
        case "linear":
            return LinearProjector(student_channels, target_channels)
        case "identity":
            return IdentityProjector(student_channels, target_channels)
    return OrthogonalProjector(student_channels, target_channels, method=method, momentum=0.9, refresh_every_steps=1)


def make_projected(student, teacher_unet, *, method="solved", normalization="none", layers="all", pairs=None):
    """A projected student and its teacher."""
    layer_pairs = pair_layers(student, teacher_unet, layers=layers, pairs=pairs)
    torch.manual_seed(5)  # of the linear projectors
    projected = ProjectedStudent(
        student,
        layer_pairs,
        [make_projector(method, pair.student_channels, pair.teacher_channels) for pair in layer_pairs],
        [FeatureNormalizer(normalization, channels=pair.teacher_channels) for pair in layer_pairs],
    )
    return projected, FrozenTeacher(teacher_unet, [pair.teacher for pair in layer_pairs])


@pytest.fixture
def models():
    """Student of half the teacher's width, all five stages paired, solved projectors."""
    return make_projected(tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def projector_state(projected):
    return {name: value.clone() for name, value in projected.projectors.state_dict().items()}


def count_calls(*modules):
    """Forward passes of the modules, counted in the list's only entry."""
    calls = [0]

    def hook(*_):
        calls[0] += 1

    for module in modules:
        module.register_forward_pre_hook(hook)
    return calls


def assert_states_equal(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


# ---- loss weights


@pytest.mark.parametrize("name", ["denoising", "output", "feature"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_loss_weights_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"the {name} weight must be at least 0"):
        LossWeights(**{name: value})


def test_loss_weights_of_zero_leave_nothing_to_train_on():
    with pytest.raises(ValueError, match="all weights are 0"):
        LossWeights(denoising=0.0, output=0.0, feature=0.0)


# ---- the frozen teacher


def test_teacher_is_put_into_eval_mode_and_frozen():
    unet = tiny_unet(dropout=0.5).train()
    teacher = FrozenTeacher(unet, ["mid_block"])
    assert not any(module.training for module in unet.modules())
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    noisy, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    (first, features), (second, _) = teacher(noisy, timesteps), teacher(noisy, timesteps)
    assert torch.equal(first, second)  # no dropout
    assert not first.requires_grad
    assert not features["mid_block"].requires_grad


def test_teacher_in_bfloat16_answers_in_float32_with_features_of_its_own():
    exact, _ = FrozenTeacher(tiny_unet(seed=2))(torch.ones(2, 1, 8, 8), torch.tensor([3, 900]))
    teacher = FrozenTeacher(tiny_unet(seed=2).to(torch.bfloat16), ["mid_block"])
    prediction, features = teacher(torch.ones(2, 1, 8, 8), torch.tensor([3, 900]))
    assert prediction.dtype == torch.float32
    assert features["mid_block"].dtype == torch.bfloat16
    torch.testing.assert_close(prediction, exact, atol=0.05, rtol=0.05)


def test_teacher_in_bfloat16_takes_conditioning_in_float32():
    """Embeddings come in float32 from the data, whatever the teacher's precision."""
    teacher = FrozenTeacher(tiny_condition_unet().to(torch.bfloat16))
    prediction, _ = teacher(
        torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), {"encoder_hidden_states": torch.randn(2, 3, 8)}
    )
    assert prediction.dtype == torch.float32


def test_one_teacher_layer_may_serve_two_student_layers():
    projected, teacher = make_projected(
        tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=[("down_blocks.1", "mid_block"), ("mid_block", "mid_block")]
    )
    losses = distillation_losses(projected, make_batch(), schedule=Schedule.of(DDPMScheduler()), teacher=teacher)
    assert {"feature/down_blocks.1", "feature/mid_block"} <= losses.keys()


# ---- the projected student


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cka"])
def test_forward_compares_both_features_sample_by_sample(models, kind):
    """Against hooks, rows, projector and loss one after another, for each sample by itself."""
    projected, teacher = models
    projected.eval()
    noisy, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    features = teacher(noisy, timesteps)[1]
    capture = FeatureCapture(projected.student, STAGES)
    capture.start()
    expected = projected.student(noisy, timesteps).sample
    own = capture.stop()
    prediction, losses = projected(noisy, timesteps, None, features, kind)
    torch.testing.assert_close(prediction, expected)
    assert tuple(losses) == STAGES
    for pair, projector in zip(projected.layer_pairs, projected.projectors, strict=True):
        rows = projector(*(part.flatten(2).transpose(1, 2) for part in (own[pair.student], features[pair.teacher])))
        for number in range(2):
            alone = feature_losses(*(part[number : number + 1] for part in rows), kind)
            torch.testing.assert_close(losses[pair.student][number : number + 1], alone)


def test_as_many_projectors_and_normalizers_as_pairs():
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)))
    with pytest.raises(ValueError, match="5 layer pairs need as many projectors \\(0\\) and normalizers \\(1\\)"):
        ProjectedStudent(tiny_unet((8, 16)), pairs, [], [FeatureNormalizer(channels=16)])


@pytest.mark.parametrize(("projector", "channels"), [((8, 32), 32), ((16, 16), 32), ((16, 32), 16)])
def test_widths_that_do_not_fit_are_refused(projector, channels):
    pairs = pair_layers(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=[("mid_block", "mid_block")])
    with pytest.raises(ValueError, match=r"pair mid_block .* does not fit"):
        ProjectedStudent(
            tiny_unet((8, 16)), pairs, [OrthogonalProjector(*projector)], [FeatureNormalizer(channels=channels)]
        )


def test_a_look_in_eval_mode_is_nothing_to_solve_after(models, schedule, monkeypatch):
    projected, teacher = models
    steps = []
    for projector in projected.projectors:
        monkeypatch.setattr(projector, "after_step", steps.append)
    for is_training in (False, True):
        projected.train(is_training)
        distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher)
        projected.train()
        projected.after_step(1 + is_training)
    assert steps == [2] * len(projected.projectors)


@pytest.mark.parametrize("normalization", ["none", "whiten"])
def test_calibrate_fills_normalizers_and_starts_projectors(normalization):
    """With a schedule of 100 steps; the same as by hand, and a module that is loaded needs none of it."""
    schedule = Schedule.of(DDPMScheduler(num_train_timesteps=100))
    projected, empty = (
        make_projected(tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2), normalization=normalization)[0]
        for _ in range(2)
    )
    teacher = FrozenTeacher(tiny_unet((16, 32), seed=2), STAGES)
    batches = [make_batch(20, seed=seed) | {"timesteps": torch.arange(20) * 5} for seed in range(2)]
    projected.calibrate(teacher, iter(batches), schedule, start_batches=batches[:1])
    statistics = calibrate(teacher, batches, schedule)
    for normalizer, pair in zip(projected.normalizers, projected.layer_pairs, strict=True):
        by_hand = FeatureNormalizer(normalization, statistics[pair.teacher])
        rows = torch.randn(20, 3, pair.teacher_channels)
        assert torch.equal(normalizer(rows, batches[0]["timesteps"]), by_hand(rows, batches[0]["timesteps"]))
        assert torch.equal(normalizer.target_covariance(), by_hand.target_covariance())
        if normalization == "whiten":
            expected = statistics[pair.teacher].mean[torch.arange(20) // 2].float()[:, None]
            torch.testing.assert_close(normalizer(expected, batches[0]["timesteps"]), torch.zeros_like(expected))
    started = ProjectedStudent(projected.student, projected.layer_pairs, empty.projectors, projected.normalizers)
    started.initialize_projectors(teacher, batches[:1], schedule)
    assert_states_equal(projector_state(projected), projector_state(started), rtol=0, atol=0)
    empty = make_projected(tiny_unet((8, 16)), tiny_unet((16, 32)), normalization=normalization)[0]
    if normalization == "whiten":
        with pytest.raises(ValueError, match=r"layer down_blocks.0: .*calibrate\(\)"):
            distillation_losses(empty, batches[0], schedule=schedule, teacher=teacher)
    empty.load_state_dict(projected.state_dict())
    losses = [
        distillation_losses(module.eval(), batches[0], schedule=schedule, teacher=teacher)
        for module in (projected, empty)
    ]
    assert_states_equal(*losses, rtol=0, atol=0)


def test_calibrate_names_the_layer_that_does_not_vary(models, schedule):
    teacher_unet = tiny_unet((16, 32))
    torch.nn.init.zeros_(teacher_unet.up_blocks[1].resnets[-1].conv2.weight)
    torch.nn.init.zeros_(teacher_unet.up_blocks[1].resnets[-1].conv2.bias)
    torch.nn.init.zeros_(teacher_unet.up_blocks[1].resnets[-1].conv_shortcut.weight)
    torch.nn.init.zeros_(teacher_unet.up_blocks[1].resnets[-1].conv_shortcut.bias)
    projected, teacher = make_projected(tiny_unet(), teacher_unet, normalization="center", layers="last_up")
    with pytest.raises(ValueError, match=r"layer up_blocks.1: the teacher's features do not vary"):
        projected.calibrate(teacher, [make_batch(20) | {"timesteps": torch.arange(20) * 50}], schedule)


def test_initialize_projectors_solves_for_the_given_batches(models, schedule):
    """Against an orthogonal Procrustes problem solved by numpy on the features of both batches."""
    projected, teacher = models
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    layer = projected.layer_pairs[2]
    collected = {"student": [], "teacher": []}
    for batch in batches:
        noisy = schedule.noisy(batch["sample"], batch["noise"], batch["timesteps"])
        for name, unet in (("student", projected.student), ("teacher", teacher.unet)):
            capture = FeatureCapture(unet, [getattr(layer, name)])
            capture.start()
            with torch.no_grad():
                call(unet, noisy, batch["timesteps"])
            feature = capture.stop()[getattr(layer, name)].double()
            collected[name].append(feature.flatten(2).transpose(1, 2).flatten(0, 1).numpy())
            capture.remove()
    rows, targets = (np.concatenate(parts) for parts in collected.values())
    rows, targets = rows - rows.mean(0), targets - targets.mean(0)
    left, values, right = np.linalg.svd(rows.T @ targets, full_matrices=False)

    projected.initialize_projectors(teacher, batches, schedule)
    projector = projected.projectors[2]
    np.testing.assert_allclose(projector.matrix(), left @ right, atol=1e-3)
    assert projector.gain.item() == pytest.approx(values.sum() / np.square(rows).sum(), rel=1e-3)
    losses = distillation_losses(
        projected.eval(),
        {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]},
        schedule=schedule,
        teacher=teacher,
    )
    expected = np.square(projector.gain.item() * rows @ left @ right - targets).mean()
    assert losses["feature/mid_block"].item() == pytest.approx(expected, rel=1e-3)


# ---- the losses


def test_losses_reference(schedule):
    """Every term again in numpy, from the two UNets and a hook of our own; free linear projector."""
    student, teacher_unet = tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2)
    projected, teacher = make_projected(student, teacher_unet, method="linear", pairs=[("mid_block", "mid_block")])
    batch = make_batch()
    losses = distillation_losses(projected, batch, schedule=schedule, teacher=teacher)

    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[batch["timesteps"].numpy()][:, None, None, None]
    noisy = np.sqrt(alpha_bar) * batch["sample"].numpy() + np.sqrt(1 - alpha_bar) * batch["noise"].numpy()
    found = {}
    for name, unet in (("student", student), ("teacher", teacher_unet)):
        handle = unet.mid_block.register_forward_hook(
            lambda _module, _inputs, output, name=name: found.update({f"{name} feature": output})
        )
        with torch.no_grad():
            found[name] = unet(torch.from_numpy(noisy).float(), batch["timesteps"]).sample
        handle.remove()
    found = {name: value.double().numpy() for name, value in found.items()}
    linear = projected.projectors[0].linear
    weight, bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
    embedded = np.einsum("bchw,kc->bkhw", found["student feature"], weight) + bias[:, None, None]
    expected = {
        "denoising": np.square(found["student"] - batch["noise"].numpy()).mean(),
        "output": np.square(found["student"] - found["teacher"]).mean(),
        "feature/mid_block": np.square(embedded - found["teacher feature"]).mean(),
    }
    assert losses.keys() == {"total", "feature", *expected}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(denoising=0.5, output=2.0, feature=0.25),
        LossWeights(denoising=4.0, output=0.0, feature=3.0),
        LossWeights(denoising=4.0, output=2.0, feature=0.0),
        LossWeights(denoising=0.0, output=0.0, feature=3.0),
        LossWeights(denoising=0.0, output=2.0, feature=0.0),
        LossWeights(denoising=4.0, output=0.0, feature=0.0),
    ],
)
def test_total_is_the_weighted_sum_and_a_weight_of_zero_removes_exactly_its_term(models, schedule, weights):
    projected, teacher = models
    everything = distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher)
    losses = distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher, weights=weights)
    terms = {name for name, weight in vars(weights).items() if weight}
    per_layer = {f"feature/{layer}" for layer in STAGES} if "feature" in terms else set()
    assert losses.keys() == {"total"} | terms | per_layer
    for name in terms | per_layer:  # the terms themselves are unweighted
        torch.testing.assert_close(losses[name], everything[name])
    expected = sum(getattr(weights, name) * everything[name] for name in terms)
    torch.testing.assert_close(losses["total"], expected)
    if "feature" in terms:
        torch.testing.assert_close(losses["feature"], sum(losses[name] for name in per_layer))


# ---- what a weight of zero costs


def test_without_output_and_features_the_teacher_is_not_called(models, schedule):
    projected, teacher = models
    calls = count_calls(teacher.unet)
    weights = LossWeights(denoising=1.0, output=0.0, feature=0.0)
    distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher, weights=weights)
    assert calls == [0]
    losses = distillation_losses(projected, make_batch(), schedule=schedule, weights=weights)
    assert losses.keys() == {"total", "denoising"}  # nor is one needed
    distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher)
    assert calls == [1]


def test_without_a_feature_weight_nothing_is_captured_normalized_or_projected(models, schedule, monkeypatch):
    projected, teacher = models
    calls = count_calls(*projected.projectors, *projected.normalizers)
    before = {name: value.clone() for name, value in projected.named_buffers()}

    def captured(_self):
        raise AssertionError("features were captured")

    monkeypatch.setattr(FeatureCapture, "start", captured)
    losses = distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher, weights=NO_FEATURES)
    losses["total"].backward()
    assert calls == [0]
    assert_states_equal(dict(projected.named_buffers()), before, atol=0, rtol=0)
    with pytest.raises(AssertionError, match="captured"):
        distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher)


# ---- gradient routing


def test_the_prediction_terms_reach_every_student_parameter(models, schedule):
    projected, teacher = models
    losses = distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher, weights=NO_FEATURES)
    losses["total"].backward()
    assert gradients(projected).keys() == dict(projected.named_parameters()).keys()


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [
        ("cayley", (8, 16), (16, 32)),
        ("cayley", (16, 32), (8, 16)),
        ("matrix_exp", (8, 16), (8, 16)),
        ("linear", (8, 16), (16, 32)),
    ],
)
def test_learned_projectors_learn_and_the_teacher_does_not(schedule, method, student, teacher):
    """Student narrower than the teacher, as wide, and wider."""
    projected, teacher = make_projected(tiny_unet(student, seed=1), tiny_unet(teacher, seed=2), method=method)
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    optimizer = torch.optim.SGD(projected.parameters(), lr=0.1)
    losses = distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher, weights=FEATURE_ONLY)
    losses["total"].backward()
    for name, parameter in projected.projectors.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())
    assert_states_equal(dict(teacher.unet.state_dict()), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("method", "widths"),
    [
        ("identity", (16, 32)),
        ("solved", (8, 16)),
        ("solved", (32, 64)),
        ("cayley", (32, 64)),
        ("linear", (8, 16)),
    ],
)
def test_no_gradient_reaches_the_teachers_features(method, widths):
    """Even where a teacher of another making hands over features that carry gradients."""
    projected, teacher = make_projected(tiny_unet(widths), tiny_unet((16, 32), seed=2), method=method)
    noisy, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    features = {name: feature.requires_grad_() for name, feature in teacher(noisy, timesteps)[1].items()}
    _, losses = projected(noisy, timesteps, None, features)
    torch.stack(list(losses.values())).sum().backward()
    assert projected.student.mid_block.resnets[0].conv1.weight.grad.count_nonzero() > 0
    assert all(feature.grad is None for feature in features.values())


# ---- unlike prediction types, timestep weights, conditioning


class Translated(UNet2DModel):
    """The teacher's network, speaking another prediction type: a perfect student."""

    def __init__(self, unet, schedule, source):
        ModelMixin.__init__(self)
        self.unet, self.schedule, self.source = unet, schedule, source

    def forward(self, sample, timestep, return_dict=True):
        prediction = self.unet(sample, timestep, return_dict=return_dict)[0]
        return (self.schedule.convert(prediction, sample, timestep, self.source),)


@pytest.mark.parametrize(("source", "target"), [("epsilon", "v_prediction"), ("sample", "epsilon")])
def test_a_perfect_student_of_another_prediction_type_has_no_output_loss(source, target):
    schedule = Schedule.of(DDPMScheduler(prediction_type=target))
    teacher = FrozenTeacher(tiny_unet(), prediction_type=source)
    student = Translated(tiny_unet(), schedule, source)
    batch = make_batch(8)
    options = {"schedule": schedule, "weights": LossWeights(output=1.0, feature=0.0)}
    losses = distillation_losses(ProjectedStudent(student), batch, teacher=teacher, **options)
    assert losses["output"].item() < 1e-8
    untranslated = distillation_losses(ProjectedStudent(tiny_unet(seed=1)), batch, teacher=teacher, **options)
    assert untranslated["output"].item() > 1e-3


def test_min_snr_weighs_every_term_by_the_students_prediction_type():
    schedule = Schedule.of(DDPMScheduler(prediction_type="v_prediction"))
    projected, teacher = make_projected(tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2))
    projected.eval()
    batch = make_batch(4) | {"timesteps": torch.tensor([5, 50, 200, 700])}  # SNR from above gamma to below
    options = {"schedule": schedule, "teacher": teacher}
    found = distillation_losses(projected, batch, timestep_weighting="min_snr", snr_gamma=2.0, **options)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[batch["timesteps"].numpy()]
    snr = alpha_bar / (1 - alpha_bar)
    per_sample = [
        distillation_losses(projected, {name: value[i : i + 1] for name, value in batch.items()}, **options)
        for i in range(4)
    ]
    for name in ("denoising", "output", "feature", "feature/mid_block"):
        expected = np.mean(
            [min(ratio, 2.0) / (ratio + 1) * losses[name].item() for ratio, losses in zip(snr, per_sample, strict=True)]
        )
        assert found[name].item() == pytest.approx(expected, rel=1e-3), name


def test_conditioning_goes_to_teacher_and_student(schedule):
    student, teacher_unet = tiny_condition_unet((8, 16), seed=1), tiny_condition_unet((16, 32), seed=2)
    projected, teacher = make_projected(student, teacher_unet)
    projected.eval()
    batch = make_batch(2, channels=4)
    texts = torch.randn(2, 2, 3, 8)
    found, other = (
        distillation_losses(
            projected,
            batch | {"conditioning": {"encoder_hidden_states": text}},
            schedule=schedule,
            teacher=teacher,
        )
        for text in texts
    )
    noisy = schedule.noisy(batch["sample"], batch["noise"], batch["timesteps"])
    predictions = [
        unet(noisy, batch["timesteps"], encoder_hidden_states=texts[0]).sample for unet in (student, teacher_unet)
    ]
    torch.testing.assert_close(found["output"], (predictions[0] - predictions[1]).square().mean())
    assert all(not torch.isclose(found[name], other[name], rtol=1e-6) for name in found)
    projected.initialize_projectors(teacher, [batch | {"conditioning": {"encoder_hidden_states": texts[0]}}], schedule)
    found["total"].backward()
    assert student.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.count_nonzero() > 0


def test_token_features_of_attention_layers(schedule):
    """`[B, N, C]` as well as maps."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0"
    projected, teacher = make_projected(
        tiny_condition_unet((8, 16), seed=1), tiny_condition_unet((16, 32), seed=2), pairs=[(layer, layer)]
    )
    batch = make_batch(2, channels=4) | {"conditioning": {"encoder_hidden_states": torch.randn(2, 3, 8)}}
    losses = distillation_losses(projected, batch, schedule=schedule, teacher=teacher, weights=FEATURE_ONLY)
    losses["total"].backward()
    assert projected.student.get_submodule(layer).attn1.to_q.weight.grad.count_nonzero() > 0


# ---- errors


@pytest.mark.parametrize("weights", [FEATURE_ONLY, LossWeights(denoising=1.0, output=1.0, feature=0.0)])
def test_a_term_that_needs_a_teacher_says_so(models, schedule, weights):
    with pytest.raises(ValueError, match="need a teacher"):
        distillation_losses(models[0], make_batch(), schedule=schedule, weights=weights)


def test_a_feature_loss_without_layer_pairs(schedule):
    with pytest.raises(ValueError, match="no layer pairs"):
        distillation_losses(
            ProjectedStudent(tiny_unet()),
            make_batch(),
            schedule=schedule,
            teacher=FrozenTeacher(tiny_unet()),
        )


def test_a_teacher_that_does_not_capture_the_paired_layers(models, schedule):
    projected, teacher = models
    with pytest.raises(ValueError, match=r"down_blocks\.0"):
        distillation_losses(projected, make_batch(), schedule=schedule, teacher=FrozenTeacher(teacher.unet))


def test_reentrant_checkpointing_is_refused(schedule):
    layer = "down_blocks.0.resnets.0.conv1"  # inside a checkpointed part; at its end the gradient would be whole
    projected, teacher = make_projected(tiny_unet((8, 16)), tiny_unet((16, 32)), pairs=[(layer, layer)])
    projected.student.enable_gradient_checkpointing(
        functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    )
    with pytest.raises(RuntimeError, match=r"resnets\.0\.conv1 carries no gradient.*use_reentrant=False"):
        distillation_losses(projected, make_batch(), schedule=schedule, teacher=teacher)


# ---- the same result, however it is run


def training_steps(model, projected, teacher, micro_batches, *, num_steps=2, feature_loss_kind="mse"):
    """Gradients after each of a few SGD steps, and the projectors' state at the end.

    `micro_batches`: optimizer step -> batches.
    """
    optimizer = torch.optim.SGD(projected.parameters(), lr=0.05)
    found = []
    for step in range(num_steps):
        optimizer.zero_grad()
        batches = micro_batches(step)
        for batch in batches:
            losses = distillation_losses(
                model,
                batch,
                schedule=Schedule.of(DDPMScheduler()),
                teacher=teacher,
                feature_loss_kind=feature_loss_kind,
            )
            (losses["total"] / len(batches)).backward()
        found.append(gradients(projected))
        optimizer.step()
        projected.after_step(step + 1)
    return found, projector_state(projected)


def assert_runs_equal(found, expected, atol=1e-5, rtol=1e-3):
    for found_gradients, expected_gradients in zip(found[0], expected[0], strict=True):
        assert_states_equal(found_gradients, expected_gradients, atol=atol, rtol=rtol)
    assert_states_equal(found[1], expected[1], atol=1e-4, rtol=1e-3)


def part(batch, index, count):
    return {name: value.chunk(count)[index] for name, value in batch.items()}


@pytest.mark.parametrize("method", ["solved", "cayley"])
def test_accumulation_over_micro_batches_equals_the_big_batch(method):
    def run(num_parts):
        projected, teacher = make_projected(tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2), method=method)
        return training_steps(
            projected,
            projected,
            teacher,
            lambda step: [part(make_batch(8, seed=step), i, num_parts) for i in range(num_parts)],
        )

    whole = run(1)
    assert_runs_equal(run(4), whole)
    if method != "cayley":  # the comparison is of something that moved
        assert (whole[1]["2.solution"] - torch.eye(16, 32)).abs().max() > 0.1


@pytest.mark.parametrize("method", ["solved", pytest.param("matrix_exp", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_nothing(method):
    """Pairs at the ends of blocks, and inside, where the forward pass is repeated during backward."""
    pairs = [(layer, layer) for layer in (*STAGES, "down_blocks.0.resnets.0.conv1", "mid_block.resnets.1")]

    def run(checkpointing):
        projected, teacher = make_projected(
            tiny_unet((8, 16), seed=1), tiny_unet((16, 32), seed=2), method=method, pairs=pairs
        )
        if checkpointing:
            projected.student.enable_gradient_checkpointing()
        calls = count_calls(projected.student.down_blocks[0].resnets[0])
        return training_steps(projected, projected, teacher, lambda step: [make_batch(seed=step)]), calls

    (expected, calls), (found, calls_checkpointed) = run(False), run(True)
    assert (calls, calls_checkpointed) == ([2], [4])  # it did checkpoint
    assert_runs_equal(found, expected)


# ---- two processes

DDP_CASES = [
    ("none", "solved"),
    ("batch_whiten", "solved"),
    ("batch_whiten", "matrix_exp"),
]
NUM_MICRO_BATCHES = 2


def ddp_case(normalization, method, *, rank, num_processes):
    """A few steps on this process' share of every micro-batch."""
    projected, teacher = make_projected(
        tiny_unet((8, 16), seed=1),
        tiny_unet((16, 32), seed=2),
        method=method,
        normalization=normalization,
        layers="mid_and_up",
    )
    model = nn.parallel.DistributedDataParallel(projected) if num_processes > 1 else projected
    return training_steps(
        model,
        projected,
        teacher,
        lambda step: [
            part(make_batch(8, seed=10 * step + number), rank, num_processes) for number in range(NUM_MICRO_BATCHES)
        ],
    )


def ddp_process(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {case: ddp_case(*case, rank=rank, num_processes=2) for case in DDP_CASES}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ddp_results(tmp_path_factory):
    """What each of two processes found; started once for all cases, as starting is what takes time."""
    folder = tmp_path_factory.mktemp("ddp")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])  # the processes import this file as tests.test_distillation
        torch.multiprocessing.set_forkserver_preload([__name__])  # imported once for both
        torch.multiprocessing.start_processes(ddp_process, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", DDP_CASES, ids="-".join)
def test_two_processes_equal_one_on_the_whole_batch(ddp_results, case):
    """Plain DistributedDataParallel with default settings, two micro-batches per step, without no_sync."""
    expected = ddp_case(*case, rank=0, num_processes=1)
    for found in ddp_results:
        assert_runs_equal(found[case], expected)
        # The first step's gradients as one vector: no further from the single process' than float32 rounds.
        first, first_expected = (
            torch.cat([g.flatten() for g in run[0][0].values()]) for run in (found[case], expected)
        )
        assert (first - first_expected).norm() <= 1e-6 * first_expected.norm()
        assert (first - first_expected).abs().max() <= 1e-6 * max(1, first_expected.abs().max())


@pytest.mark.parametrize("case", DDP_CASES, ids="-".join)
def test_processes_agree_to_the_last_bit(ddp_results, case):
    first, second = (results[case] for results in ddp_results)
    for gradients_of_first, gradients_of_second in zip(first[0], second[0], strict=True):
        assert_states_equal(gradients_of_first, gradients_of_second, atol=0, rtol=0)
    assert_states_equal(first[1], second[1], atol=0, rtol=0)
