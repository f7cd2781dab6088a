"""Several runs at a time, each a process of its own with its share of the cores, or a GPU."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vkd_gen.files import NO_LOCKS
from vkd_gen.provenance import write_json

SECONDS_TO_STOP = 60.0
"""How long runs that are asked to stop have for their step and their checkpoint."""
SECONDS_BETWEEN_LOOKS = 0.1
"""How often is looked after runs that may have ended."""


@dataclass(frozen=True)
class Task:
    """A run to make: its name, and the folder that its log.txt and seconds.json go to beside what it writes itself."""

    name: str
    folder: Path


@dataclass
class Job:
    """A task that is being made, or has ended.

    Attributes:
        task: what for.
        process: that makes it.
        place: environment variables that it was given.
        started: by time.perf_counter.
        log_start: bytes of its log that an earlier start wrote.
    """

    task: Task
    process: subprocess.Popen[bytes]
    place: Mapping[str, str]
    started: float
    log_start: int

    def last_words(self) -> str:
        """The error in its log, or the last lines."""
        path = self.task.folder / "log.txt"
        text = path.read_bytes()[self.log_start :].decode(errors="replace").replace("\r", "\n")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return "\n".join(errors[-1:] or lines[-3:]) or "nothing in its log"


def places(num_jobs: int | None) -> list[dict[str, str]]:
    """For each of the runs side by side environment variables: threads, an equal share of the cores, and its GPU.

    Args:
        num_jobs: how many; by default one per GPU, else one per core. More than GPUs share them in turn.
    """
    import torch  # here, since it takes seconds to load

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    num_gpus = torch.cuda.device_count()
    gpus = named[:num_gpus] if named else [str(number) for number in range(num_gpus)]
    num_jobs = num_jobs or len(gpus) or num_cores
    threads = str(max(1, num_cores // num_jobs))
    shares = [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} for _ in range(num_jobs)]
    if gpus:
        shares = [{**share, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i, share in enumerate(shares)]
    return shares


def run_side_by_side(
    tasks: Sequence[Task],
    places: Sequence[Mapping[str, str]],
    *,
    command_of: Callable[[Task], list[str]],
    on_end: Callable[[Job, float], None],
    on_tick: Callable[[Sequence[Task], Sequence[Job]], None] = lambda waiting, running: None,
    lock: int | None = None,
) -> None:
    """Make tasks in their order, as many at a time as there are places.

    What ends this early, as Ctrl-C, asks the running processes to stop, and after a minute kills those that did not.

    Args:
        tasks: in order.
        places: from `places`.
        command_of: the command of a task, asked for when it starts.
        on_end: gets a job that has ended, whatever its status, and the seconds that the task took in all its starts.
        on_tick: gets what waits and what runs, some times a second.
        lock: from `alone_in`; the processes hold it too, also if this one is killed before them.
    """
    waiting, free, running = list(tasks), list(places), list[Job]()
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting[0], command_of(waiting[0]), free.pop(0), lock))
                waiting.pop(0)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.place)
                on_end(job, _note_seconds(job))
            on_tick(waiting, running)
    finally:
        _end(running)


def _start(task: Task, command: list[str], place: Mapping[str, str], lock: int | None) -> Job:
    task.folder.mkdir(parents=True, exist_ok=True)
    path = task.folder / "log.txt"
    with path.open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # As from a launcher: a run that knows of one stops, with a checkpoint, when it dies.
            env={**os.environ, **place, "ACCELERATE_DYNAMO_BACKEND": "NO"},
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # Ctrl-C is for this process, which hands it on
        )
    return Job(task, process, place, time.perf_counter(), log_start)


def _note_seconds(job: Job) -> float:
    """Write down how long it ran; the sum over all its starts."""
    path = job.task.folder / "seconds.json"
    before: list[float] = []
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.read_text())
    seconds = [*before, round(time.perf_counter() - job.started, 2)]
    write_json(path, seconds)
    return round(sum(seconds), 2)


def _end(running: Sequence[Job]) -> None:
    for job in running:
        job.process.terminate()
    until = time.monotonic() + SECONDS_TO_STOP
    for job in running:
        try:
            job.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        with contextlib.suppress(OSError):  # a full disk may be what ended it
            _note_seconds(job)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Hold a folder, so that no other process that asks for it gets it.

    Yields:
        The lock as a file descriptor: a child that it is passed to holds the folder too, until it ends.

    Raises:
        ValueError: if another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:  # never emptied, whoever's it is
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"another comparison, or a run of one that was killed, is running in {folder}; wait for its end, "
                    "or choose another --output_dir"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            print(f"note: {folder} is on a file system without locks: see that no second comparison is started in it")
        yield file.fileno()


def remaining_seconds(waiting: Sequence[float], running: Sequence[tuple[float, float]], num_places: int) -> float:
    """How long runs will still take side by side, about.

    >>> remaining_seconds([60.0, 60.0], [(60.0, 30.0), (60.0, 90.0)], num_places=2)
    75.0

    Args:
        waiting: expected seconds of each.
        running: expected and past seconds of each.
        num_places: how many run at a time.
    """
    left = [max(0.0, expected - past) for expected, past in running]
    share = (sum(waiting) + sum(left)) / max(1, min(num_places, len(waiting) + len(running)))
    return max([share, *waiting, *left])
