"""Fit a student's sliced layers to what the teacher's layers compute.

A layer that has lost input channels computes something else than the teacher's. Least squares restores what can be
restored from the channels that are left, one layer after the other: each is fitted on what the student's own, already
fitted, layers hand it, so errors do not add up.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from vkd_gen.families.activations import Batches, predict_noisy
from vkd_gen.families.streams import Layer, Link, Stream
from vkd_gen.features import to_rows
from vkd_gen.schedule import Schedule

RIDGE = 1e-3
"""Share of the mean variance of a layer's inputs that holds its weights at the teacher's."""


KINDS = nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm
"""Layers that are fitted."""


def channel_index(streams: Sequence[Stream]) -> Tensor:
    """The teacher's channel of each of the student's, where a layer reads or writes several streams."""
    indices, offset = [], 0
    for stream in streams:
        indices.append(stream.index() + offset)
        offset += stream.teacher
    return torch.cat(indices)


@torch.no_grad()
def fit_layers(
    links: Sequence[Link],
    student: ModelMixin,
    teacher: ModelMixin,
    batches: Batches,
    schedule: Schedule,
) -> list[Link]:
    """Fit convolutions, linear layers and norms in the order in which the student runs, in one pass of all batches.

    The target is the output of the teacher's layer on the student's channels. Where the output is added to a residual
    stream, the target is what the stream still lacks, errors of the layers before included.

    Args:
        links: from `link_layers`, channels chosen.
        student: sliced; changed in place.
        teacher: left as it is.
        batches: kept in memory together, with the activations of every layer.
        schedule: the teacher's.

    Returns:
        The links that were fitted. Layers of another resolution than the teacher's are not.
    """
    batch = _join(batches)
    fitted = [link for link in links if link.teacher is not None and isinstance(link.student, KINDS)]
    targets = _targets(fitted, teacher, batch, schedule)
    addends: dict[Layer, Tensor] = {}
    done = []

    def keep(module: Layer, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        addends[module] = inputs[0] if output is None else output

    def fit(link: Link, module: Layer, inputs: tuple[Tensor, ...]) -> None:
        target = targets.pop(link, None)
        if target is None:  # a layer that runs a second time
            return
        if link.residual is not None:
            added = to_rows(addends[_adds(link)])
            if added.shape != target.shape:
                return
            target = target - added
        if _fit(link, module, inputs[0], target):
            done.append(link)

    with contextlib.ExitStack() as hooks:
        for link in fitted:
            if link.residual is not None:
                source = _adds(link)
                is_block = source is link.residual[0]
                register = source.register_forward_pre_hook if is_block else source.register_forward_hook
                hooks.enter_context(register(keep))
            hooks.enter_context(link.student.register_forward_pre_hook(functools.partial(fit, link)))
        predict_noisy(student, batch, schedule)
    return done


def _targets(
    links: Sequence[Link], teacher: ModelMixin, batch: dict[str, Any], schedule: Schedule
) -> dict[Link, Tensor]:
    """What each link's layer is to compute, in one pass of the teacher."""
    targets: dict[Link, Tensor] = {}

    def keep(link: Link, module: Layer, _inputs: tuple[Tensor, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        factor = getattr(module, "output_scale_factor", None) or getattr(module, "rescale_output_factor", None) or 1.0
        rows = _norm_rows(output) if isinstance(module, nn.GroupNorm) else to_rows(output)
        index = channel_index(link.writes).to(output.device)
        targets[link] = rows[..., index] * (factor if link.residual else link.scale)

    with contextlib.ExitStack() as hooks:
        for link in links:
            source = link.residual[1] if link.residual else link.teacher
            hooks.enter_context(source.register_forward_hook(functools.partial(keep, link)))
        predict_noisy(teacher, batch, schedule)
    return targets


def _adds(link: Link) -> Layer:
    """The student's module whose input, or output for a shortcut, is added to the layer's output."""
    assert link.residual is not None
    block = link.residual[0]
    return block.conv2 if link.student is getattr(block, "conv_shortcut", None) else block


def _fit(link: Link, module: Layer, inputs: Tensor, target: Tensor) -> bool:
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return _fit_norm(module, inputs, target)
    patches = _patches(module, inputs[:1])
    if patches.shape[1] != target.shape[1]:
        return False
    start = module.weight.double().flatten(1)
    if link.reads is None:  # random weights are nothing to hold on to
        start = torch.zeros_like(start)
    count, size = 0, start.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=start.device)
    cross = torch.zeros(size, start.shape[0], dtype=torch.float64, device=start.device)
    sums = [torch.zeros(length, dtype=torch.float64, device=start.device) for length in (size, start.shape[0])]
    step = max(1, 2**24 // (patches.shape[1] * size))
    for first in range(0, len(inputs), step):
        rows = _patches(module, inputs[first : first + step]).flatten(0, 1)
        # What is missing, not what is wanted: nothing missing then changes nothing, in float32 too.
        wanted = target[first : first + step].flatten(0, 1).to(rows) - rows @ start.T.to(rows)
        if module.bias is not None:
            wanted -= module.bias
        count += len(rows)
        gram += (rows.T @ rows).double()
        cross += (rows.T @ wanted).double()
        for total, part in zip(sums, (rows, wanted), strict=True):
            total += part.sum(0, dtype=torch.float64)
    mean, missing = (total / count for total in sums)
    gram, cross = gram / count, cross / count
    if module.bias is not None:
        gram, cross = gram - torch.outer(mean, mean), cross - torch.outer(mean, missing)
    held = gram + RIDGE * gram.diagonal().mean().clamp(min=1e-20) * torch.eye(
        size, dtype=gram.dtype, device=gram.device
    )
    change = torch.linalg.solve(held, cross).T
    module.weight.copy_((start + change).view_as(module.weight))
    if module.bias is not None:
        module.bias += missing - change @ mean
    return True


def _patches(module: Layer, inputs: Tensor) -> Tensor:
    """What each output position is computed from, `[B, N, weights per output]`, float32."""
    if isinstance(module, nn.Linear):
        return to_rows(inputs).float()
    assert not isinstance(module.padding, str)
    unfolded = F.unfold(inputs.float(), module.kernel_size, module.dilation, module.padding, module.stride)
    return unfolded.transpose(1, 2)


def _norm_rows(maps: Tensor) -> Tensor:
    """A group norm's channels are the second axis in attention too, where positions are the third."""
    return maps.flatten(2).transpose(1, 2)


def _fit_norm(module: nn.GroupNorm | nn.LayerNorm, inputs: Tensor, target: Tensor) -> bool:
    """Each channel's factor and offset."""
    if isinstance(module, nn.GroupNorm):
        normed = _norm_rows(F.group_norm(inputs, module.num_groups, eps=module.eps))
    else:
        normed = to_rows(F.layer_norm(inputs, module.normalized_shape, eps=module.eps))
    if normed.shape != target.shape or module.weight is None or module.bias is None:
        return False
    normed, target = normed.flatten(0, 1).double(), target.flatten(0, 1).double()
    mean, target_mean = normed.mean(0), target.mean(0)
    variance = (normed - mean).square().mean(0)
    covariance = ((normed - mean) * (target - target_mean)).mean(0)
    held = RIDGE * variance.mean().clamp(min=1e-20)
    weight = (covariance + held * module.weight.double()) / (variance + held)
    module.weight.copy_(weight)
    module.bias.copy_(target_mean - weight * mean)
    return True


def _join(batches: Batches) -> dict[str, Any]:
    rows = list(batches)
    if not rows:
        raise ValueError("there are no batches to fit the student's layers by")
    return {name: _join_values([row[name] for row in rows]) for name in rows[0]}


def _join_values(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: _join_values([value[name] for value in values]) for name in values[0]}
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]
