"""Weights that a student takes over from its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from diffusers import ModelMixin

from vkd_gen.choices import ChannelChoice, Rescaling
from vkd_gen.families.activations import Batches, read_channels
from vkd_gen.families.blocks import copy_blocks, inheritable_blocks
from vkd_gen.families.channels import choose_channels, undecided
from vkd_gen.families.classes import are_transformers
from vkd_gen.families.dit import BLOCKS
from vkd_gen.families.dit_links import link_blocks
from vkd_gen.families.links import BlockLayers, link_layers
from vkd_gen.families.restore import channel_index, fit_layers
from vkd_gen.families.streams import Layer, Link, channel_axes
from vkd_gen.families.unet import bare_unet
from vkd_gen.schedule import Schedule


@dataclass(frozen=True)
class Inheritance:
    """What became of a student's layers, by name with the teacher's; printable.

    Attributes:
        copied: every weight is the teacher's.
        sliced: the teacher's weights on the channels that the student has.
        fitted: those that were fitted to what the teacher's layer computes.
        random: left as they were; the last ones of residual branches at zero.
    """

    copied: dict[str, str]
    sliced: dict[str, str]
    fitted: dict[str, str]
    random: tuple[str, ...]

    def __str__(self) -> str:
        """Counts, and where blocks are not copied from blocks of the same name."""
        lines = [
            f"layers with weights: {len(self.copied)} copied from the teacher, {len(self.sliced)} sliced, of which "
            f"{len(self.fitted)} fitted to its outputs, {len(self.random)} left random"
        ]
        moved = {
            _unit(name): _unit(origin) for name, origin in {**self.copied, **self.sliced}.items() if name != origin
        }
        lines += [f"  {name} <- {origin}" for name, origin in moved.items()]
        lines += [f"  {name}: random" for name in self.random]
        return "\n".join(lines)


def _unit(name: str) -> str:
    """What is copied as a whole: a layer of a UNet's block, a transformer's block."""
    return ".".join(name.split(".")[: 2 if name.startswith(BLOCKS) else 4])


@torch.no_grad()
def inherit_weights(
    student: ModelMixin,
    teacher: ModelMixin,
    *,
    channels: ChannelChoice = "activation",
    rescaling: Rescaling | None = None,
    batches: Batches | None = None,
    schedule: Schedule | None = None,
    layers: BlockLayers | None = None,
    seed: int = 0,
) -> Inheritance:
    """Start a student from its teacher's weights, whatever it has less of.

    A student with the teacher's channels copies whole layers: the first of each block and, in the decoder, the last. A
    narrower one keeps some channels, the same ones wherever they are used; a wider one has channels several times. With
    batches the layers are then fitted to the teacher's; without any, whole layers are the teacher's bit for bit.

    Args:
        student: from `build_student`; changed in place.
        teacher: left as it is.
        channels: which channels a narrower student keeps, see `choose_channels`.
        rescaling: for what lost input channels, or layers before it: `least_squares` fits each layer to the teacher's
            output, `fan_in` multiplies the weights by the root of the ratio of the channels, `none` leaves them. By
            default `least_squares` if there are batches, else `none`.
        batches: as `calibrate` takes; for `activation` and `least_squares`. A few hundred small images are enough;
            they are kept in memory, with the activations of every layer.
        schedule: the teacher's, for the same.
        layers: of the teacher, to copy by block of the student, such as `{"up_blocks.0": (0, 2)}`; of a transformer its
            blocks, `{"transformer_blocks": (0, 2, 5)}`, by default evenly spaced. With as many heads as the teacher's
            they are copied bit for bit, and nothing is fitted.
        seed: of the choice `random`.

    Raises:
        ValueError: for blocks that cannot be inherited, layers that are not there, missing batches.
    """
    batches = list(batches or ())
    rescaling = rescaling or ("least_squares" if batches else "none")
    _check_choices(channels, rescaling)
    if are_transformers(student, teacher):
        kept = inheritable_blocks(student, teacher, layers or {})
        if student.config.num_attention_heads == teacher.config.num_attention_heads:
            return Inheritance(copy_blocks(student, teacher, kept), {}, {}, random=())
        links = link_blocks(student, teacher, kept)
    else:
        links = link_layers(bare_unet(student), bare_unet(teacher), layers)
    reads, fits = channels == "activation" and bool(undecided(links)), rescaling == "least_squares"
    if (reads or fits) and (not batches or schedule is None):
        raise ValueError(
            "channels chosen by activation, and layers fitted by least squares, need batches of images and a "
            "schedule; without them choose channels='magnitude' and rescaling='none'"
        )
    readings = read_channels(links, teacher, batches, schedule) if reads and schedule is not None else None
    choose_channels(links, channels, readings=readings, seed=seed)
    for link in links:
        if link.teacher is not None and link.reads is not None:
            _slice(link, fan_in=rescaling == "fan_in")
        elif link.ends_branch:
            _silence(link.student)
    fitted = fit_layers(links, student, teacher, batches, schedule) if fits and schedule is not None else []
    return _report(links, fitted, student, teacher)


def _check_choices(channels: str, rescaling: str) -> None:
    for what, value, known in (("choice of channels", channels, ChannelChoice), ("rescaling", rescaling, Rescaling)):
        if value not in get_args(known):
            raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(get_args(known))}")


def _silence(layer: Layer) -> None:
    """A branch that inherits nothing adds nothing at first, so that the sample passes around it."""
    for parameter in layer.parameters():
        parameter.zero_()


def _slice(link: Link, *, fan_in: bool) -> None:
    """The teacher's weights on the student's channels."""
    assert link.teacher is not None
    assert link.reads is not None
    index = channel_index(link.writes)
    for name, parameter in link.student.named_parameters(recurse=False):
        value = getattr(link.teacher, name).detach()
        index = index.to(value.device)
        if value.ndim == 1:
            value = value[index] * link.scale
        else:
            inputs, outputs = channel_axes(link.teacher)
            value = value.index_select(outputs, index).index_select(inputs, channel_index(link.reads).to(value.device))
            copies = torch.cat([stream.copies() for stream in link.reads]).to(value)
            shape = [1] * value.ndim
            shape[inputs] = -1
            value = value / copies.view(shape) * link.scale
            if fan_in:
                value = value * (link.teacher.weight.shape[inputs] / value.shape[inputs]) ** 0.5
        parameter.copy_(value)


def _report(links: Sequence[Link], fitted: Sequence[Link], student: ModelMixin, teacher: ModelMixin) -> Inheritance:
    names, origins = ({module: name for name, module in unet.named_modules()} for unet in (student, teacher))
    by_kind: dict[str, dict[str, str]] = {"copied": {}, "sliced": {}, "fitted": {}}
    for link in links:
        if link.teacher is None:
            continue
        name, origin = names[link.student], origins[link.teacher]
        if link in fitted:
            by_kind["fitted"][name] = origin
        if link.reads is not None:
            whole = all(stream.student == stream.teacher for stream in (*link.reads, *link.writes))
            by_kind["copied" if whole and link not in fitted else "sliced"][name] = origin
    known = set().union(*by_kind.values())
    with_weights = {name for module, name in names.items() if next(module.parameters(recurse=False), None) is not None}
    return Inheritance(**by_kind, random=tuple(sorted(with_weights - known)))
