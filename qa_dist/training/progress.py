"""How far a run is and where its time goes: the progress bar and the stopwatch."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds spent in each phase of a run, in order of first appearance, and in the phase that ended last."""

    seconds: dict[str, float] = field(default_factory=dict)
    latest: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.latest = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + self.latest


class Progress:
    """A bar over the optimiser steps with loss, learning rate, throughput and time left."""

    def __init__(self, num_steps: int, *, start: int = 0, shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=num_steps, initial=start, disable=not shown, unit="step", dynamic_ncols=True, file=sys.stderr
        )
        self._started = time.perf_counter()
        self._paused = 0.0
        self._features = 0
        self._tokens = 0

    def step(self, *, loss: float, learning_rate: float, num_features: int, num_tokens: int) -> None:
        self._features += num_features
        self._tokens += num_tokens
        seconds = time.perf_counter() - self._started - self._paused
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, lr {learning_rate:.1e}, {self._features / seconds:,.1f} features/s, "
            f"{self._tokens / seconds:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out of the throughput."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def notice(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
