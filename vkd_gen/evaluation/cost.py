"""What a UNet costs."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vkd_gen.families import copy_without_weights, family_of, run_without_weights
from vkd_gen.models import Model


def count_parameters(unet: ModelMixin) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in unet.parameters())


def count_macs(unet: ModelMixin) -> int:
    """Multiply-accumulates of one forward pass on one sample, in convolutions, matrix products and attention.

    Counted on a copy without weights: nothing is computed. torch's counter counts two operations per accumulate.

    Raises:
        ValueError: if the sample size does not fit the number of stages.
    """
    copy = copy_without_weights(unet)
    with FlopCounterMode(display=False) as counter:
        run_without_weights(copy)
    return counter.get_total_flops() // 2


def milliseconds_per_image(
    models: Mapping[str, Model],
    *,
    num_images: int = 32,
    num_inference_steps: int = 50,
    repeats: int = 3,
) -> dict[str, float]:
    """Time to sample an image with each of several models, taken in turns: compare the figures of one call only.

    A tenth of the steps is timed and scaled up: each step costs the same. Of models of prompts a fifth is timed too:
    the difference is what steps cost; the rest, encoding and decoding, is paid once.

    The fastest of the repeats counts, each of `num_images` at a time.
    """
    tenth = max(1, num_inference_steps // 10)
    counts = {name: [tenth, 2 * tenth] if model.takes_prompts else [tenth] for name, model in models.items()}
    best = {(name, steps): float("inf") for name in models for steps in counts[name]}
    for turn in range(repeats + 1):  # the first turn is not counted: allocations, choices of algorithms
        for name, model in models.items():
            for steps in counts[name]:
                start = time.perf_counter()
                # The images end on the CPU, so the device is done.
                model.images(range(num_images), num_inference_steps=steps, batch_size=num_images)
                seconds = time.perf_counter() - start
                best[name, steps] = min(best[name, steps], seconds) if turn else best[name, steps]
    times = {}
    for name in models:
        first, last = best[name, tenth], best[name, counts[name][-1]]
        once = max(0.0, 2 * first - last) if len(counts[name]) > 1 else 0.0
        times[name] = (once + (first - once) * num_inference_steps / tenth) / num_images * 1000
    return times


def forward_costs(
    unets: Mapping[str, ModelMixin], *, batch_size: int = 1, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Time and memory of a forward pass of each of several UNets, on their device, taken in turns.

    Returns:
        Name -> `ms_per_image_and_step`, the fastest of the repeats; `peak_memory_bytes`, weights and activations: on a
        GPU what was allocated at most, else all tensors alive at once (what an operation uses inside is not seen).
    """
    inputs = {name: _inputs(unet, batch_size) for name, unet in unets.items()}
    costs = {name: {"ms_per_image_and_step": float("inf")} for name in unets}
    for turn in range(repeats + 1):  # the first turn is not counted: allocations, choices of algorithms
        for name, unet in unets.items():
            milliseconds = _timed(unet, inputs[name]) / batch_size
            if turn:
                costs[name]["ms_per_image_and_step"] = min(costs[name]["ms_per_image_and_step"], milliseconds)
    for name, unet in unets.items():
        costs[name]["peak_memory_bytes"] = _peak_memory(unet, inputs[name])
    return costs


def _inputs(unet: ModelMixin, batch_size: int) -> dict[str, Any]:
    def enlarged(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: enlarged(part) for name, part in value.items()}
        return value.expand(batch_size, *value.shape[1:]).contiguous().to(unet.device)

    return {name: enlarged(value) for name, value in family_of(unet).example(unet).items()}


@torch.no_grad()
def _timed(unet: ModelMixin, inputs: dict[str, Any]) -> float:
    synchronize = torch.cuda.synchronize if unet.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    family_of(unet).run(unet, inputs)
    synchronize()
    return (time.perf_counter() - start) * 1000


@torch.no_grad()
def _peak_memory(unet: ModelMixin, inputs: dict[str, Any]) -> int:
    weights = sum(value.numel() * value.element_size() for value in (*unet.parameters(), *unet.buffers()))
    if unet.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        family_of(unet).run(unet, inputs)
        return weights + torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        family_of(unet).run(unet, inputs)
    return weights + live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside the context make and that are alive at the same time.

    >>> with LiveBytes() as live:
    ...     x = torch.zeros(1000)
    ...     y = x + 1
    >>> live.peak, live.alive
    (8000, 8000)

    Attributes:
        peak: bytes that were alive at most after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # and some that died since the last look
        self._bytes = 0

    @property
    def alive(self) -> int:
        """Bytes that are alive now."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self._bytes = sum(size for _, size in self._alive.values())
        return self._bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what is alive after it."""
        known = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in known:
                storage = value.untyped_storage()
                self._bytes += storage.nbytes() - self._alive.get(storage._cdata, (None, 0))[1]
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._bytes > self.peak:  # perhaps: what died in the meantime is in it
            self.peak = max(self.peak, self.alive)
        return result
