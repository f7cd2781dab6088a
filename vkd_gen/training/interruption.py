"""SIGTERM, SIGINT and the launcher's death: asked to stop, a run ends after its step, with a checkpoint."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

PARENT = os.getppid()
LAUNCHER_VARIABLES = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
"""`accelerate launch` sets the first for what it starts, torchrun the second."""
SAME_REQUEST_SECONDS = 2.0
"""A launcher hands on what the terminal or the cluster has already sent to all: within this time it is one request."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within this context SIGTERM and SIGINT are noted; a second one, later than 2 seconds, exits at once.

    The exit status is 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT (Ctrl-C). The launcher's death counts
    as SIGTERM: `accelerate launch` passes on no SIGTERM to its only child. What the process was started to ignore (a
    shell does that to SIGINT for what it starts by &), and all outside of the main thread, is not noted.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._is_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)

    def __enter__(self) -> "StopRequest":
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand the signals back; one that nobody has acted on is raised again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._noted and kind is None:
            signal.raise_signal(self._noted)

    def poll(self) -> int:
        """The signal to stop by; 0 for none."""
        if not self._noted and self._is_launched and os.getppid() != PARENT:
            self._noted = signal.SIGTERM
            print("the launcher has died; stopping after this step", file=sys.stderr, flush=True)
        return self._noted

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._noted:
            self._noted, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def outlive_sigterm(_worker: int = 0) -> None:
    """For processes that read images: a signal to all processes must not take them from a step that is to be finished.

    SIGTERM ends them after 30 seconds, SIGINT not at all; the training process ends them when it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
