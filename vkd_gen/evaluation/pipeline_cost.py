"""What each part of a text-to-image pipeline costs."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vkd_gen.models import Model

PARTS = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "unet": "UNet",
    "transformer": "transformer",
    "vae": "VAE decoder",
}
"""Parts of a pipeline that compute, and their names in tables."""
WHOLE = "whole pipeline"


def pipeline_costs(
    models: Mapping[str, Model],
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    repeats: int = 3,
) -> dict[str, dict[str, dict[str, int | float]]]:
    """Parameters and times of the parts of text pipelines, as they make images of prompts, all at once and in turns.

    Args:
        models: of prompts, by name, on their device.
        prompts: a batch of them.
        num_inference_steps: of the sampler.
        guidance_scale: with guidance the denoiser sees each image twice; None keeps the pipelines' default.
        repeats: of which the fastest counts; one more goes before them.

    Returns:
        Name -> part -> `parameters`, `calls` per batch, `ms_per_call`, `ms_per_image`; and the same, without calls, of
        `WHOLE`, which holds the sampler and all else too.
    """
    best: dict[str, dict[str, Any]] = {}
    for turn in range(repeats + 1):  # the first turn is not counted: allocations, choices of algorithms
        for name, model in models.items():
            parts = timed_parts(model)
            with _timed(parts, model.network.device) as times:
                start = time.perf_counter()
                model.images(
                    range(len(prompts)),
                    conditioning={"prompt": prompts},
                    guidance_scale=guidance_scale,
                    num_inference_steps=num_inference_steps,
                    batch_size=len(prompts),
                )
                seconds = time.perf_counter() - start  # the images end on the CPU, so the device is done
            if turn and (name not in best or seconds < best[name]["seconds"]):
                best[name] = {"seconds": seconds, "times": times}
    costs: dict[str, dict[str, dict[str, int | float]]] = {}
    for name, model in models.items():
        costs[name] = {}
        for part, module in timed_parts(model).items():
            calls = best[name]["times"][part]
            milliseconds = 1000 * sum(calls)
            costs[name][part] = {
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
                "calls": len(calls),
                "ms_per_call": milliseconds / len(calls),
                "ms_per_image": milliseconds / len(prompts),
            }
        whole = sum(int(row["parameters"]) for row in costs[name].values())
        costs[name][WHOLE] = {"parameters": whole, "ms_per_image": 1000 * best[name]["seconds"] / len(prompts)}
    return costs


def timed_parts(model: Model) -> dict[str, nn.Module]:
    """The modules of a pipeline that make an image, by their names in tables; of the VAE its decoder."""
    found = {words: getattr(model.pipeline, part, None) for part, words in PARTS.items()}
    return {
        words: module.decoder if words == PARTS["vae"] else module
        for words, module in found.items()
        if module is not None
    }


@contextlib.contextmanager
def _timed(parts: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Seconds of each call of modules, for as long as the context lasts."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    started: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with contextlib.ExitStack() as hooks:
        for name, module in parts.items():

            def begin(_module: nn.Module, _inputs: Any, name: str = name) -> None:
                started[name] = now()

            def end(_module: nn.Module, _inputs: Any, _output: Any, name: str = name) -> None:
                times[name].append(now() - started[name])

            hooks.callback(module.register_forward_pre_hook(begin).remove)
            hooks.callback(module.register_forward_hook(end).remove)
        yield times
