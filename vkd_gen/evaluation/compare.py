"""Models beside one another, in numbers and pictures."""

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from accelerate import PartialState
from diffusers import ModelMixin
from torch import Tensor, nn

from vkd_gen.data.samples import Samples
from vkd_gen.evaluation.cost import count_macs, count_parameters, milliseconds_per_image
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.evaluation.labels import row_of
from vkd_gen.evaluation.prompt_errors import prompt_errors
from vkd_gen.evaluation.scorer import Scorer
from vkd_gen.models import Model
from vkd_gen.pipelines import usable_steps
from vkd_gen.provenance import environment


def evaluate(
    models: Mapping[str, Model],
    held_out: Samples,
    *,
    scorer: Scorer | None = None,
    scored: Collection[str] | None = None,
    num_inference_steps: int = 50,
    batch_size: int = 64,
    num_shown: int = 32,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Cost and scores of models, measured in one go on the same seeds and draws; called by all processes.

    Args:
        models: by name, brought to float32 here; from a `teacher` the distance of all of several is measured.
        held_out: samples that no model was trained on.
        scorer: scores samples; None leaves these scores out.
        scored: names of the models that it scores, by default all; others' rows hold cost and errors alone.
        num_inference_steps: where nothing is scored, and of the timing; at most those of the schedules.
        batch_size: images at a time.
        num_shown: samples to return.

    Returns:
        Results for results.json (`rows`: name -> column -> number; `protocol`; `sources`: name -> how its samples came
        about; `prompts`: of the samples, if they are of some), and samples by name, uint8.
    """
    with contextlib.ExitStack() as wholes:
        for model in models.values():
            nn.Module.float(model.network)  # past diffusers' warning about casting
            wholes.enter_context(model.whole())  # once, and not for each image and time
        return _evaluate(models, held_out, scorer, scored, num_inference_steps, batch_size, num_shown)


def _evaluate(
    models: Mapping[str, Model],
    held_out: Samples,
    scorer: Scorer | None,
    scored: Collection[str] | None,
    num_inference_steps: int,
    batch_size: int,
    num_shown: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reads = all(model.takes_prompts for model in models.values())
    steps = min(usable_steps(model.noise_scheduler, num_inference_steps) for model in models.values())
    rows: dict[str, dict[str, int | float]] = {name: {} for name in models}
    protocol: dict[str, Any] = {"device": str(next(iter(models.values())).network.device), "weights": "moving average"}
    state = PartialState()
    if state.is_main_process:  # timed while the others wait
        num_timed = min(32, batch_size)
        times = milliseconds_per_image(models, num_images=num_timed, num_inference_steps=steps)
        rows = _costs_and_errors(models, held_out, times, batch_size, reads)
        protocol |= {
            "ms_per_image": f"batches of {num_timed}, {steps} steps (a tenth, scaled), best of 3",
            "errors": "512 draws of (held-out image, noise, timestep), mean square per element",
        }
    state.wait_for_everyone()
    samples, sources = {}, {}
    prompts = next(iter(models.values())).prompts
    shown = {"prompts": [prompts[seed % len(prompts)] for seed in range(num_shown)]} if reads and prompts else {}
    for name, model in models.items():
        if scorer and (scored is None or name in scored):
            scores, features, source = scorer.score_model(name, model, num_shown=num_shown)
            rows[name] |= row_of(scores)
            samples[name] = features.shown
            sources[name] = {**source.protocol, "images_sha256": features.content_hash}
            protocol |= {key: source.protocol[key] for key in ("sampler", "num_inference_steps", "num_images", "seeds")}
        if name not in samples or (shown and list(scorer.prompts.of(range(num_shown))) != shown["prompts"]):
            samples[name] = model.images(
                range(num_shown), num_inference_steps=steps, batch_size=batch_size, name=f"the {name}"
            )
    if scorer:
        protocol |= scorer.protocol
        if real := scorer.scores_of_held_out():
            rows["held-out images"] = row_of(real)
    protocol["environment"] = environment()
    return {"rows": rows, "protocol": protocol, "sources": sources, **shown}, samples


def _costs_and_errors(
    models: Mapping[str, Model], held_out: Samples, times: Mapping[str, float], batch_size: int, reads: bool
) -> dict[str, dict[str, int | float]]:
    teacher = models.get("teacher") if len(models) > 1 else None
    errors = held_out_errors(models, held_out, teacher=teacher, batch_size=batch_size)
    if reads:
        of_prompts = prompt_errors(models, held_out, teacher=teacher, batch_size=batch_size)
        errors = {name: {**errors[name], **of_prompts[name]} for name in errors}
    rows: dict[str, dict[str, int | float]] = {}
    for name, model in models.items():
        counts = {"parameters": count_parameters(model.network), "macs": count_macs(model.network)}
        rows[name] = {**counts, "ms_per_image": times[name], **errors[name]}
    return rows


def describe_models(teacher: ModelMixin, student: ModelMixin) -> str:
    """Sizes of both, in lines."""
    costs = {
        name: (count_parameters(unet), count_macs(unet)) for name, unet in (("teacher", teacher), ("student", student))
    }
    lines = [f"{name}: {parameters:,} parameters, {macs:,} MACs per step" for name, (parameters, macs) in costs.items()]
    share = [small / large for small, large in zip(costs["student"], costs["teacher"], strict=True)]
    return "\n".join([*lines, f"student / teacher: {share[0]:.1%} of the parameters, {share[1]:.1%} of the MACs"])
