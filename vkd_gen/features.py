"""Read the outputs of named blocks of a network.

A layer is named as the network names its submodules, such as `down_blocks.1`; `down_blocks.1/2` is its output averaged
over squares of 2 x 2 positions. B batch, C channels, H height, W width, N positions (H*W, or tokens).
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Names like `name`, best first, as a phrase for an error message; for typing mistakes."""
    known = [candidate for candidate in known if candidate]
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    return ", ".join(repr(match) for match in matches or known[:count])


def split_pooling(layer: str) -> tuple[str, int]:
    """A layer's submodule and the side of the squares its output is averaged over, 1 for the output as it is.

    Example:
        >>> split_pooling("mid_block/4"), split_pooling("mid_block")
        (('mid_block', 4), ('mid_block', 1))
    """
    name, slash, side = layer.partition("/")
    if slash and not (side.isdecimal() and int(side) >= 2):
        raise ValueError(f"{layer!r} cannot be pooled by {side!r}; name a whole number of 2 or more, as in {name}/2")
    return name, int(side) if slash else 1


def check_layers(module: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    """The layers as a tuple; a ValueError with the nearest known names for one that is unknown or repeated."""
    layers = tuple(layers)
    known = dict(module.named_modules())
    for layer in layers:
        name, _ = split_pooling(layer)
        if not name or name not in known:
            raise ValueError(
                f"{type(module).__name__} has no layer {name!r}; the nearest are {nearest_names(name, known)}"
            )
    if len(set(layers)) < len(layers):
        raise ValueError(f"a layer is named twice in {', '.join(layers)}")
    return layers


def bare(model: Any) -> Any:
    """The model itself; a ValueError for one in DataParallel, torch.compile and others that change its names."""
    for attribute in ("module", "_orig_mod"):
        if isinstance(getattr(model, attribute, None), nn.Module):
            raise ValueError(
                f"the model is in a {type(model).__name__}; pass the bare one, its `.{attribute}`, and wrap afterwards"
            )
    return model


def first_output(_module: nn.Module, output: Any) -> Tensor:
    """A module's output, of several the first: down blocks return (hidden states, skip states)."""
    return output[0] if isinstance(output, tuple) else output


class FeatureCapture:
    """Record the outputs of named submodules between `start` and `stop`, through forward hooks.

    The forward passes that gradient checkpointing repeats during backward are so not recorded. Attach it to the bare
    model, before any DDP or compile wrapper, which then traces the hooks too.

    Args:
        module: the model to read from.
        layers: dotted submodule names, such as `mid_block` or `up_blocks.0.resnets.1`; `mid_block/2` is its output
            average-pooled by 2 in height and width.
        feature: (module, its output) -> the feature, as a `Family` has it; by default right for diffusers' UNets.

    Raises:
        ValueError: for an unknown or repeated layer name, and a model in a wrapper.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> capture = FeatureCapture(model, ["0"])
        >>> capture.start()
        >>> _ = model(torch.zeros(1, 2))
        >>> capture.stop()["0"].shape
        torch.Size([1, 3])
    """

    def __init__(
        self, module: nn.Module, layers: Iterable[str], feature: Callable[[nn.Module, Any], Tensor] = first_output
    ):
        self.layers = check_layers(bare(module), layers)
        self._feature = feature
        self._pooling = {layer: split_pooling(layer) for layer in self.layers}
        self._features: dict[str, Tensor] = {}
        self._recording = False
        # Partials of a method, not closures: a deep copy of the model and its capture then belong together.
        self._handles = [
            module.get_submodule(name).register_forward_hook(functools.partial(self._record, layer))
            for layer, (name, _) in self._pooling.items()
        ]

    def _record(self, layer: str, module: nn.Module, _inputs: tuple, output: Any) -> None:
        if self._recording:
            self._features[layer] = self._feature(module, output)

    def start(self) -> None:
        """Record from now on."""
        self._features = {}
        self._recording = True

    def stop(self) -> dict[str, Tensor]:
        """Stop recording and hand over the features: layer -> `[B, C, H, W]` or `[B, N, C]`, part of the graph.

        Raises:
            RuntimeError: if a layer did not run since `start`.
        """
        features, self._features, self._recording = self._features, {}, False
        missing = [layer for layer in self.layers if layer not in features]
        if missing:
            raise RuntimeError(f"these layers did not run in the forward pass: {', '.join(missing)}")
        # Pooled here, not in the hook: what a hook adds inside a checkpointed block is not there when it runs again.
        return {layer: pool(features[layer], side) for layer, (_, side) in self._pooling.items()}

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def pool(feature: Tensor, side: int) -> Tensor:
    """Average a feature over squares of `side` x `side` positions: `[B, C, H, W]`, or `[B, N, C]` of square maps."""
    if side == 1:
        return feature
    shape = list(feature.shape)
    if feature.ndim == 4 and shape[2] % side == shape[3] % side == 0:
        return F.avg_pool2d(feature, side)
    length = math.isqrt(shape[1]) if feature.ndim == 3 else 0
    if length and length**2 == shape[1] and length % side == 0:
        maps = feature.transpose(1, 2).unflatten(2, (length, length))
        return F.avg_pool2d(maps, side).flatten(2).transpose(1, 2)
    raise ValueError(f"a feature of shape {shape} cannot be averaged over squares of {side} x {side} positions")


def to_rows(feature: Tensor) -> Float[Tensor, "batch positions channels"]:
    """View a feature as rows of channels: `[B, C, H, W]` -> `[B, H*W, C]`; `[B, N, C]` and `[B, C]` likewise."""
    match feature.ndim:
        case 4:
            return feature.flatten(2).transpose(1, 2)
        case 3:
            return feature
        case 2:
            return feature.unsqueeze(1)
    raise ValueError(f"a feature has shape [B, C, H, W], [B, N, C] or [B, C], not {list(feature.shape)}")
