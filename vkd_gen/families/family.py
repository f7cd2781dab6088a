"""What differs between the architectures of denoisers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from vkd_gen.reductions import Reduction


@dataclass(frozen=True)
class Stage:
    """A part of a denoiser whose output may be paired with another denoiser's.

    Attributes:
        layer: name of its module.
        part: `down_blocks`, `mid_block` or `up_blocks`; a stage is paired with one of the same part.
        works_at: layer whose feature has the resolution that the stage works at; None where the part alone tells it.
        self_attention: names of its self-attention layers, in the order they run.
        last_layer: layer that BK-SDM reads of a stage in place of its output, where only the teacher's stage resamples:
            the output projection of the last attention, else the last layer before it would resample.
    """

    layer: str
    part: str
    works_at: str | None
    self_attention: tuple[str, ...]
    last_layer: str


@dataclass(frozen=True)
class Family:
    """The functions that differ between architectures; `family_of` gives a network its own.

    Attributes:
        call: (network, noisy sample, its time, conditioning) -> the prediction alone. The network may be in a wrapper;
            the conditioning holds further arguments by name.
        feature: (module, its output) -> the feature, `[B, C, H, W]` or `[B, N, C]`, of a module with several outputs.
        stages: network -> its stages, in the order they run.
        example: network -> arguments by name for one forward pass, batch size 1, on the default device; a ValueError
            for a network whose inputs are not known.
        reduce: (configuration, reduction) -> the configuration of a smaller network, complete.
        inherit: (student, teacher, ...) -> the student started from the teacher's weights; see `inherit_weights`.
    """

    call: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any] | None], Tensor]
    feature: Callable[[nn.Module, Any], Tensor]
    stages: Callable[[ModelMixin], list[Stage]]
    example: Callable[[ModelMixin], dict[str, Any]]
    reduce: Callable[[Mapping[str, Any], Reduction], dict[str, Any]]
    inherit: Callable[..., Any]


def unknown(model: Any) -> str:
    """What is said of a model of no known family."""
    advice = "; pass its `.unet`" if isinstance(getattr(model, "unet", None), nn.Module) else ""
    return f"a {type(model).__name__} is neither a UNet2DModel nor a UNet2DConditionModel{advice}"
