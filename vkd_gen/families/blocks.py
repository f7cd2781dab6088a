"""Students of a `DiTTransformer2DModel`: fewer blocks, fewer heads, and what they take over from the teacher.

Every block has an embedder of time and label of its own, and the output layer reads that of block 0, which is therefore
always kept.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from vkd_gen.families.activations import Batches, predict_noisy
from vkd_gen.families.classes import complete_config
from vkd_gen.families.dit import BLOCKS
from vkd_gen.reductions import Reduction
from vkd_gen.schedule import Schedule


def evenly_spaced_blocks(num_kept: int, num_blocks: int) -> tuple[int, ...]:
    """Blocks that are kept where nothing else is said: the first, the last, and between them evenly.

    Example:
        >>> evenly_spaced_blocks(4, 10)
        (0, 3, 6, 9)
    """
    step = (num_blocks - 1) / max(1, num_kept - 1)
    return tuple(math.floor(number * step + 0.5) for number in range(num_kept))


def reduce_blocks(config: Mapping[str, Any], reduction: Reduction) -> dict[str, Any]:
    """The student's configuration, complete; see `build_student`.

    Raises:
        ValueError: in one line, for what is out of range or is of UNets.
    """
    of_unets = [
        field.name
        for field in fields(Reduction)
        if field.name not in ("width", "blocks") and getattr(reduction, field.name) != field.default
    ]
    if of_unets:
        raise ValueError(f"a transformer's student has fewer blocks or a smaller width; {of_unets[0]} is of UNets")
    config = complete_config(config)
    if reduction.blocks is not None:
        config["num_layers"] = len(kept_blocks(reduction.blocks, config["num_layers"]))
    heads = config["num_attention_heads"]
    if not 0 < reduction.width * heads < math.inf:
        raise ValueError(f"width must be above 0 and finite, not {reduction.width}")
    config["num_attention_heads"] = math.ceil(heads * reduction.width)
    check_blocks(config)
    return config


def kept_blocks(blocks: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """The teacher's blocks that a student keeps, of their number or their list.

    Raises:
        ValueError: in one line, for a list or number that cannot be.
    """
    if isinstance(blocks, int):
        if not 1 <= blocks <= num_blocks:
            raise ValueError(
                f"a student of a teacher of {num_blocks} blocks has 1 to {num_blocks} of them, not {blocks}"
            )
        return evenly_spaced_blocks(blocks, num_blocks)
    kept = tuple(blocks)
    unknown = [block for block in kept if not 0 <= block < num_blocks]
    if unknown:
        raise ValueError(f"there is no block {unknown[0]}; the teacher's are 0 to {num_blocks - 1}")
    if not kept or list(kept) != sorted(set(kept)):
        raise ValueError(f"blocks must be named once each, in their order, not {' '.join(map(str, kept))}")
    if kept[0]:
        raise ValueError("block 0 must be kept: the output layer reads its embedding of time and label")
    return kept


def check_blocks(config: Mapping[str, Any]) -> None:
    """Refuse what diffusers' class builds, and fails on or misplaces later.

    Raises:
        ValueError: in one line.
    """
    size, patch = config["sample_size"], config["patch_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if width % 4:
        raise ValueError(
            f"{config['num_attention_heads']} heads of {config['attention_head_dim']} channels are {width}, and "
            "positions are embedded in multiples of 4"
        )
    if not isinstance(size, int) or size % patch:
        raise ValueError(f"sample_size {size} is no whole number of patches of {patch}")
    if config["out_channels"] not in (None, config["in_channels"], 2 * config["in_channels"]):
        raise ValueError(
            f"out_channels {config['out_channels']} must be in_channels, {config['in_channels']}, or with a variance "
            "twice as many"
        )


def inheritable_blocks(
    student: ModelMixin, teacher: ModelMixin, layers: Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """The teacher's block that each of the student's is made from.

    Args:
        student: whose number of blocks counts.
        teacher: with at least as many.
        layers: `{"transformer_blocks": (0, 2, 5)}`; empty for evenly spaced ones.

    Raises:
        ValueError: in one line, for blocks that are not there, and a student of layers of other kinds or shapes.
    """
    _check_inheritable(student, teacher)
    if unknown := set(layers) - {BLOCKS}:
        raise ValueError(f"a transformer's blocks are called {BLOCKS}, not {unknown.pop()}")
    counts = [len(network.transformer_blocks) for network in (student, teacher)]
    kept = kept_blocks(layers.get(BLOCKS, counts[0]), counts[1])
    if len(kept) != counts[0]:
        raise ValueError(f"{len(kept)} blocks are named for a student of {counts[0]}")
    return kept


ALIKE = ("attention_head_dim", "patch_size", "in_channels", "num_embeds_ada_norm", "attention_bias", "activation_fn")
"""Entries that a student has in common with the teacher that it starts from."""


def _check_inheritable(student: ModelMixin, teacher: ModelMixin) -> None:
    """Refuse a student whose layers are of other kinds or shapes than narrower ones of the teacher's.

    Raises:
        ValueError: in one line.
    """
    unlike = [entry for entry in ALIKE if student.config[entry] != teacher.config[entry]]
    if student.out_channels > teacher.out_channels:
        unlike.append("out_channels")
    if unlike:
        values = [network.config[unlike[0]] for network in (student, teacher)]
        raise ValueError(
            f"a student with {unlike[0]} {values[0]} cannot start from the weights of a teacher with {values[1]}: "
            "train it without (--no-inherit_weights)"
        )


def output_channels(student: ModelMixin, teacher: ModelMixin) -> Tensor:
    """Which of the teacher's outputs, positions of a patch times channels, each of the student's is."""
    patches = torch.arange(student.patch_size**2)[:, None] * teacher.out_channels
    return (patches + torch.arange(student.out_channels)).flatten()


@torch.no_grad()
def copy_blocks(student: ModelMixin, teacher: ModelMixin, kept: Sequence[int]) -> dict[str, str]:
    """Copy the teacher's weights, bit for bit, into a student of its width.

    Args:
        student: changed in place.
        teacher: left as it is.
        kept: the teacher's block that each of the student's is.

    Returns:
        Student layer -> teacher layer, of layers with weights.
    """
    origins: dict[str, str] = {}
    for name, module in student.named_modules():
        for entry, value in module.named_parameters(recurse=False):
            origins[name] = _origin(name, kept)
            found = teacher.get_submodule(origins[name]).get_parameter(entry)
            value.copy_(found[output_channels(student, teacher).to(found.device)] if name == "proj_out_2" else found)
    return origins


def _origin(name: str, kept: Sequence[int]) -> str:
    parts = name.split(".")
    if parts[0] == BLOCKS:
        parts[1] = str(kept[int(parts[1])])
    return ".".join(parts)


def best_blocks(student: ModelMixin, teacher: ModelMixin, batches: Batches, schedule: Schedule) -> tuple[int, ...]:
    """The teacher's blocks with which a student of its width is nearer to it before training: a value for `kept`.

    Of two choices: evenly spaced, or those without which, one at a time, the teacher's prediction changes most.
    """
    count, num_blocks = (len(network.transformer_blocks) for network in (student, teacher))
    evenly, batches = evenly_spaced_blocks(count, num_blocks), list(batches)
    if count in (1, num_blocks) or student.config.num_attention_heads != teacher.config.num_attention_heads:
        return evenly
    rises = _errors_without(teacher, [{block} for block in range(1, num_blocks)], batches, schedule)
    needed = sorted(range(1, num_blocks), key=lambda block: rises[block - 1], reverse=True)[: count - 1]
    choices = [evenly, tuple(sorted((0, *needed)))]
    errors = _errors_without(teacher, [set(range(num_blocks)) - set(kept) for kept in choices], batches, schedule)
    return choices[errors.index(min(errors))]


def _errors_without(
    teacher: ModelMixin, left_out: Sequence[set[int]], batches: Batches, schedule: Schedule
) -> list[float]:
    """Summed squared difference to the teacher's prediction when some of its blocks are left out, for each choice."""
    errors = [0.0] * len(left_out)
    for batch in batches:
        answer = predict_noisy(teacher, batch, schedule).float()
        for number, blocks in enumerate(left_out):
            with _without(teacher, blocks):
                errors[number] += float((predict_noisy(teacher, batch, schedule).float() - answer).square().sum())
    return errors


@contextmanager
def _without(network: ModelMixin, blocks: set[int]) -> Iterator[None]:
    """A network whose blocks of these numbers hand on what they are given."""
    handles = [
        network.transformer_blocks[block].register_forward_hook(lambda _module, inputs, _output: inputs[0])
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
