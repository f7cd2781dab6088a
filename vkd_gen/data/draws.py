"""What a run draws: image, noise, flip, time and hidden label of each training sample, by its number.

C channels, H height, W width.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from vkd_gen.data.images import Images
from vkd_gen.data.streaming import ImageStream, Position
from vkd_gen.schedule import Schedule


class Draws(Dataset):
    """What a run draws for its n-th sample, as a pure function of (seed, n).

    Image, flip, noise, time and label of draw n do not depend on batch size, number of processes or what was drawn
    before: any split of the run into steps and processes trains on the same draws, and resuming is starting at
    another n. Each pass through the images has a permutation of its own.

    Args:
        images: the training images; of a stream its head, which calibration and inheritance draw from.
        schedule: of the student.
        seed: of the run, 0 or above.
        random_flip: mirror half of the images.
        guidance_dropout: share of the draws whose label is "no class" instead of the image's, which is what
            classifier-free guidance needs (Ho and Salimans, 2022, arXiv 2207.12598); only for images with labels.
        stream: to train on instead of the images.
        batch_size: of `apart` and `first`.

    Attributes:
        positions: how far this process' readers of the stream have come, `[readers, 4]` int64.
    """

    def __init__(
        self,
        images: Images,
        schedule: Schedule,
        *,
        seed: int,
        random_flip: bool = False,
        guidance_dropout: float = 0.0,
        stream: ImageStream | None = None,
        batch_size: int = 64,
    ):
        if seed < 0:
            raise ValueError(f"seed must be 0 or above, not {seed}")
        if seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {seed}")
        if not 0 <= guidance_dropout < 1:
            raise ValueError(f"guidance_dropout must be at least 0 and below 1, not {guidance_dropout}")
        self.images, self.schedule, self.stream = images, schedule, stream
        self.seed, self.random_flip, self.guidance_dropout = seed, random_flip, guidance_dropout
        self.batch_size = batch_size
        self.positions = torch.tensor([Position()])
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._kept: dict[int, Tensor] = {}
        self._generator = np.random.Generator(np.random.Philox(key=0))

    def __getitem__(self, draws: Sequence[int]) -> dict[str, Any]:
        """A batch of the draws of these numbers.

        Returns:
            `sample` and `noise`, `[B, C, H, W]` float32; `timesteps`, `[B]` int64, of uniformly drawn times; and
            `conditioning`, keyword arguments of the network: for images with labels `class_labels`, `[B]` int64, the
            image's class or `num_classes` for "no class".
        """
        indices = [self._index(draw) for draw in draws]
        labels = None if self.images.labels is None else [self.images.label(index) for index in indices]
        return self.around(draws, [self._sample(index) for index in indices], labels)

    def around(self, draws: Sequence[int], images: Sequence[Tensor], labels: Sequence[int] | None) -> dict[str, Any]:
        """What is drawn beside the image, whichever image it is.

        Args:
            draws: numbers of the draws.
            images: one for each, `[C, H, W]` float32.
            labels: their classes; None without labels.

        Returns:
            What `__getitem__` does.
        """
        samples, times, drawn_labels = [], [], []
        noise = np.empty((len(draws), *images[0].shape), dtype=np.float32)
        for place, (draw, sample) in enumerate(zip(draws, images, strict=True)):
            generator = self._generator_of(draw, 0)
            samples.append(sample.flip(-1) if generator.random() < 0.5 and self.random_flip else sample)
            generator.standard_normal(dtype=np.float32, out=noise[place])
            times.append(generator.random())
            if labels is not None:  # last, so that all else is drawn as without labels
                is_dropped = generator.random() < self.guidance_dropout
                drawn_labels.append(self.images.num_classes if is_dropped else labels[place])
        return {
            "sample": torch.stack(samples),
            "noise": torch.from_numpy(noise),
            "timesteps": self.schedule.timesteps(torch.tensor(times, dtype=torch.float32)),
            "conditioning": {} if labels is None else {"class_labels": torch.tensor(drawn_labels)},
        }

    def apart(
        self, count: int, *, device: torch.device | str = "cpu", guidance_dropout: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches of draws that no training step makes, the same on every process: to calibrate and measure on.

        Args:
            count: draws in all.
            device: of the batches.
            guidance_dropout: by default as in training.
        """
        dropout = self.guidance_dropout if guidance_dropout is None else guidance_dropout
        draws = Draws(
            self.images,
            self.schedule,
            seed=self.seed + 2**32,
            guidance_dropout=dropout,
            batch_size=self.batch_size,
        )
        return draws.first(count, device=device)

    def first(self, count: int, *, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
        """Batches of the first `count` draws, on a device."""
        for start in range(0, count, self.batch_size):
            yield _to(self[range(start, min(start + self.batch_size, count))], device)

    def loader(self, numbers: "DrawNumbers", *, num_workers: int, **options: Any) -> DataLoader:
        """Batches of training draws; give each to `received` once it is there.

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
            without_head.images = self.stream.images
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
        epoch, position = divmod(draw, len(self.images))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._generator_of(epoch, 1).permutation(len(self.images))
        return int(self._order[position])

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

    def _sample(self, index: int) -> Tensor:
        """Image `index`; those of a small set are decoded once, except by processes that do nothing else."""
        if index in self._kept:
            return self._kept[index]
        sample = self.images[index]
        if len(self.images) * sample.nbytes <= KEPT_BYTES and get_worker_info() is None:
            self._kept[index] = sample
        return sample


def _to(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: _to(value, device) if isinstance(value, dict) else value.to(device) for name, value in batch.items()}


KEPT_BYTES = 2**28
"""Training images that take no more than this as float32 stay in memory, decoded."""


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
        images = stream.read(
            Position(*self.positions[reader].tolist()),
            seed=self.draws.seed,
            reader=self.numbers.process_index * num_workers + reader,
            num_readers=self.numbers.num_processes * num_workers,
        )
        for numbers in islice(self.numbers, worker, None, num_workers):
            positions, samples, labels = zip(*islice(images, len(numbers)), strict=True)
            batch = self.draws.around(numbers, samples, labels if stream.label_column else None)
            yield {**batch, "reader": torch.tensor(reader), "position": torch.tensor(positions[-1])}
