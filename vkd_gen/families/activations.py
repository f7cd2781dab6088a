"""What a teacher's layers read, over images, noise and timesteps."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor, nn

from vkd_gen.families import dit, unet
from vkd_gen.families.streams import Layer, Link, Stream, weights_by_stream
from vkd_gen.features import to_rows
from vkd_gen.schedule import Schedule

Batches = Iterable[Mapping[str, Any]]
"""Batches with `sample` and `noise` `[B, C, H, W]`, `timesteps` `[B]` and, if the UNet needs it, `conditioning`."""


class Reading(NamedTuple):
    """What a layer reads from a stream, and how it weighs errors in it.

    An error of covariance E in what the layer reads is one of trace(gram @ E) in what it computes.

    Attributes:
        mean: `[channels]`, float64 on the teacher's device like the others.
        covariance: `[channels, channels]`.
        gram: `[channels, channels]`, products of the layer's weights.
    """

    mean: Tensor
    covariance: Tensor
    gram: Tensor


Readings = Mapping[Stream, Sequence[Reading]]
"""One for each layer that reads a stream."""


@torch.no_grad()
def predict_noisy(network: ModelMixin, batch: Mapping[str, Any], schedule: Schedule) -> Tensor:
    """A network's prediction for a batch, in eval mode and in its own type, on its own device."""
    parameter = next(network.parameters())
    noisy_sample = schedule.noisy(batch["sample"], batch["noise"], batch["timesteps"])
    was_training = network.training
    times = schedule.told(batch["timesteps"]).to(parameter.device)
    call = dit.call if isinstance(network, DiTTransformer2DModel) else unet.call
    prediction = call(network.eval(), noisy_sample.to(parameter), times, batch.get("conditioning"))
    network.train(was_training)
    return prediction


@torch.no_grad()
def step0_error(student: ModelMixin, teacher: ModelMixin, batches: Batches, schedule: Schedule) -> float:
    """Mean square difference of the two predictions, over the teacher's mean square.

    1 is as good as predicting nothing. For networks of one prediction type.
    """
    difference = power = 0.0
    for batch in batches:
        answer = predict_noisy(teacher, batch, schedule).float()
        difference += float((predict_noisy(student, batch, schedule).float() - answer).square().sum())
        power += float(answer.square().sum())
    if not power:
        raise ValueError("there is nothing to compare: no batches, or a teacher that predicts zeros")
    return difference / power


class _Moments:
    """Count, sum and second moments of rows."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Any = 0.0
        self.product: Any = 0.0

    def add(self, rows: Tensor) -> None:
        rows = to_rows(rows).flatten(0, 1).float()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0, dtype=torch.float64)
        self.product = self.product + (rows.T @ rows).double()

    def second(self) -> Tensor:
        return self.product / self.count

    def mean(self) -> Tensor:
        return self.sum / self.count

    def covariance(self) -> Tensor:
        return self.second() - torch.outer(self.mean(), self.mean())


def read_channels(links: Sequence[Link], teacher: ModelMixin, batches: Batches, schedule: Schedule) -> Readings:
    """For each stream whose channels are not chosen yet what the layers after it read.

    Queries are read by keys, and keys by queries.
    """
    readers = [link for link in links if isinstance(link.teacher, nn.Conv2d | nn.Linear) and link.reads]
    logits = [link for link in links if link.is_logit and link.teacher is not None]
    moments: dict[tuple[Layer, str], _Moments] = defaultdict(_Moments)

    def recorder(side: str) -> Callable[..., None]:
        def hook(module: Layer, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            moments[module, side].add(inputs[0] if output is None else output)

        return hook

    hooks = [link.teacher.register_forward_pre_hook(recorder("in")) for link in readers]
    hooks += [link.teacher.register_forward_hook(recorder("out")) for link in logits]
    try:
        for batch in batches:
            predict_noisy(teacher, batch, schedule)
    finally:
        for handle in hooks:
            handle.remove()
    if not moments:
        raise ValueError("there are no batches to choose channels by")

    readings: dict[Stream, list[Reading]] = defaultdict(list)
    for link in readers:
        inputs = moments[link.teacher, "in"]
        mean, covariance = inputs.mean(), inputs.covariance()
        for stream, part, weight in weights_by_stream(link, reading=True):
            if stream.kept is None:
                gram = weight.double() @ weight.double().T
                readings[stream].append(Reading(mean[part], covariance[part, part], gram))
    for link in logits:
        (stream,) = link.writes
        size = stream.teacher // stream.heads[1]
        same_head = torch.block_diag(*[torch.ones(size, size)] * stream.heads[1])
        for other in logits:
            if other is not link and other.writes == link.writes:
                outputs, partners = moments[link.teacher, "out"], moments[other.teacher, "out"].second()
                mask = same_head.to(partners)
                readings[stream].append(Reading(outputs.mean(), outputs.covariance() * mask, partners * mask))
    return readings
