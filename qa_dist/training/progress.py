"""What a run tells while it goes on, and the record it leaves: progress bar, metrics.jsonl, run.json."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qa_dist.common.files import replacing


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step did: its mean loss, the gradient's norm before clipping, and how much it saw.

    The norm is infinite if the step was skipped: its float16 gradient had overflowed.
    """

    loss: float
    grad_norm: float
    num_features: int
    num_tokens: int
    stop: bool = False
    """Whether some rank was asked to stop; the same on all ranks."""


@dataclass
class Stopwatch:
    """Seconds spent in each phase of a run, in order of first appearance."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class MetricsLog:
    """metrics.jsonl: a line per optimiser step and per evaluation, flushed at once so that nothing is lost."""

    def __init__(self, path: Path | None) -> None:
        """Log to `path`, which is made with the first line; without one (ranks other than 0) everything is dropped."""
        self._path = path
        self._mode = "w"
        self._file: IO[str] | None = None

    def go_on_after(self, step: int) -> None:
        """Append to the log of an earlier run, whose lines behind `step` are removed: they will be written again."""
        if not self._path or not self._path.exists():
            return
        kept = [line for line in self._path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        with replacing(self._path) as staged:
            staged.write_bytes(b"".join(kept))
        self._mode = "a"

    def write(self, values: Mapping[str, float | None]) -> None:
        """Append one line."""
        if self._path and not self._file:
            self._file = self._path.open(self._mode, encoding="utf-8")
        if self._file:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            # A line that the disk has refused would be tried again.
            with suppress(OSError):
                self._file.close()


def _step_of(line: bytes) -> float:
    """Step of a line of metrics.jsonl; of a line that was cut short, infinity."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


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
        """Count one optimiser step."""
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

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
