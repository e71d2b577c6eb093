"""A thread in every rank that ends a run which makes no progress, and says where it hung.

Without it, one rank that hangs leaves the others waiting in a collective until that gives up, minutes later, and none
of them knows why. Each rank watches itself only: the rank that hangs ends, and the others lose it and end too.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WAITING_FACTOR = 2
"""A rank that waits for others is given this many times longer, so that the one that hangs speaks first."""


class Watchdog:
    """Watches the time since this rank last made progress.

    Attributes:
        phase: What the rank is doing, in words: "step 17".
    """

    def __init__(
        self,
        seconds: float,
        on_hang: Callable[[str], object] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to watch.

        Args:
            seconds: Longest time without progress; twice as long while the rank waits for others.
            on_hang: Called, in another thread, with a sentence about the hang; the default says it, with the stack of
                every thread, and ends the process.
            clock: Tells the time in seconds.
        """
        self.phase = "start"
        self._seconds = seconds
        self._on_hang = on_hang or _end
        self._clock = clock
        self._waiting = False
        self._last = clock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch: what may take long, such as downloads and tokenisation, is over."""
        self._last = self._clock()
        if math.isinf(self._seconds):
            return
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End watching."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, phase: str) -> None:
        """The rank makes progress and begins `phase`."""
        self.phase = phase
        self._last = self._clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block the rank waits for other ranks; what fails there is noted to have failed in this phase.

        A block inside another one changes nothing.
        """
        if self._waiting:
            yield
            return
        self._waiting, self._last = True, self._clock()
        try:
            yield
        except Exception as error:
            error.add_note(f"it was in {self.phase}")
            raise
        finally:
            # In this order: a check in between must not take the time of waiting for one without progress.
            self._last = self._clock()
            self._waiting = False

    def check(self) -> None:
        """Look once, and tell a hang if there is one; the first is told, and ends watching."""
        waiting, idle = self._waiting, self._clock() - self._last
        limit = self._seconds * (WAITING_FACTOR if waiting else 1)
        if idle > limit and not self._stopped.is_set():
            self._stopped.set()
            what = "has waited for the other ranks" if waiting else "has made no progress"
            self._on_hang(f"{what} for {limit:g} s in {self.phase}; the run ends (--hang_timeout {self._seconds:g})")

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            self.check()


def _end(sentence: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"[rank {rank}] {sentence}; the stacks of its threads:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(all_threads=True)
    # The main thread hangs; nothing but this ends the process.
    os._exit(1)
