"""The weight of the feature loss over a run: constant, decayed, or after the gradients."""

import math

import pytest

from tests.test_diagnostics import SCHEDULE, build, probe
from vkd_gen import LossWeights, distillation_losses
from vkd_gen.diagnostics import Diagnostics
from vkd_gen.training.feature_weight import LEAST_RATIO, FeatureWeight


class Ratios:
    """Diagnostics that find, for a feature weight of 1, the next of some ratios."""

    def __init__(self, *ratios):
        self.ratios, self.asked = list(ratios), []

    def __call__(self, weights):
        self.asked.append(weights.feature)
        return {"gradient_ratio": self.ratios.pop(0) * weights.feature, "rank": 3.0}


def follow(diagnostics, *, feature=0.5, num_steps=10, every_steps=2, **options):
    return FeatureWeight(
        diagnostics,
        weighting="gradient_ratio",
        weights=LossWeights(denoising=1.0, output=2.0, feature=feature),
        num_steps=num_steps,
        every_steps=every_steps,
        **options,
    )


def constant(diagnostics=None, *, feature=0.5, **options):
    weights = LossWeights(denoising=1.0, output=2.0, feature=feature)
    return FeatureWeight(diagnostics, weights=weights, num_steps=10, **options)


# ---- constant and decayed


def test_constant_weights():
    balance = constant()
    balance.start()
    for step in (0, 5, 10):
        assert balance.weights(step) == LossWeights(denoising=1.0, output=2.0, feature=0.5)
        assert balance.measure(step) == {}


@pytest.mark.parametrize(
    ("decay_start", "decay_end", "shares"),
    [
        (1.0, 1.0, {0: 1, 5: 1, 9: 1, 10: 1}),
        (0.6, 1.0, {0: 1, 5: 1, 6: 1, 7: 0.75, 9: 0.25, 10: 0}),
        (0.0, 1.0, {0: 1, 1: 0.9, 5: 0.5, 10: 0}),
        (0.0, 0.4, {0: 1, 1: 0.75, 3: 0.25, 4: 0, 5: 0, 10: 0}),
        (0.2, 0.6, {0: 1, 2: 1, 4: 0.5, 6: 0, 9: 0}),
    ],
)
@pytest.mark.parametrize("weighting", ["constant", "gradient_ratio"])
def test_decay_known_values(weighting, decay_start, decay_end, shares):
    """Linear from its start on, whatever the weight that it multiplies; the other terms stay."""
    make = constant if weighting == "constant" else follow
    balance = make(Ratios(1.0), decay_start=decay_start, decay_end=decay_end)
    balance.start()
    for step, share in shares.items():
        expected = LossWeights(denoising=1.0, output=2.0, feature=0.5)
        weights = balance.weights(step)
        assert (weights.denoising, weights.output) == (expected.denoising, expected.output)
        assert weights.feature == pytest.approx(0.5 * share)


def test_figures_are_given_when_they_are_due():
    balance = constant(Ratios(*[3.0] * 9), every_steps=4)
    balance.start()  # which a constant weight does not need
    assert [step for step in range(1, 11) if balance.measure(step)] == [4, 8, 10]
    assert balance.measure(4) == {
        "diagnostics/gradient_ratio": 1.5,
        "diagnostics/rank": 3.0,
        "diagnostics/feature_weight": 0.5,
    }


def test_the_last_step_with_features_is_looked_at():
    balance = constant(Ratios(*[3.0] * 9), decay_start=0.0, decay_end=0.65, every_steps=4)
    assert [step for step in range(1, 11) if balance.measure(step)] == [4, 7]
    assert balance.weights(6).feature > 0
    assert balance.weights(7).feature == 0


def test_nothing_is_looked_at_without_a_feature_weight_or_steps_between():
    diagnostics = Ratios()
    assert constant(diagnostics, every_steps=0).measure(10) == {}
    assert constant(diagnostics, feature=0.0, every_steps=1).measure(10) == {}
    assert constant(diagnostics, decay_start=0.5, every_steps=1).measure(11) == {}  # it has fallen to 0
    balance = follow(diagnostics, feature=0.0)
    balance.start()
    assert balance.measure(2) == {}
    assert balance.weights(0).feature == 0
    assert diagnostics.asked == []


# ---- in proportion


def test_the_start_gives_the_ratio_and_looks_move_half_of_the_way():
    """Asked for 0.5: 0.5 / 4 at first; a gradient that doubles, 8 w = 1 for 0.5, takes 1 / sqrt 2 off the weight."""
    diagnostics = Ratios(4.0, 8.0, 8.0)
    balance = follow(diagnostics)
    balance.start()
    assert diagnostics.asked == [1.0]
    assert balance.weights(0).feature == pytest.approx(0.125)
    assert balance.measure(1) == {}
    values = balance.measure(2)
    assert values == pytest.approx(
        {"diagnostics/gradient_ratio": 1.0, "diagnostics/rank": 3.0, "diagnostics/feature_weight": 0.125}
    )  # that of this step
    assert balance.weights(2).feature == pytest.approx(0.125 / math.sqrt(2))
    balance.measure(4)
    assert balance.weights(4).feature == pytest.approx(0.0625 * 2**0.25)  # 0.0625 is where it goes to
    assert balance.weights(4).output == 2.0


def test_a_decayed_weight_is_no_reason_to_move():
    """The ratio is asked for as it were without the decay."""
    balance = follow(Ratios(*[4.0] * 5), decay_start=0.0)
    balance.start()
    for step in (2, 4, 6, 8):
        looked_at = balance.measure(step)["diagnostics/gradient_ratio"]
        assert looked_at == pytest.approx(0.5 * (1 - (step - 1) / 10))  # with the weight that the step was made with
        assert balance.weights(step).feature == pytest.approx(0.125 * (1 - step / 10))


def test_without_looks_the_start_stays():
    balance = follow(Ratios(4.0), every_steps=0)
    balance.start()
    assert [balance.measure(step) for step in range(1, 11)] == [{}] * 10
    assert balance.weights(10).feature == pytest.approx(0.125)


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
def test_a_ratio_that_is_not_finite_leaves_the_weight_alone(ratio):
    """The other terms have no gradient where the student is its teacher; nor has a broken one any to follow."""
    balance = follow(Ratios(ratio, 4.0, ratio, 4.0))
    balance.start()
    assert balance.weights(0).feature == 1
    balance.measure(2)
    moved = balance.weights(2).feature
    assert moved == pytest.approx(math.sqrt(0.125))
    balance.measure(4)
    assert balance.weights(4).feature == moved
    balance.measure(6)
    assert balance.weights(6).feature < moved


def test_a_feature_loss_without_a_gradient_gets_no_weight_beyond_all_bounds():
    balance = follow(Ratios(*[0.0] * 101), num_steps=200)
    balance.start()
    assert balance.weights(0).feature == pytest.approx(0.5 / LEAST_RATIO)
    for step in range(2, 201, 2):
        balance.measure(step)
        assert balance.weights(step).feature <= 0.5 / LEAST_RATIO


@pytest.mark.parametrize("kind", ["mse", "cka"])
@pytest.mark.parametrize("ratio", [0.01, 2.0])
def test_the_ratio_found_at_the_start_is_met_when_it_is_measured(kind, ratio):
    projected, teacher = build()
    diagnostics = Diagnostics(projected, teacher, [probe(4)], schedule=SCHEDULE, feature_loss_kind=kind)
    balance = follow(diagnostics, feature=ratio)
    balance.start()
    assert balance.weights(0).feature != pytest.approx(ratio, rel=0.01)
    assert diagnostics(balance.weights(0))["gradient_ratio"] == pytest.approx(ratio, rel=1e-5)
    losses = distillation_losses(projected.eval(), probe(4), schedule=SCHEDULE, teacher=teacher, feature_loss_kind=kind)
    assert losses["feature"] > 0
    assert balance.measure(2)["diagnostics/gradient_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert diagnostics(balance.weights(2))["gradient_ratio"] == pytest.approx(ratio, rel=1e-5)


# ---- resuming


def test_the_factor_is_saved():
    """A resumed run builds anew, does not start, and loads."""
    balance, again = follow(Ratios(4.0, 8.0)), follow(Ratios())
    balance.start()
    balance.measure(2)
    again.load_state_dict(balance.state_dict())
    assert again.weights(2) == balance.weights(2)
    assert again.weights(2).feature != 0.125


# ---- errors


def test_a_ratio_needs_diagnostics():
    with pytest.raises(ValueError, match="needs diagnostics"):
        follow(None)


def test_a_ratio_needs_another_term():
    with pytest.raises(ValueError, match="denoising or output loss to be in proportion to"):
        FeatureWeight(
            Ratios(),
            weighting="gradient_ratio",
            weights=LossWeights(denoising=0.0, output=0.0),
            num_steps=10,
        )
