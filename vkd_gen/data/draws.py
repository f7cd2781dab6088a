"""What a run draws: sample, noise, time and what is told of each training sample, by its number.

C channels, H height, W width.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from vkd_gen.data.groups import grouped_order, largest_bucket, num_grouped
from vkd_gen.data.samples import Samples
from vkd_gen.data.streaming import ImageStream, Position
from vkd_gen.schedule import Schedule, TimestepDensity

GOLDEN = (5**0.5 - 1) / 2
"""Between the times of two draws in a row, modulo 1: any number of them are spread over [0, 1] evenly, however they are
split into batches (Roberts, 2018, https://extremelearning.com.au, on additive recurrences)."""


class Draws(Dataset):
    """What a run draws for its n-th sample, as a pure function of (seed, n).

    Image, flip, noise, time and label of draw n do not depend on batch size, number of processes or what was drawn
    before: any split of the run into steps and processes trains on the same draws, and resuming is starting at
    another n. Each pass through the samples has a permutation of its own.

    Args:
        samples: to train on; of a stream its head, which calibration and inheritance draw from.
        schedule: of the student.
        seed: of the run, 0 or above.
        stream: to train on instead.
        batch_size: of `apart`, `first` and `alike`.
        group_size: where the samples are of several shapes (`Samples.buckets`), so many draws in a row, from multiples
            of it on, are of one; see `grouped_order`. None draws of the largest bucket alone.
        both_branches: each draw is told what it is and, a second time, nothing; see `both_branches`. Then none is
            dropped.
        stratified: the times of draws in a row are spread evenly (see `GOLDEN`), which makes the mean over a batch less
            noisy; else each is drawn by itself.
        density: of times that are not drawn uniformly. What `apart` draws is uniform.

    Attributes:
        positions: how far this process' readers of the stream have come, `[readers, 4]` int64.
    """

    def __init__(
        self,
        samples: Samples,
        schedule: Schedule,
        *,
        seed: int,
        stream: ImageStream | None = None,
        batch_size: int = 64,
        group_size: int | None = None,
        both_branches: bool = False,
        stratified: bool = False,
        density: TimestepDensity | None = None,
    ):
        if stratified and density is not None:
            raise ValueError("times are spread evenly or drawn of a density, not both")
        if seed < 0:
            raise ValueError(f"seed must be 0 or above, not {seed}")
        if seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {seed}")
        if both_branches:
            samples = copy.copy(samples)
            samples.guidance_dropout = 0.0
        self.samples, self.schedule, self.stream, self.seed = samples, schedule, stream, seed
        self.batch_size, self.both_branches, self.density = batch_size, both_branches, density
        self.positions = torch.tensor([Position()])
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.group_size = group_size
        if samples.buckets is None:
            self._per_epoch = len(samples)
        elif group_size is None:
            self._per_epoch = len(largest_bucket(samples.buckets))
        else:
            self._per_epoch = num_grouped(samples.buckets, group_size)
        self._generator = np.random.Generator(np.random.Philox(key=0))
        self._first_time = self._generator_of(0, 1).random() if stratified else None

    def __getitem__(self, draws: Sequence[int]) -> dict[str, Any]:
        """A batch of the draws of these numbers, which `finish` completes.

        Returns:
            `noise`, `[B, C, H, W]` float32; `timesteps`, `[B]` int64; and, as the samples give them, `sample` and
            `conditioning`, keyword arguments of the network.
        """
        return self.around(draws, [self.samples.read(self._index(draw)) for draw in draws])

    def around(self, draws: Sequence[int], items: Sequence[Any]) -> dict[str, Any]:
        """What is drawn of samples that were read, whichever they are.

        Args:
            draws: numbers of the draws.
            items: one for each, as `Samples.read` gives them.

        Returns:
            What `__getitem__` does.
        """
        samples, times, told = [], [], []
        noise = np.empty((len(draws), *self.samples.shape(items[0])), dtype=np.float32)
        for place, (draw, item) in enumerate(zip(draws, items, strict=True)):
            generator = self._generator_of(draw, 0)
            samples.append(self.samples.draw(item, generator))
            generator.standard_normal(dtype=np.float32, out=noise[place])
            time = generator.random()
            if self.density is not None:
                time = self.density.time(time)
            times.append(time if self._first_time is None else (self._first_time + draw * GOLDEN) % 1)
            told.append(self.samples.tell(item, generator))  # last, so that all else is drawn as without
        return {
            "sample": _stack(samples),
            "noise": torch.from_numpy(noise),
            "timesteps": self.schedule.timesteps(torch.tensor(times, dtype=torch.float32)),
            "conditioning": _stack(told),
        }

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the losses take it: `sample`, `[B, C, H, W]` float32 like `noise`; see `Samples.finish`."""
        batch = self.samples.finish(batch)
        return both_branches(batch, self.samples.nothing(batch["conditioning"])) if self.both_branches else batch

    def apart(
        self, count: int, *, device: torch.device | str = "cpu", guidance_dropout: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches of draws that no training step makes, the same on every process: to calibrate and measure on.

        Args:
            count: draws in all.
            device: of the batches.
            guidance_dropout: by default as in training; else each draw once, told what it is or, dropped, nothing.
        """
        samples = copy.copy(self.samples)
        samples.random_flip = False
        if guidance_dropout is not None:
            samples.guidance_dropout = guidance_dropout
        draws = Draws(
            samples,
            self.schedule,
            seed=self.seed + 2**32,
            batch_size=self.batch_size,
            both_branches=self.both_branches and guidance_dropout is None,
        )
        return draws.first(count, device=device)

    def first(self, count: int, *, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
        """Batches of the first `count` draws, on a device; see `alike`."""
        for numbers in self.alike(count):
            yield self.batch(numbers, device)

    def alike(self, count: int) -> Iterator[list[int]]:
        """Numbers of the first `count` draws, up to `batch_size` at a time, which are of samples of one shape."""
        buckets, found = self.samples.buckets, defaultdict[int, list[int]](list)
        for number in range(count):
            found[0 if buckets is None else int(buckets[self._index(number)])].append(number)
        for numbers in found.values():
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def batch(self, numbers: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Any]:
        """The draws of these numbers, finished, on a device."""
        return self.finish(_to(self[numbers], device))

    def loader(self, numbers: "DrawNumbers", *, num_workers: int, **options: Any) -> DataLoader:
        """Batches of training draws; give each to `received` once it is there, and to `finish` on the device.

        Args:
            numbers: of the draws, batch by batch.
            num_workers: processes that read.
            options: of torch's DataLoader.
        """
        if len(self.positions) != max(1, num_workers):
            self.positions = torch.tensor([Position()] * max(1, num_workers))
        streamed = None
        if self.stream is not None:
            without_head = copy.copy(self)  # which workers need not get
            without_head.samples = self.samples.without_images(self.stream.images)
            streamed = StreamedDraws(without_head, numbers, self.positions.clone())
        return DataLoader(
            self if streamed is None else streamed,
            sampler=numbers if streamed is None else None,  # of whole batches
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator(),  # the global one, which a resume restores, is left alone
            **options,
        )

    def received(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of the loader, once it is noted how far its reader has come."""
        if self.stream is not None:
            self.positions[batch.pop("reader")] = batch.pop("position")
        return batch

    def _index(self, draw: int) -> int:
        epoch, position = divmod(draw, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return int(self._order[position])

    def _order_of(self, epoch: int) -> np.ndarray:
        generator, buckets = self._generator_of(epoch, 1), self.samples.buckets
        if buckets is None:
            return generator.permutation(len(self.samples))
        if self.group_size is None:
            return generator.permutation(largest_bucket(buckets))
        return grouped_order(buckets, self.group_size, generator)

    def _generator_of(self, number: int, stream: int) -> np.random.Generator:
        """An independent generator per (seed, number, stream): Philox, Salmon et al., 2011, is made for that.

        It is one generator, set back: making one takes several times as long as what is drawn from it.
        """
        zeros = np.zeros(4, dtype=np.uint64)
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": zeros, "key": np.array([self.seed, 2 * number + stream], dtype=np.uint64)},
            "buffer": zeros,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


def both_branches(batch: Mapping[str, Any], nothing: Mapping[str, Any]) -> dict[str, Any]:
    """Each draw twice, `[2 B, ...]`: the batch as it is, then the same samples, noise and timesteps told nothing.

    A student that is asked both learns what guidance multiplies, the difference of the two (arXiv 2606.00798).

    Args:
        batch: `sample`, `noise`, `timesteps` and `conditioning`, `[B, ...]` each.
        nothing: conditioning of the dropped draws, built as the batch's is; empty leaves the batch as it is.
    """
    return _join(batch, {**batch, "conditioning": nothing}) if nothing else dict(batch)


def _join(first: Any, second: Any) -> Any:
    """Tensors of two (nested) mappings, one after the other."""
    if isinstance(first, Mapping):
        return {name: _join(value, second[name]) for name, value in first.items()}
    return torch.cat([first, second])


def _to(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {
        name: _to(value, device)
        if isinstance(value, dict)
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


def _stack(rows: Sequence[Any]) -> Any:
    """Rows of tensors, or of dictionaries of them, as one batch; all else, such as prompts, as a list."""
    first = rows[0]
    if isinstance(first, dict):
        return {name: _stack([row[name] for row in rows]) for name in first}
    return torch.stack(list(rows)) if isinstance(first, Tensor) else list(rows)


class DrawNumbers(Sampler[list[int]]):
    """The numbers of the draws in each of one process' batches, from a given step on.

    Args:
        first_step: the first optimizer step to draw for.
        num_steps: the step after the last one.
        batch_size: samples per process and forward pass.
        accumulation_steps: forward passes per optimizer step.
        process_index: which process this is.
        num_processes: how many there are.

    Attributes:
        passes: the numbers of the process' forward passes.

    Raises:
        ValueError: for a count below 1, a step below 0, or a process that there is not.
    """

    def __init__(
        self,
        *,
        first_step: int,
        num_steps: int,
        batch_size: int,
        accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        least = {"batch_size": batch_size, "accumulation_steps": accumulation_steps, "num_processes": num_processes}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if first_step < 0:
            raise ValueError(f"first_step must be at least 0, not {first_step}")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be 0 to {num_processes - 1}, not {process_index}")
        self.batch_size, self.process_index, self.num_processes = batch_size, process_index, num_processes
        self.passes = range(first_step * accumulation_steps, num_steps * accumulation_steps)

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for forward_pass in self.passes:
            first = (forward_pass * self.num_processes + self.process_index) * self.batch_size
            yield list(range(first, first + self.batch_size))


class StreamedDraws(IterableDataset):
    """What `Draws` draws, batch after batch, around images that come from a stream.

    Noise, flip, time and hidden label of draw n are a function of (seed, n), as there. Which image it gets depends on
    how many read, processes and workers: each takes the next of its own.

    Args:
        draws: with a stream.
        numbers: of this process.
        positions: of the process' readers, one for each worker (one without workers), `[readers, 4]` int64.
    """

    def __init__(self, draws: Draws, numbers: DrawNumbers, positions: Tensor):
        self.draws, self.numbers, self.positions = draws, numbers, positions

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """This worker's batches.

        Yields:
            What `Draws` does, with `reader`, which of the process' readers gave the images, and `position`,
            how far it has come.
        """
        stream, info = self.draws.stream, get_worker_info()
        assert stream is not None
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        assert len(self.positions) == num_workers
        reader = (self.numbers.passes.start + worker) % num_workers  # the loader's first batch is always worker 0's
        images = stream.read_images(
            Position(*self.positions[reader].tolist()),
            seed=self.draws.seed,
            reader=self.numbers.process_index * num_workers + reader,
            num_readers=self.numbers.num_processes * num_workers,
        )
        for numbers in islice(self.numbers, worker, None, num_workers):
            positions, pictures, labels = zip(*islice(images, len(numbers)), strict=True)
            told = labels if stream.label_column else [None] * len(labels)
            items = list(map(self.draws.samples.read_from, pictures, told))
            batch = self.draws.around(numbers, items)
            yield {**batch, "reader": torch.tensor(reader), "position": torch.tensor(positions[-1])}
