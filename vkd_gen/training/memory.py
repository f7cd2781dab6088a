"""What a run takes of memory, for each process, found on tensors that have shapes and take none."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vkd_gen as vkd
from vkd_gen.evaluation.cost import LiveBytes
from vkd_gen.families import family_of
from vkd_gen.loading import read_json
from vkd_gen.losses import prediction_loss
from vkd_gen.training.matching import NUM_DIAGNOSTIC_DRAWS, build_matching
from vkd_gen.training.methods import MatchingOptions
from vkd_gen.training.options import TrainingOptions

NUM_PARTS = 20
"""Of a step, by the gradients that are there: what else is there is at its largest in another part for each batch."""
KEPT_FREE = 0.1
"""Share of the memory that is left to the allocator, the libraries and all that is not counted."""
TOKENS = 77
"""Of a prompt: CLIP's length."""
ENCODERS = {
    "stable-diffusion-1": 83_653_863 + 123_060_480,
    "stable-diffusion-2": 83_653_863 + 340_387_840,
    "stable-diffusion-xl": 83_653_863 + 123_060_480 + 694_659_840,
}
"""Parameters of the VAE and the text encoders of well-known teachers."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What the forward and backward pass of a training step take beside what is there all the time, bytes.

    Attributes:
        rows: of the batch.
        activations: what the forward pass keeps for the backward pass, the teacher's features included.
        peaks: the most that is there in each part of the step, with the gradients that there are by its end.
    """

    rows: int
    activations: int
    peaks: tuple[tuple[int, int], ...]

    def peak(self, rows: int, standing_gradients: int = 0) -> int:
        """The most that is there at once, gradients included, with so many rows.

        Args:
            rows: all but gradients grows with them.
            standing_gradients: those of earlier passes, which are there from the start.
        """
        share = rows / self.rows
        return max(int(share * (peak - gradients)) + max(gradients, standing_gradients) for peak, gradients in self.peaks)

    def rows_within(self, available: int, standing_gradients: int = 0) -> int:
        """How many rows have their peak within so many bytes; 0 for none."""
        limits = []
        for peak, gradients in self.peaks:
            left = available - max(gradients, standing_gradients)
            limits.append(left * self.rows // max(1, peak - gradients))
        return max(0, min(limits))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one process takes all the time, bytes.

    Attributes:
        weights: of the student, its projectors and their statistics.
        gradients: of what trains; with several processes twice, as these keep a copy to exchange.
        optimizer: its state.
        averages: the moving average, where it is on the device of the steps.
        teacher: its weights.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    teacher: int

    @property
    def standing(self) -> int:
        """All but the gradients."""
        return self.weights + self.optimizer + self.averages + self.teacher


class Rehearsal:
    """Training steps of a student without memory: every operation is gone through, nothing is computed.

    Args:
        student: of any device; may be without weights.
        teacher: likewise.
        pairs: of layers, may be empty.
        matching: of the recipe.
        teacher_dtype: of the teacher's weights and predictions.
        precision: of the student's forward passes, by autocast; float32 for none.
        device: that is trained on; it decides which kernels of attention are used.
    """

    def __init__(
        self,
        student: ModelMixin,
        teacher: ModelMixin,
        pairs: list[vkd.LayerPair],
        matching: MatchingOptions,
        *,
        teacher_dtype: torch.dtype,
        precision: torch.dtype,
        device: torch.device,
    ):
        self._mode, self._device, self._precision = FakeTensorMode(), device, precision
        self._loss, self._weights = matching.feature_loss, matching.weights
        built = [build_matching(matching, pair) for pair in pairs]  # small, and checked by their values
        for projector, normalizer in built:
            normalizer.is_filled = True  # as far as shapes go
            self._without_memory(projector)
            self._without_memory(normalizer)
        self.student = self._copy(student, torch.float32)
        self.projected = vkd.ProjectedStudent(self.student, pairs, *(zip(*built, strict=True) if built else ())).train()
        self.teacher = vkd.FrozenTeacher(self._copy(teacher, teacher_dtype), [pair.teacher for pair in pairs])

    def _copy(self, model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
        default = torch.get_default_dtype()
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        try:
            torch.set_default_dtype(dtype)
            with self._mode, torch.device(self._device):
                return type(model).from_config(config)
        finally:
            torch.set_default_dtype(default)

    def _without_memory(self, module: nn.Module) -> None:
        for part in module.modules():
            for kept in (part._parameters, part._buffers):
                for name, value in kept.items():
                    if value is not None:
                        fake = self._mode.from_tensor(value.detach()).to(self._device)
                        is_parameter = isinstance(value, nn.Parameter)
                        kept[name] = nn.Parameter(fake, requires_grad=value.requires_grad) if is_parameter else fake

    def step(self, rows: int, *, checkpointing: bool) -> StepMemory:
        """The forward and backward pass of a step with so many rows.

        Args:
            rows: of the batch.
            checkpointing: see `TrainingOptions.gradient_checkpointing`.
        """
        (self.student.enable_gradient_checkpointing if checkpointing else self.student.disable_gradient_checkpointing)()
        parameters = [value for value in self.projected.parameters() if value.requires_grad]
        part = sum(value.nbytes for value in parameters) // NUM_PARTS
        peaks, gradients = [], 0

        def end_part(_: Any = None) -> None:
            peaks.append((live.peak, gradients))
            live.peak = live.alive

        def note(parameter: Tensor) -> None:
            nonlocal gradients
            gradients += parameter.nbytes
            if gradients - (peaks[-1][1] if peaks else 0) > part:
                end_part()

        handles = [value.register_post_accumulate_grad_hook(note) for value in parameters]
        with self._mode, torch.device(self._device):
            example = family_of(self.student).example(self.student)
            inputs = {name: _of_rows(value, rows, name) for name, value in example.items()}
            sample, timesteps = inputs.pop("sample"), inputs.pop("timestep")
            with LiveBytes() as live:
                loss = self._forward(sample, timesteps, inputs)
                activations = live.alive
                loss.backward()
            end_part()
        for handle in handles:
            handle.remove()
        self.projected.zero_grad(set_to_none=True)
        return StepMemory(rows=rows, activations=activations, peaks=tuple(peaks))

    def _forward(self, sample: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
        precision = self._precision
        weights, noisy, answer, features = self._weights, sample + sample, None, None
        if weights.output or weights.feature:
            answer, features = self.teacher(noisy, timesteps, conditioning, with_features=weights.feature > 0)
        compared = features if weights.feature else None
        with torch.autocast(self._device.type, dtype=precision, enabled=precision != torch.float32):
            prediction, losses = self.projected(noisy, timesteps, conditioning, compared, self._loss)
        targets = [sample] * bool(weights.denoising) + [answer] * bool(weights.output)
        terms = [prediction_loss(prediction.float(), target) for target in targets]
        return torch.stack([*terms, *(value.mean() for value in losses.values())]).sum()


    def memory(self, options: TrainingOptions, num_processes: int) -> Memory:
        """What a process takes all the time."""
        trained = sum(value.nbytes for value in self.projected.parameters() if value.requires_grad)
        student = sum(value.nbytes for value in self.student.parameters())
        return Memory(
            weights=trained + sum(value.nbytes for value in self.projected.buffers()),
            gradients=trained * (2 if num_processes > 1 else 1),
            optimizer=2 * trained,
            averages=student if options.ema_max_decay else 0,
            teacher=sum(value.nbytes for value in self.teacher.unet.parameters()),
        )


def _of_rows(value: Any, rows: int, name: str) -> Any:
    """An argument of `example` for so many rows, and for prompts of the usual length."""
    if isinstance(value, Mapping):
        return {entry: _of_rows(inner, rows, entry) for entry, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    shape = (TOKENS, value.shape[2]) if name == "encoder_hidden_states" else value.shape[1:]
    return value.new_zeros(rows, *shape)
