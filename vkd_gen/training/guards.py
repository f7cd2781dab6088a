"""What goes wrong in the numbers, by name: which loss, which layer, which timesteps, which projector."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vkd_gen.distillation import ProjectedStudent
from vkd_gen.projectors import LearnedProjector, SolvedProjector, orthonormality_error

MOST_ORTHONORMALITY_ERROR = 1e-3
"""Solved and learned maps are off by about 1e-6."""
LEAST_VARIANCE = 1e-12
"""Of a layer's features, below which a projector has nothing to match."""


class Watch:
    """Names what is not finite in a step that is skipped.

    Watching layers costs a wait for the device after each of them: it is for the steps after a skipped one. The layers
    of a compiled model are not watched.

    Args:
        model: what trains.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._first_layer: str | None = None
        self._hooks: list[Any] = []

    def start(self) -> None:
        """From the next forward pass on look at the output of every layer."""
        if not self._hooks:
            layers = [(name, module) for name, module in self._model.named_modules() if not list(module.children())]
            self._hooks = [module.register_forward_hook(self._looks_at(name)) for name, module in layers]

    def stop(self) -> None:
        """Look at layers no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._first_layer = [], None

    def _looks_at(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            outputs = output if isinstance(output, tuple) else (output,)
            if self._first_layer is None and not _are_finite(value for value in outputs if isinstance(value, Tensor)):
                self._first_layer = name

        return look

    def describe(self, losses: Mapping[str, Tensor], timesteps: Sequence[Tensor]) -> str:
        """What is not finite, in words.

        Args:
            losses: scalars by name.
            timesteps: of the step's forward passes, `[B]` each.
        """
        terms = [name for name, value in losses.items() if not value.isfinite()]
        parameters = dict(self._model.named_parameters())
        weights = [name for name, value in parameters.items() if not value.isfinite().all()]
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        broken = [name for name, gradient in gradients.items() if not _are_finite([gradient])]
        words = [f"not finite are the losses {', '.join(terms)}" if terms else "all losses are finite"]
        if self._first_layer is not None:
            words.append(f"the first layer with such an output is {self._first_layer}")
        if weights:
            words.append(f"{len(weights)} weights are not finite, such as {weights[0]}")
        if broken:
            words.append(f"{len(broken)} of {len(gradients)} gradients are not finite, such as {broken[0]}")
        drawn = torch.cat(list(timesteps)).tolist() if timesteps else []
        shown = " ".join(map(str, sorted(drawn)[:8])) + (f" ... {max(drawn)}" if len(drawn) > 8 else "")
        return ", ".join([*words, f"at timesteps {shown}"])


def check_state(model: nn.Module, parameters: Sequence[Tensor]) -> str | None:
    """What makes the state that training is in worthless, in words; None for a sound one.

    Args:
        model: what trains; the projectors of a `ProjectedStudent` are looked at too.
        parameters: of the optimizer.
    """
    if not _are_finite(parameters):
        names = [name for name, value in model.named_parameters() if not value.isfinite().all()]
        return f"{len(names)} weights are not finite, such as {names[0]}"
    if isinstance(model, ProjectedStudent):
        for pair, projector in zip(model.layer_pairs, model.projectors, strict=True):
            if isinstance(projector, SolvedProjector | LearnedProjector):
                fault = projector_fault(projector)
                if fault is not None:
                    return f"the projector from {pair.student} to {pair.teacher} {fault}"
    return None


@torch.no_grad()
def projector_fault(projector: SolvedProjector | LearnedProjector) -> str | None:
    """What makes a projector useless, in words; None for a sound one."""
    statistics = projector.statistics
    error = orthonormality_error(projector.matrix())
    if not error <= MOST_ORTHONORMALITY_ERROR:
        return f"has collapsed: its rows are {error:.1g} from orthonormal"
    named = {"gain": projector.gain, **dict(statistics.named_buffers())}
    broken = [name for name, value in named.items() if not value.isfinite().all()]
    if broken:
        return f"has a {broken[0]} that is not finite"
    if isinstance(projector, LearnedProjector) or statistics.num_merges == 0:
        return None
    for name, variance in (("student", statistics.student_variance), ("teacher", statistics.target_variance)):
        if variance <= LEAST_VARIANCE:
            return f"has a degenerate covariance: the {name}'s features do not vary (variance {float(variance):.1g})"
    return None


@torch.no_grad()
def _are_finite(values: Iterable[Tensor]) -> bool:
    tensors = [value.detach() for value in values if value.is_floating_point() and value.numel()]
    return not tensors or bool(torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all())
