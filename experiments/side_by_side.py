"""Several runs at a time, each in its own process with its share of the cores, or a GPU."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from plan import Run
from vkd_gen.provenance import write_json

SECONDS_TO_STOP = 60.0
"""How long runs that are asked to stop have for their step and their checkpoint."""
SECONDS_BETWEEN_POLLS = 0.1


@dataclass
class Job:
    """A run that is being made, or has ended; its folder gets log.txt and seconds.json beside the run's own files.

    Attributes:
        run: what is made.
        process: the process that makes it.
        place: the environment variables that it was given.
        log_start: bytes of its log that an earlier start wrote.
        started: by time.perf_counter.
    """

    run: Run
    process: subprocess.Popen[bytes]
    place: Mapping[str, str]
    log_start: int
    started: float = field(default_factory=time.perf_counter)

    def last_words(self) -> str:
        """The error in its log, or the last lines."""
        text = (self.run.folder / "log.txt").read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return "\n".join(errors[-1:] or lines[-3:]) or "nothing in its log"

    def note_seconds(self) -> float:
        """Add how long it ran to seconds.json, and return the sum over all starts of the run."""
        path = self.run.folder / "seconds.json"
        before: list[float] = []
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(path.read_text())
        seconds = [*before, round(time.perf_counter() - self.started, 2)]
        write_json(path, seconds)
        return round(sum(seconds), 2)


def places(num_jobs: int | None) -> list[dict[str, str]]:
    """Environment variables for each of the runs side by side: an equal share of the cores as threads, and a GPU.

    Args:
        num_jobs: how many; by default one per GPU, else one per core. More jobs than GPUs share them in turn.
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
    runs: Sequence[Run],
    places: Sequence[Mapping[str, str]],
    *,
    command_of: Callable[[Run], list[str]],
    on_end: Callable[[Job, float], None],
) -> None:
    """Make runs in their order, as many at a time as there are places.

    Whatever ends this early, such as Ctrl-C, asks the running processes to stop, and kills those that did not within a
    minute.

    Args:
        runs: the runs, in order.
        places: from `places`.
        command_of: gives the command of a run, when it starts.
        on_end: gets a job that has ended, whatever its status, and the seconds that the run took in all its starts.
    """
    waiting, free, running = list(runs), list(places), list[Job]()
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting[0], command_of(waiting[0]), free.pop(0)))
                waiting.pop(0)
            time.sleep(SECONDS_BETWEEN_POLLS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.place)
                on_end(job, job.note_seconds())
    finally:
        _end(running)


def _start(run: Run, command: list[str], place: Mapping[str, str]) -> Job:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # As if started by a launcher: such a run stops, with a checkpoint, when its parent dies.
            env={**os.environ, **place, "ACCELERATE_DYNAMO_BACKEND": "NO"},
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the runs to stop
        )
    return Job(run, process, place, log_start)


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
            job.note_seconds()
