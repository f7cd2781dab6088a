"""Figures of what the feature loss does, against gradients by `.backward()` and a network of one weight."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel
from torch import nn

from tests.conftest import make_batch, tiny_unet
from vkd_gen import (
    FeatureNormalizer,
    FeatureStatistics,
    FrozenTeacher,
    IdentityProjector,
    LayerPair,
    LinearProjector,
    LossWeights,
    OrthogonalProjector,
    ProjectedStudent,
    calibrate,
    distillation_losses,
    pair_layers,
    width_floor,
)
from vkd_gen.data.draws import both_branches
from vkd_gen.diagnostics import Diagnostics, effective_rank, guidance_gap_ratio
from vkd_gen.features import FeatureCapture, to_rows
from vkd_gen.schedule import Schedule

SCHEDULE = Schedule.of(DDPMScheduler())
LAYERS = ("mid_block", "up_blocks.1")


def make_projector(method, *widths):
    if method == "linear":
        return LinearProjector(*widths)
    return OrthogonalProjector(*widths, method=method)


def build(student=None, teacher_unet=None, *, method="solved", normalization="center", pairs=None, labels=None):
    """A projected student that has begun, and its teacher."""
    student = student or tiny_unet((8, 16), seed=1)
    teacher_unet = teacher_unet or tiny_unet((16, 32), seed=2)
    layer_pairs = pair_layers(student, teacher_unet, pairs=pairs or [(layer, layer) for layer in LAYERS])
    teacher = FrozenTeacher(teacher_unet, [pair.teacher for pair in layer_pairs])
    batch = probe(16, seed=9, labels=labels)
    statistics = calibrate(teacher, [batch], SCHEDULE, num_timestep_bins=2)
    projected = ProjectedStudent(
        student,
        layer_pairs,
        [make_projector(method, pair.student_channels, pair.teacher_channels) for pair in layer_pairs],
        [FeatureNormalizer(normalization, statistics[pair.teacher]) for pair in layer_pairs],
    )
    projected.initialize_projectors(teacher, [batch], SCHEDULE)
    return projected, teacher


def probe(batch_size=4, *, seed=0, labels=None):
    batch = make_batch(batch_size, seed=seed)
    if labels is not None:
        batch["conditioning"] = {"class_labels": torch.arange(batch_size) % labels}
    return batch


def look(projected, teacher, batches=None, weights=LossWeights(feature=0.3), **options):
    batches = [probe(4), probe(2, seed=1)] if batches is None else batches
    return Diagnostics(projected, teacher, batches, schedule=SCHEDULE, **options)(weights)


# ---- effective rank


@pytest.mark.parametrize(
    ("variances", "expected"),
    [([1.0], 1), ([7.0, 0.0, 0.0], 1), ([2.0] * 5, 5), ([2.0, 1.0, 1.0, 0.0], 2**1.5), ([0.0, 0.0], 0)],
)
def test_effective_rank_known_values(variances, expected):
    """Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits (Roy and Vetterli, 2007, eq. 3 of the singular values)."""
    rows = torch.diag(torch.tensor(variances).sqrt())
    rows = torch.cat([rows, -rows])
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(200, 6), (4, 6)])
def test_effective_rank_equals_numpy(shape):
    rows = torch.randn(*shape) @ torch.randn(6, 6) + 5
    values = np.linalg.svd(rows.double().numpy() - rows.double().numpy().mean(0), compute_uv=False) ** 2
    shares = values[values > 1e-9 * values.max()] / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-6)
    assert 1 < expected < min(shape)


# ---- a network of one weight, of which everything is known


class OneWeight(UNet2DModel):
    """`prediction` times the sample, beside a `feature` times the sample; a student's are the same weight."""

    def __init__(self, feature, prediction=None):
        ModelMixin.__init__(self)
        self.feature = nn.Conv2d(1, 1, 1, bias=False)
        self.feature.weight.data.fill_(feature)
        self.prediction = prediction

    def forward(self, sample, timestep, return_dict=True):
        feature = self.feature(sample)
        return (feature if self.prediction is None else self.prediction * sample,)


def one_weight(student=0.5, *, feature, prediction):
    pair = LayerPair("feature", "feature", (1, 8, 8), (1, 8, 8))
    one = torch.ones(1, 1, dtype=torch.float64)
    statistics = FeatureStatistics(mean=0 * one, share=one[0], covariance=one, layer_norm_covariance=one)
    normalizer = FeatureNormalizer("none", statistics)
    projected = ProjectedStudent(OneWeight(student), [pair], [IdentityProjector(1, 1)], [normalizer])
    return projected, FrozenTeacher(OneWeight(feature, prediction), ["feature"])


@pytest.mark.parametrize(
    ("feature", "prediction", "cosine"), [(2.0, 1.0, 1), (2.0, 0.0, -1), (-1.0, 3.0, -1), (-1.0, 0.0, 1)]
)
def test_gradients_known_values(feature, prediction, cosine):
    """The loss (a - b)^2 E[x^2] has the gradient 2 (a - b) E[x^2] in a, for the output and for the feature."""
    projected, teacher = one_weight(feature=feature, prediction=prediction)
    batches = [probe(4), probe(2, seed=1)]
    weights = LossWeights(denoising=0.0, output=2.0, feature=0.3)
    values = look(projected, teacher, batches, weights)
    square = np.mean(
        [
            sample.square().mean().item()
            for batch in batches
            for sample in SCHEDULE.noisy(batch["sample"], batch["noise"], batch["timesteps"])
        ]
    )
    assert values["gradient/output"] == pytest.approx(2.0 * 2 * abs(0.5 - prediction) * square, rel=1e-5)
    assert values["gradient/feature"] == pytest.approx(0.3 * 2 * abs(0.5 - feature) * square, rel=1e-5)
    expected = 0.3 * abs(0.5 - feature) / (2.0 * abs(0.5 - prediction))
    assert values["gradient_ratio"] == pytest.approx(expected, rel=1e-5)
    assert values["gradient_cosine/feature-output"] == pytest.approx(cosine)
    assert "gradient/denoising" not in values


@pytest.mark.parametrize("num_bins", [1, 3, 7])
def test_timestep_bins_known_values(num_bins):
    """Each draw's loss is (a - b)^2 times the mean square of its noisy sample; bins without a draw are left out."""
    projected, teacher = one_weight(feature=2.0, prediction=1.0)
    batch = probe(6) | {"timesteps": torch.tensor([0, 999, 333, 334, 142, 998])}
    values = look(projected, teacher, [batch], num_timestep_bins=num_bins)
    noisy = SCHEDULE.noisy(batch["sample"], batch["noise"], batch["timesteps"])
    squares = (1.5**2 * noisy.square().mean((1, 2, 3))).tolist()
    first, last, third, after_third, seventh, last_but_one = squares
    expected = {
        1: {"t0-999": np.mean(squares)},
        3: {"t0-333": np.mean([first, third, seventh]), "t334-666": after_third},
        7: {"t0-142": np.mean([first, seventh]), "t286-428": np.mean([third, after_third])},
    }[num_bins]
    if num_bins > 1:
        name = {3: "t667-999", 7: "t858-999"}[num_bins]
        expected[name] = np.mean([last, last_but_one])
    found = {name.split("/")[-1]: value for name, value in values.items() if name.startswith("feature/feature/")}
    assert found == pytest.approx(expected, rel=1e-5)


# ---- references


@pytest.mark.parametrize(("kind", "weighting"), [("mse", "uniform"), ("cka", "min_snr")])
def test_gradients_equal_those_of_backward(kind, weighting):
    """Batches of unlike sizes equal one batch of all draws, term by term through `.backward()`."""
    projected, teacher = build()
    batches = [probe(4), probe(2, seed=1)]
    weights = LossWeights(denoising=0.5, output=2.0, feature=0.3)
    options = {"feature_loss_kind": kind, "timestep_weighting": weighting, "snr_gamma": 3.0}
    values = look(projected, teacher, batches, weights, **options)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    projected.eval()
    gradients = {}
    for term, weight in vars(weights).items():
        losses = distillation_losses(projected, whole, schedule=SCHEDULE, teacher=teacher, **options)
        (weight * losses[term]).backward()
        parameters = list(projected.student.parameters())
        parts = [np.zeros(p.numel()) if p.grad is None else p.grad.double().numpy().ravel() for p in parameters]
        gradients[term] = np.concatenate(parts)
        projected.zero_grad(set_to_none=True)
    norms = {term: np.linalg.norm(gradient) for term, gradient in gradients.items()}
    for term, norm in norms.items():
        assert values[f"gradient/{term}"] == pytest.approx(norm, rel=1e-4)
    together = np.linalg.norm(gradients["denoising"] + gradients["output"])
    assert values["gradient_ratio"] == pytest.approx(norms["feature"] / together, rel=1e-4)
    for term in ("denoising", "output"):
        cosine = gradients["feature"] @ gradients[term] / norms["feature"] / norms[term]
        assert values[f"gradient_cosine/feature-{term}"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize(("method", "kind"), [("solved", "mse"), ("linear", "cka"), ("cayley", "smooth_l1")])
def test_features_equal_those_found_by_hand(method, kind):
    projected, teacher = build(method=method)
    batches = [probe(4), probe(2, seed=1)]
    values = look(projected, teacher, batches, feature_loss_kind=kind, num_timestep_bins=1)
    layers = {"student": (projected.student, {}), "teacher": (teacher.unet, {})}
    for unet, rows in layers.values():
        capture = FeatureCapture(unet, LAYERS)
        for batch in batches:
            noisy = SCHEDULE.noisy(batch["sample"], batch["noise"], batch["timesteps"])
            capture.start()
            with torch.no_grad():
                unet(noisy, batch["timesteps"])
            for layer, feature in capture.stop().items():
                rows.setdefault(layer, []).append(to_rows(feature).flatten(0, 1))
        capture.remove()
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    losses = distillation_losses(projected.eval(), whole, schedule=SCHEDULE, teacher=teacher, feature_loss_kind=kind)
    for number, layer in enumerate(LAYERS):
        assert values[f"feature/{layer}/t0-999"] == pytest.approx(losses[f"feature/{layer}"].item(), rel=1e-4)
        covariance = projected.normalizers[number].target_covariance()
        width = projected.layer_pairs[number].student_channels
        assert values[f"floor/{layer}"] == pytest.approx(width_floor(covariance, width, kind))
        for name, (_, rows) in layers.items():
            assert values[f"rank/{name}/{layer}"] == pytest.approx(effective_rank(torch.cat(rows[layer])), rel=1e-4)
        projector = projected.projectors[number]
        expected = projector.gain.item() if method in ("solved", "cayley") else None
        assert values.get(f"gain/{layer}") == expected


# ---- properties


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        (LossWeights(denoising=0.0), {"output", "feature"}),
        (LossWeights(denoising=0.0, output=0.0), {"feature"}),
        (LossWeights(feature=0.0), {"denoising", "output"}),
    ],
)
def test_terms_without_a_weight_have_no_figures(weights, terms):
    values = look(*build(), weights=weights)
    assert {name.split("/")[1] for name in values if name.startswith("gradient/")} == terms
    others = terms - {"feature"} if "feature" in terms else set()
    cosines = {name.split("-")[-1] for name in values if name.startswith("gradient_cosine/")}
    assert cosines == others
    assert ("gradient_ratio" in values) == bool(others)
    assert "rank/student/mid_block" in values  # the features are looked at in any case


def test_a_second_look_finds_the_same():
    projected, teacher = build()
    diagnostics = Diagnostics(projected, teacher, [probe(4)], schedule=SCHEDULE)
    assert diagnostics(LossWeights()) == diagnostics(LossWeights())


def everything(projected):
    state = {name: value.clone() for name, value in projected.state_dict().items()}
    sums = [value.clone() for name, value in projected.named_buffers() if name.endswith("sums")]
    modes = {name: module.training for name, module in projected.named_modules()}
    return state, sums, modes, torch.get_rng_state()


@pytest.mark.parametrize(("method", "fails"), [("solved", False), ("solved", True), ("linear", False)])
def test_nothing_is_changed_by_looking(method, fails, monkeypatch):
    """Parameters, gradients, statistics, the random state, and which parts train; also when a look breaks off."""
    projected, teacher = build(tiny_unet((8, 16), dropout=0.3, seed=1), method=method)
    projected.train()
    projected.student.mid_block.eval()
    batch = probe(4, seed=5)
    losses = distillation_losses(projected, batch, schedule=SCHEDULE, teacher=teacher)
    losses["total"].backward()
    gradients = {name: p.grad.clone() for name, p in projected.named_parameters() if p.grad is not None}
    before = everything(projected)
    if fails:
        monkeypatch.setattr("vkd_gen.diagnostics.width_floor", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look(projected, teacher)
    else:
        look(projected, teacher)
    for found, expected in zip(everything(projected), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not projected.student.mid_block.training
    found = {name: p.grad for name, p in projected.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, gradients, rtol=0, atol=0)
    assert all(p.requires_grad for p in projected.student.parameters())
    assert not any(p.requires_grad for p in teacher.unet.parameters())


def test_dropout_does_not_reach_the_figures():
    plain, dropping = (build(tiny_unet((8, 16), dropout=dropout, seed=1)) for dropout in (0.0, 0.5))
    dropping[0].load_state_dict(plain[0].state_dict())  # the projectors were started on what was dropped
    assert look(*dropping, [probe(4)]) == look(*plain, [probe(4)])


def test_a_frozen_part_counts_for_nothing():
    projected, teacher = build()
    whole = look(projected, teacher)
    projected.student.down_blocks.requires_grad_(False)
    part = look(projected, teacher)
    for term in ("denoising", "output", "feature"):
        assert 0 < part[f"gradient/{term}"] < whole[f"gradient/{term}"]


def test_class_labels_reach_student_and_teacher():
    unets = [tiny_unet(channels, seed=seed, num_class_embeds=4) for seed, channels in ((1, (8, 16)), (2, (16, 32)))]
    projected, teacher = build(*unets, labels=4)
    found, other = (look(projected, teacher, [probe(4, labels=labels)]) for labels in (4, 1))
    assert found.keys() == other.keys()
    for name in ("gradient/denoising", "gradient_ratio", "rank/student/mid_block", "rank/teacher/mid_block"):
        assert found[name] != pytest.approx(other[name], rel=1e-6)


# ---- errors


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [([], {}, "no batches"), (None, {"num_timestep_bins": 0}, "num_timestep_bins must be at least 1, not 0")],
)
def test_diagnostics_refuses(batches, options, message):
    with pytest.raises(ValueError, match=message):
        look(*build(), batches, **options)


# ---- guidance


def no_class(conditioning):
    return {"class_labels": torch.full_like(conditioning["class_labels"], 4)}


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_guidance_gap_ratio_draw_by_draw(predicts):
    """The teacher predicts noise: v = (noise - sigma * noisy) / alpha, so a gap in v is one in noise / alpha."""
    student, teacher = (tiny_unet(num_class_embeds=5, seed=seed) for seed in (1, 2))
    schedule = Schedule.of(DDPMScheduler(prediction_type=predicts))
    batches = [probe(3, labels=4), probe(2, seed=1, labels=4)]
    alpha = DDPMScheduler().alphas_cumprod.sqrt()
    gaps = {"student": [], "teacher": []}
    for batch in batches:
        for row in range(len(batch["timesteps"])):
            time = batch["timesteps"][row]
            noisy = alpha[time] * batch["sample"][row] + (1 - alpha[time] ** 2).sqrt() * batch["noise"][row]
            for name, unet in (("student", student), ("teacher", teacher)):
                told, not_told = (
                    unet(noisy[None], time, class_labels=torch.tensor([label])).sample.detach()
                    for label in (batch["conditioning"]["class_labels"][row], 4)
                )
                factor = 1 / alpha[time] if (name, predicts) == ("teacher", "v_prediction") else 1
                gaps[name].append((told - not_told).norm().item() * factor)
    expected = np.mean(gaps["student"]) / np.mean(gaps["teacher"])
    projected = ProjectedStudent(student).train()
    found = guidance_gap_ratio(projected, FrozenTeacher(teacher), batches, no_class, schedule)
    assert found == pytest.approx(expected, rel=1e-4)
    assert projected.training
    assert student.training


def test_guidance_gap_ratio_of_a_copy_and_of_a_student_that_does_not_listen():
    teacher, deaf = tiny_unet(num_class_embeds=5, seed=2), tiny_unet(num_class_embeds=5, seed=1)
    torch.nn.init.zeros_(deaf.class_embedding.weight)
    for student, expected in ((tiny_unet(num_class_embeds=5, seed=2), 1), (deaf, 0)):
        frozen = FrozenTeacher(teacher)
        found = guidance_gap_ratio(ProjectedStudent(student), frozen, [probe(labels=4)], no_class, SCHEDULE)
        assert found == pytest.approx(expected, abs=1e-6)


def test_losses_of_both_branches_are_the_mean_of_the_two():
    projected, teacher = build(*(tiny_unet(num_class_embeds=5, seed=seed) for seed in (1, 2)), labels=4)
    projected.eval()
    told = probe(labels=4)
    nothing = no_class(told["conditioning"])
    batches = told, {**told, "conditioning": nothing}, both_branches(told, nothing)
    first, second, found = (
        distillation_losses(projected, batch, schedule=SCHEDULE, teacher=teacher) for batch in batches
    )
    for name, value in found.items():
        assert value.item() == pytest.approx((first[name] + second[name]).item() / 2, rel=1e-5)
