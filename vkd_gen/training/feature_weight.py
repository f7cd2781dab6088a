"""The weight of the feature loss: a constant, or what keeps its gradient in proportion to the others'."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed

import vkd_gen as vkd
from vkd_gen.diagnostics import Diagnostics
from vkd_gen.training.methods import FeatureWeighting

NUM_MEASUREMENTS = 10
"""Looks while features have a weight, at least, and so points of every line in the figure of a run."""
LEAST_STEPS_BETWEEN = 5
"""Of these, as a measurement takes as long as a few steps."""
LEAST_RATIO = 1e-9
"""The weight grows no larger than for a feature loss of weight 1 whose gradient is so small beside the others'."""


class FeatureWeight:
    """Weights of the loss at every step, with figures of what the feature loss does now and then.

    With `gradient_ratio` the feature weight is a ratio: that of the norm of the feature loss' gradient over the
    student's weights to that of the other terms' together, on the probe of the diagnostics. The factor that gives it is
    found before the first step and moved half of the way, in the logarithm, every `every_steps`. A ratio that is not
    finite, as where the other terms have no gradient, leaves it as it is. The factor is equal on every process and the
    state of this object, to be registered for checkpointing.

    Args:
        diagnostics: None measures nothing; then the weighting must be constant.
        weighting: see above.
        weights: at the start of the run; `feature` is the constant weight or the ratio.
        decay_start: share of the run after which the feature weight falls linearly.
        decay_end: share of the run after which it is 0, and features are neither captured nor compared.
        num_steps: of the run.
        every_steps: steps between two moves of the factor, each measured; so is the last step with features.
            Further measurements in between, which move nothing, show what a short run does. 0: at the start only.

    Raises:
        ValueError: for weights that are none, or a gradient ratio without diagnostics.
    """

    def __init__(
        self,
        diagnostics: Diagnostics | None,
        *,
        weighting: FeatureWeighting = "constant",
        weights: vkd.LossWeights,
        decay_start: float = 1.0,
        decay_end: float = 1.0,
        num_steps: int,
        every_steps: int = 200,
    ):
        self._follows = weighting == "gradient_ratio" and weights.feature > 0
        if self._follows and (diagnostics is None or not weights.denoising + weights.output):
            raise ValueError("a gradient ratio needs diagnostics, and denoising or output loss to be in proportion to")
        self._diagnostics, self._weights = diagnostics, weights
        self._decay_start, self._decay_end = decay_start, decay_end
        self._num_steps, self._every_steps = num_steps, every_steps
        self._last = math.ceil(decay_end * num_steps)  # step that features have a weight in
        self._shown_every_steps = min(every_steps, max(LEAST_STEPS_BETWEEN, self._last // NUM_MEASUREMENTS))
        self._scale = 1.0 if self._follows else weights.feature

    def weights(self, step: int) -> vkd.LossWeights:
        """The weights of the terms after so many steps."""
        return replace(self._weights, feature=self._scale * self._decay(step))

    def state_dict(self) -> dict[str, float]:
        """What a resumed run goes on with."""
        return {"scale": self._scale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """What `state_dict` gave."""
        self._scale = state["scale"]

    def start(self) -> None:
        """Before the first step: find the factor, so that the proportion is right from there on."""
        if self._follows:
            assert self._diagnostics is not None
            ratio = self._diagnostics(replace(self._weights, feature=1.0))["gradient_ratio"]
            self._move(1.0, ratio, exponent=1.0)

    def measure(self, step: int) -> Mapping[str, float]:
        """After a step: the figures, when they are due, and maybe the factor moved; else nothing."""
        if self._diagnostics is None or not self._every_steps:
            return {}
        moves = step % self._every_steps == 0 or step == self._last
        weights = self.weights(step - 1)  # which the step was made with
        if not (moves or step % self._shown_every_steps == 0) or not weights.feature:
            return {}
        values = self._diagnostics(weights)
        if self._follows and moves:
            self._move(self._scale, values["gradient_ratio"] / self._decay(step - 1), exponent=0.5)
        return {f"diagnostics/{name}": value for name, value in {**values, "feature_weight": weights.feature}.items()}

    def _decay(self, step: int) -> float:
        share = step / self._num_steps
        if share <= self._decay_start:
            return 1.0
        return max(0.0, (self._decay_end - share) / (self._decay_end - self._decay_start))

    def _move(self, scale: float, ratio: float, *, exponent: float) -> None:
        """From a factor and the ratio found with it to the factor that gives the ratio asked for."""
        if not math.isfinite(ratio):
            return
        wanted = self._weights.feature
        found = [min(scale * (wanted / max(ratio, LEAST_RATIO)) ** exponent, wanted / LEAST_RATIO)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(found, 0)  # unlike devices may round the same gradients differently
        self._scale = found[0]
