"""Which of the teacher's channels a narrower student keeps.

Every stream keeps equal counts between the edges of the group norms that read it, so that the student's groups are
the teacher's with fewer channels each; attention keeps whole heads, or equal counts in every head.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vkd_gen.choices import ChannelChoice
from vkd_gen.families.activations import Reading, Readings
from vkd_gen.families.streams import Link, Stream, weights_by_stream

TIE = 1e-3
"""Weight of what a channel is worth without any restoring; decides between channels that restore the same."""


def undecided(links: Sequence[Link]) -> list[Stream]:
    """Streams of fewer channels than the teacher's, whose channels have to be chosen, in that order."""
    streams = dict.fromkeys(stream for link in links for stream in (*(link.reads or ()), *link.writes))
    found = [stream for stream in streams if stream.kept is None and stream.student < stream.teacher]
    return sorted(found, key=lambda stream: stream.same_heads is not None)


def choose_channels(
    links: Sequence[Link], choice: ChannelChoice, *, readings: Readings | None = None, seed: int = 0
) -> None:
    """Set `kept` of every stream that has none yet.

    Args:
        links: from `link_layers`.
        choice: `random`; `first`, the first ones; `magnitude`, those with the largest weights into and out of them;
            `activation`, those from which linear maps best restore what the layers after them compute.
        readings: from `read_channels`; for `activation`.
        seed: for `random`.
    """
    generator = torch.Generator().manual_seed(seed)
    for stream in undecided(links):
        match choice:
            case "random":
                stream.kept = keep_highest(stream, torch.rand(stream.teacher, generator=generator))
            case "first":
                stream.kept = keep_highest(stream, -torch.arange(stream.teacher).float())
            case "magnitude":
                stream.kept = keep_highest(stream, _magnitudes(stream, links))
            case "activation":
                assert readings is not None
                stream.kept = keep_restorable(stream, readings[stream])
    for link in links:
        for stream in (*(link.reads or ()), *link.writes):
            if stream.kept is None:
                stream.kept = _repeat(stream)


def _repeat(stream: Stream) -> Tensor:
    """For a student that is not narrower: every channel, as often as the next."""
    (heads, all_heads), (size, full) = stream.heads, _head_sizes(stream)
    head = torch.arange(heads) * all_heads // heads
    return (head[:, None] * full + torch.arange(size) * full // size).flatten()


def _head_sizes(stream: Stream) -> tuple[int, int]:
    return stream.student // stream.heads[0], stream.teacher // stream.heads[1]


def _ranges(stream: Stream, head_scores: Tensor) -> list[tuple[int, int, int]]:
    """Ranges of the teacher's channels, each with the number to keep in it: (first, end, number)."""
    heads, all_heads = stream.heads
    if all_heads > 1:
        size, full = _head_sizes(stream)
        if stream.same_heads is not None:
            best = (stream.same_heads.index() // (stream.same_heads.teacher // all_heads)).unique().tolist()
        else:
            best = head_scores.topk(min(heads, all_heads)).indices.sort().values.tolist()
        return [(head * full, (head + 1) * full, min(size, full)) for head in best]
    # Rounded where they end, so that no edge is off by a whole channel.
    edges = sorted({0, stream.teacher, *(edge for edge in stream.edges if edge < stream.teacher)})
    ends = [edge * stream.student // stream.teacher for edge in edges]
    numbers = [end - first for first, end in itertools.pairwise(ends)]
    return [(*edge, number) for edge, number in zip(itertools.pairwise(edges), numbers, strict=True)]


def keep_highest(stream: Stream, scores: Tensor) -> Tensor:
    """The channels of the highest scores `[channels]` within each range, in ascending order."""
    ranges = _ranges(stream, scores.view(stream.heads[1], -1).sum(1))
    return torch.cat([first + scores[first:end].topk(number).indices for first, end, number in ranges]).sort().values


def _magnitudes(stream: Stream, links: Sequence[Link]) -> Tensor:
    """Squared weights into each channel times those out of it, every layer's divided by their mean.

    The product, since a channel that nothing reads, or nothing writes, is worth nothing. Queries are read by keys.
    """
    into, out = torch.zeros(stream.teacher), torch.zeros(stream.teacher)
    queries = True
    for link in links:
        for reading in (True, False):
            for other, _, weight in weights_by_stream(link, reading=reading):
                if other is not stream:
                    continue
                squares = weight.square().sum(1).cpu()
                is_read = reading or (link.is_logit and not queries)
                queries = queries and not link.is_logit
                (out if is_read else into).add_(squares / squares.mean().clamp(min=1e-20))
    return into * out


def keep_restorable(stream: Stream, readings: Sequence[Reading]) -> Tensor:
    """Channels from which the dropped ones are best restored by linear maps, in the eyes of the layers that read them.

    Greedy: the next channel is the one that lowers the error of all readers together the most, each taken relative to
    what it reads. What is left to restore is the Schur complement C - C[:, k] C[k, k]^-1 C[k, :] of the kept channels
    k in the covariance C; one more channel changes it by rank one.
    """
    if not readings:
        return keep_highest(stream, torch.zeros(stream.teacher))
    mean, covariance, gram = (torch.stack(parts) for parts in zip(*readings, strict=True))
    own = (_diagonals(covariance) + mean.square()) * _diagonals(gram)
    power, total = own.sum(1), (covariance * gram).sum((1, 2))
    own = (own / power.clamp(min=1e-30)[:, None]).sum(0)
    share = torch.where(total > 1e-9 * power, 1 / total.clamp(min=1e-30), 0.0)  # who reads constants has no say
    gram = gram * share[:, None, None]
    energy = (covariance * gram).sum((0, 2))
    floor = 1e-6 * _diagonals(covariance)  # where less is left, it is rounding
    product = covariance @ gram
    ranges = _ranges(stream, energy.view(stream.heads[1], -1).sum(1))
    # How many more may be taken from each channel's range.
    left = torch.zeros(stream.teacher, dtype=torch.long, device=gram.device)
    range_of = torch.full((stream.teacher,), -1, device=gram.device)
    for number, (first, end, quota) in enumerate(ranges):
        left[first:end], range_of[first:end] = quota, number
    kept: list[int] = []
    while len(kept) < sum(quota for *_, quota in ranges):
        sizes = _diagonals(covariance)
        gains = (product * covariance).sum(2) / sizes.clamp(min=1e-30)  # the diagonal of C G C over that of C
        gain = TIE * own + torch.where(sizes > floor, gains, 0.0).sum(0)
        gain[left == 0] = -1
        best = int(gain.argmax())
        kept.append(best)
        left[range_of == range_of[best]] -= 1
        left[best], range_of[best] = 0, -1
        column, size = covariance[:, :, best], sizes[:, best]
        column = column * torch.where(size > floor[:, best], size.clamp(min=1e-30).rsqrt(), 0.0)[:, None]
        product -= column[:, :, None] * torch.einsum("ri,rij->rj", column, gram)[:, None]
        covariance = covariance - column[:, :, None] * column[:, None]
    return torch.tensor(sorted(kept))


def _diagonals(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).clone()
