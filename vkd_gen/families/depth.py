"""Which layers a shallower student copies, by trying them all; of transformers see blocks.py."""

import copy
import itertools

from diffusers import ModelMixin

from vkd_gen.families.activations import Batches, step0_error
from vkd_gen.families.blocks import best_blocks
from vkd_gen.families.classes import are_transformers
from vkd_gen.families.dit import BLOCKS
from vkd_gen.families.inherit import inherit_weights
from vkd_gen.families.links import default_layers, link_layers, match_stages
from vkd_gen.schedule import Schedule


def layer_choices(student: ModelMixin, teacher: ModelMixin) -> list[dict[str, tuple[int, ...]]]:
    """All ways to copy some of the teacher's layers, in their order, into every block of a student of fewer layers.

    Each is a value for `layers` of `inherit_weights`, the default first. Choices with a layer whose input channels are
    not the teacher's are left out, unless the default has as many.
    """
    options = _options(student, teacher)
    return [dict(zip(options, choice, strict=True)) for choice in itertools.product(*options.values())]


def _options(student: ModelMixin, teacher: ModelMixin) -> dict[str, list[tuple[int, ...]]]:
    """For each block of fewer layers than the teacher's its choices, the default first."""
    stages = match_stages(student, teacher)
    options: dict[str, list[tuple[int, ...]]] = {}
    for way, order in (("down", stages), ("up", [len(teacher.up_blocks) - 1 - stage for stage in reversed(stages)])):
        for index, position in enumerate(order):
            name = f"{way}_blocks.{index}"
            block, origin = getattr(student, f"{way}_blocks")[index], getattr(teacher, f"{way}_blocks")[position]
            counts = len(block.resnets), len(origin.resnets)
            if counts[0] >= counts[1]:
                continue
            default = default_layers(*counts, decoder=way == "up")
            choices = itertools.combinations(range(counts[1]), counts[0])
            misfits = {
                choice: sum(link.reads is None for link in link_layers(student, teacher, {name: choice}))
                for choice in sorted(choices, key=lambda choice, default=default: choice != default)  # type: ignore[misc]
            }
            options[name] = [choice for choice, number in misfits.items() if number <= misfits[default]]  # type: ignore[index]
    return options


def _error(
    layers: dict[str, tuple[int, ...]], student: ModelMixin, teacher: ModelMixin, batches: Batches, schedule: Schedule
) -> float:
    """The error of a student that has copied these layers, before any training."""
    trial = copy.deepcopy(student)
    inherit_weights(trial, teacher, channels="magnitude", rescaling="none", layers=layers)
    return step0_error(trial, teacher, batches, schedule)


def compare_layer_choices(
    student: ModelMixin, teacher: ModelMixin, batches: Batches, schedule: Schedule
) -> list[tuple[float, dict[str, tuple[int, ...]]]]:
    """The student's `step0_error` on the batches for each of `layer_choices`, the lowest first; nothing is changed."""
    batches = list(batches)
    results = [
        (_error(layers, student, teacher, batches, schedule), layers) for layers in layer_choices(student, teacher)
    ]
    return sorted(results, key=lambda result: result[0])


def best_layers(
    student: ModelMixin, teacher: ModelMixin, batches: Batches, schedule: Schedule
) -> dict[str, tuple[int, ...]]:
    """Layers to copy, block after block the ones with which the student's error before training is lowest.

    Never worse than the default, from which it starts. It tries the sum of the blocks' choices, where
    `compare_layer_choices` tries their product. Student and teacher stay as they are; the result is a value for
    `layers` of `inherit_weights`.
    """
    if are_transformers(student, teacher):
        return {BLOCKS: best_blocks(student, teacher, batches, schedule)}
    batches, options = list(batches), _options(student, teacher)
    best = {name: choices[0] for name, choices in options.items()}
    lowest = None
    for name, choices in options.items():
        for choice in choices[1:]:
            if lowest is None:
                lowest = _error(best, student, teacher, batches, schedule)
            trial = {**best, name: choice}
            if (found := _error(trial, student, teacher, batches, schedule)) < lowest:
                best, lowest = trial, found
    return best
