"""What a run takes of memory, for each process, found on tensors that have shapes and take none."""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vkd_gen as vkd
from vkd_gen.evaluation.cost import LiveBytes
from vkd_gen.families import family_of
from vkd_gen.loading import WEIGHTS, stored_layout, weight_files
from vkd_gen.losses import prediction_loss
from vkd_gen.provenance import only_warns
from vkd_gen.training.matching import NUM_DIAGNOSTIC_DRAWS, build_matching
from vkd_gen.training.methods import MatchingOptions
from vkd_gen.training.options import TrainingOptions
from vkd_gen.training.quantization import quantized_bytes
from vkd_gen.training.run import Run

NUM_PARTS = 20
"""Of a step, by the gradients that are there: what else is there is at its largest in another part for each batch."""
KEPT_FREE = 0.1
"""Share of the memory that is left to the allocator, the libraries and all that is not counted."""
TOKENS = 77
"""Of a prompt: CLIP's length."""
STATES = {"adamw": 2.0, "adamw8bit": 0.5, "muon": 1.0}
"""What an optimizer keeps, as a multiple of the weights; Muon keeps more for what AdamW moves: biases, outer layers."""
ENCODERS = {
    "stable-diffusion-1": 83_653_863 + 123_060_480,
    "stable-diffusion-2": 83_653_863 + 340_387_840,
    "stable-diffusion-xl": 83_653_863 + 123_060_480 + 694_659_840,
    "dit-xl-2": 83_653_863,
}
"""Parameters of the VAE and the text encoders of well-known teachers."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What the forward and backward pass of a training step take beside what is there all the time, bytes.

    Attributes:
        rows: of the batch.
        activations: what the forward pass keeps for the backward pass, the teacher's features included.
        constant: of these, what does not grow with the rows: the weights in half precision, for autocast.
        peaks: the most that is there in each part of the step, with the gradients that there are by its end.
    """

    rows: int
    activations: int
    constant: int
    peaks: tuple[tuple[int, int], ...]

    def peak(self, rows: int, standing_gradients: int = 0) -> int:
        """The most that is there at once, gradients included, with so many rows.

        Args:
            rows: all but gradients and `constant` grows with them.
            standing_gradients: those of earlier passes, which are there from the start.
        """
        share = rows / self.rows
        return max(
            int(share * grows) + stands + max(gradients, standing_gradients)
            for grows, stands, gradients in self._parts()
        )

    def rows_within(self, available: int, standing_gradients: int = 0) -> int:
        """How many rows have their peak within so many bytes; 0 for none."""
        limits = [
            (available - stands - max(gradients, standing_gradients)) * self.rows // max(1, grows)
            for grows, stands, gradients in self._parts()
        ]
        return max(0, min(limits))

    def _parts(self) -> list[tuple[int, int, int]]:
        """Of each part of the step what grows with the rows, what does not, and gradients."""
        parts = []
        for peak, gradients in self.peaks:
            stands = min(self.constant, peak - gradients)
            parts.append((peak - gradients - stands, stands, gradients))
        return parts


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one process takes all the time, bytes.

    Attributes:
        weights: of the student, its projectors and their statistics.
        gradients: of what trains; with several processes twice, as these keep a copy to exchange.
        optimizer: its state.
        averages: the moving average, where it is on the device of the steps.
        teacher: its weights.
        encoders: VAE and text encoders, where they encode what each step draws.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    teacher: int
    encoders: int = 0

    @property
    def standing(self) -> int:
        """All but the gradients."""
        return self.weights + self.optimizer + self.averages + self.teacher + self.encoders


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
        in_eight_bits: the teacher's linear layers keep their weights so.
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
        in_eight_bits: bool = False,
    ):
        self._in_eight_bits = in_eight_bits
        self._mode, self._device, self._precision = FakeTensorMode(), device, precision
        self._loss, self._weights = matching.feature_loss, matching.weights
        if matching.feature_normalization == "batch_whiten":  # which stops at values that are not there
            matching = replace(matching, feature_normalization="none")
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
            stores: tuple[dict[str, Any], ...] = part._parameters, part._buffers
            for kept in stores:
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
        half = self._precision != torch.float32
        constant = _bytes(self.student) // 2 if half else 0
        return StepMemory(rows=rows, activations=activations, constant=constant, peaks=tuple(peaks))

    def _forward(self, sample: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
        precision = self._precision
        weights, noisy = self._weights, sample + sample
        answer: Tensor | None = None
        features: Mapping[str, Tensor] | None = None
        if weights.output or weights.feature:
            answer, features = self.teacher(noisy, timesteps, conditioning, with_features=weights.feature > 0)
        compared = features if weights.feature else None
        with torch.autocast(self._device.type, dtype=precision, enabled=precision != torch.float32):
            prediction, losses = self.projected(noisy, timesteps, conditioning, compared, self._loss)
        targets = (sample if weights.denoising else None, answer if weights.output else None)
        terms = [prediction_loss(prediction.float(), target) for target in targets if target is not None]
        return torch.stack([*terms, *(value.mean() for value in losses.values())]).sum()

    def memory(self, options: TrainingOptions, num_processes: int) -> Memory:
        """What a process takes all the time."""
        trained = sum(value.nbytes for value in self.projected.parameters() if value.requires_grad)
        averaged = options.ema_max_decay and (options.ema_device == "same" or self._device.type == "cpu")
        return Memory(
            weights=trained + sum(value.nbytes for value in self.projected.buffers()),
            gradients=trained * (2 if num_processes > 1 else 1),
            optimizer=int(STATES[options.optimizer] * trained),
            averages=_bytes(self.student) if averaged else 0,
            teacher=(quantized_bytes if self._in_eight_bits else _bytes)(self.teacher.unet),
        )


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters())


def _of_rows(value: Any, rows: int, name: str) -> Any:
    """An argument of `example` for so many rows, and for prompts of the usual length."""
    if isinstance(value, Mapping):
        return {entry: _of_rows(inner, rows, entry) for entry, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    shape = (TOKENS, value.shape[2]) if name == "encoder_hidden_states" else value.shape[1:]
    return value.new_zeros(rows, *shape)


def encoder_bytes(source: str) -> int:
    """Float32 bytes of a teacher's VAE and text encoders, of a folder's or a known name's; 0 where it has none.

    Args:
        source: as --teacher has it; what lies on the hub is not looked at.
    """
    folder = Path(source)
    if not folder.is_dir():
        return 4 * ENCODERS.get(source, 0)
    layouts = []
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for name in ("model", WEIGHTS):
            with contextlib.suppress(ValueError, OSError):  # a part that is not there, or not in this form
                layouts.append(stored_layout(weight_files(folder / part, name=name)))
    return 4 * sum(math.prod(shape) for layout in layouts for shape, _ in layout.values())


def memory_table(
    rehearsal: Rehearsal,
    options: TrainingOptions,
    matching: MatchingOptions,
    *,
    num_processes: int,
    available: int,
    where: str,
    encoders: int,
    encoders_stay: bool = False,
) -> str:
    """What each process takes, with and without gradient checkpointing, and which batch would fit.

    Args:
        rehearsal: of the run.
        options: of the run.
        matching: of the recipe.
        num_processes: of the run.
        available: bytes for each process.
        where: these are, in words.
        encoders: bytes of VAE and text encoders.
        encoders_stay: they do not leave before the first step.
    """
    memory, branches = rehearsal.memory(options, num_processes), 2 if matching.guidance_branches == "both" else 1
    memory = replace(memory, encoders=encoders if encoders_stay else 0)
    # What several passes sum up in, and what processes exchange, is there from the start.
    trained = memory.gradients // (2 if num_processes > 1 else 1)
    stands = trained if options.gradient_accumulation_steps > 1 else 0
    copies = memory.gradients - trained
    rows, draws = options.train_batch_size * branches, min(options.batch_size_apart, NUM_DIAGNOSTIC_DRAWS)
    terms = sum(weight > 0 for weight in vars(matching.weights).values())
    measures = rehearsal.projected.layer_pairs and matching.diagnostics_every_steps
    columns: list[list[str]] = []
    for checkpointing in (False, True):
        step = rehearsal.step(rows, checkpointing=checkpointing)
        # In float32; each term's gradient in float64, and one as it comes and in one piece.
        kept = (step.activations - step.constant) * (2 if step.constant else 1) * draws * branches // step.rows
        measured = kept + (2 * terms + 2) * trained if measures else 0
        # Averaging takes the difference to the weights, all of it at once.
        ending = memory.gradients + memory.averages
        most = memory.standing + max(step.peak(rows, stands) + copies, ending, measured)
        left = int(available * (1 - KEPT_FREE)) - memory.standing - copies
        fits = step.rows_within(left, stands) // branches if left > max(ending, measured) - copies else 0
        standing = [value for name, value in vars(memory).items() if value or name != "encoders"]
        sizes = [*standing, step.activations, *([measured] if measures else []), most]
        columns.append([*map(_gb, sizes), f"{fits:,}" if fits else "none"])
    names = ["weights", "gradients", f"optimizer ({options.optimizer})", "averages", "teacher"]
    names += ["VAE and text encoders"] * (memory.encoders > 0)
    names += [f"activations, batch of {options.train_batch_size}"]
    names += [f"measurements, {draws} draws (--eval_batch_size)"] if measures else []
    names += ["together, at most", f"largest batch in {_gb(available)} GB {where}"]
    lines = [f"{name:<46}{one:>10}{other:>26}" for name, one, other in zip(names, *columns, strict=True)]
    lines = [f"{'memory of each process':<46}{'GB':>10}{'--gradient_checkpointing':>26}", *lines]
    if encoders and not encoders_stay:
        lines.append(f"{'VAE and text encoders, until all is encoded':<46}{_gb(encoders):>10}")
    return "\n".join(lines)


def show_memory(config: Any, student: ModelMixin, teacher: ModelMixin, pairs: list[vkd.LayerPair], run: Run) -> None:
    """Print the table of a run's memory, of a student recipe's complete configuration and networks without weights."""
    with only_warns("the table of memory", "the rest of the plan is right"):
        num_processes = run.accelerator.num_processes
        available, where = available_bytes(run.device, num_processes)
        how: dict[str, Any] = {"teacher_dtype": run.dtype, "precision": run.dtype, "device": run.device}
        how["in_eight_bits"] = config.start.teacher_quantization is not None
        text = memory_table(
            Rehearsal(student, teacher, pairs, config.matching, **how),
            config.training,
            config.matching,
            num_processes=num_processes,
            available=available,
            where=where,
            encoders=encoder_bytes(run.find(config.teacher)) // (1 if config.data.encoding_precision == "no" else 2),
            encoders_stay=config.data.streaming or not config.data.cache,
        )
        run.print(text)


def available_bytes(device: torch.device, num_processes: int) -> tuple[int, str]:
    """Bytes that each process may take, and in words of what: of a GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, f"of one {torch.cuda.get_device_name(device)}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // num_processes, "of this machine" + f" for each of {num_processes} processes" * (num_processes > 1)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}" if size >= 1e9 else f"{size / 1e9:.4f}"
