"""What differs between the architectures of denoisers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from vkd_gen.reductions import Reduction


@dataclass(frozen=True)
class Stage:
    """A part of a denoiser whose output may be paired with another denoiser's.

    Attributes:
        layer: name of its module.
        part: `down_blocks`, `mid_block` or `up_blocks`, a stage being paired with one of the same part; a
            transformer's `transformer_blocks`.
        works_at: layer whose feature has the resolution that the stage works at; None where the part alone tells it.
        self_attention: names of its self-attention layers, in the order they run.
        last_layer: layer that BK-SDM reads of a stage in place of its output, where only the teacher's stage resamples:
            the output projection of the last attention, else the last layer before it would resample.
        depth: of a block of a transformer: share of all blocks that have run when it has, by which it is paired.
    """

    layer: str
    part: str
    works_at: str | None
    self_attention: tuple[str, ...]
    last_layer: str
    depth: float | None = None


@dataclass(frozen=True)
class Family:
    """The functions that differ between architectures; `family_of` gives a network its own.

    Attributes:
        call: (network, noisy sample, its time, conditioning) -> the prediction alone. The network may be in a wrapper;
            the conditioning holds further arguments by name.
        feature: (module, its output) -> the feature, `[B, C, H, W]` or `[B, N, C]`, of a module with several outputs.
        stages: network -> its stages, in the order they run.
        example: network -> `sample`, `timestep` and the conditioning by name for one call, batch size 1, on the
            default device; a ValueError for a network whose inputs are not known.
        prepare: network -> None, before it trains: what it draws at random by itself is put off.
        reduce: (configuration, reduction) -> the configuration of a smaller network, complete.
        inherit: (student, teacher, ...) -> the student started from the teacher's weights; see `inherit_weights`.
        best_layers: (student, teacher, batches, schedule) -> a value for `layers` of `inherit`; see `best_layers`.
        smaller: (configuration, what is said of the reduction) -> the reduction, completed to half of the teacher.
    """

    call: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any] | None], Tensor]
    feature: Callable[[nn.Module, Any], Tensor]
    stages: Callable[[ModelMixin], list[Stage]]
    example: Callable[[ModelMixin], dict[str, Any]]
    reduce: Callable[[Mapping[str, Any], Reduction], dict[str, Any]]
    inherit: Callable[..., Any]
    best_layers: Callable[..., dict[str, tuple[int, ...]]]
    smaller: Callable[[Mapping[str, Any], Mapping[str, Any]], Reduction]
    prepare: Callable[[nn.Module], None] = lambda _network: None

    def run(self, network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """One call with what `example` gives."""
        conditioning = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
        return self.call(network, inputs["sample"], inputs["timestep"], conditioning)


def unknown(model: Any) -> str:
    """What is said of a model of no known family."""
    slots = [slot for slot in ("unet", "transformer") if isinstance(getattr(model, slot, None), nn.Module)]
    advice = f"; pass its `.{slots[0]}`" if slots else ""
    name = type(model).__name__
    return f"a {name} is neither a UNet2DModel nor a UNet2DConditionModel nor a DiTTransformer2DModel{advice}"


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of a (nested) mapping in another precision; all else as it is."""
    if isinstance(value, Mapping):
        # Half precision cannot hold SDXL's sizes in pixels, which the network embeds as float32.
        return {name: entry if name == "time_ids" else cast(entry, dtype) for name, entry in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
