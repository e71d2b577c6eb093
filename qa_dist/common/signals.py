"""Being asked to stop: signals become a request that the run answers between two steps."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_STOPPED = 85
"""Exit code of a run that was asked to stop, wrote a checkpoint and can be resumed."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM is what launchers and `kill` send, SIGUSR1 what Slurm can be told to send before its time limit."""

SECONDS_OF_ONE_INTERRUPT = 1.0
"""Ctrl-C reaches a rank twice, from the terminal and from its launcher; what comes later is a second Ctrl-C."""


class Stopped(Exception):  # noqa: N818 - nothing failed
    """The run was asked to stop and all ranks have agreed to; raised on every rank alike."""

    def __init__(self, by: signal.Signals) -> None:
        self.by = by
        super().__init__(f"stopped by {by.name}")

    @property
    def exit_code(self) -> int:
        """What the process exits with: 130 after Ctrl-C, as shells expect, else `EXIT_STOPPED`."""
        return 128 + signal.SIGINT if self.by == signal.SIGINT else EXIT_STOPPED


class StopSignals:
    """Notes the signals that ask a run to stop while it is the current context manager.

    A second Ctrl-C ends the process at once with `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at and now - self._interrupted_at > SECONDS_OF_ONE_INTERRUPT:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self.received = self.received or signal.Signals(number)
