"""metrics.jsonl and timings.jsonl: figures of every step (and evaluation) of a run, a line each."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qa_dist.common.files import staged


class MetricsLog:
    """One of both files: lines of figures with their step, flushed at once so that nothing is lost."""

    def __init__(self, path: Path | None) -> None:
        """Log to `path`, which is made with the first line; without one (ranks other than 0) everything is dropped."""
        self._path = path
        self._mode = "w"
        self._file: IO[str] | None = None

    def go_on_after(self, step: int, *, evaluates_again: bool = False) -> None:
        """Append to the log of an earlier run, whose lines behind `step` are removed: they will be written again.

        So is that of an evaluation after `step`, if the run `evaluates_again`.
        """
        if not self._path or not self._path.exists():
            return
        kept = [
            line
            for line in self._path.read_bytes().splitlines(keepends=True)
            if _step_of(line) <= step and not (evaluates_again and _step_of(line) == step and b'"eval_' in line)
        ]
        with staged(self._path) as aside:
            aside.write_bytes(b"".join(kept))
        self._mode = "a"

    def write(self, values: Mapping[str, float | None]) -> None:
        if self._path and not self._file:
            self._file = self._path.open(self._mode, encoding="utf-8")
        if self._file:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def synchronise(self) -> None:
        """Wait until the lines are on the disk, as those before a checkpoint must be when it is."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            # A line that the disk has refused would be tried again.
            with suppress(OSError):
                self._file.close()


def logged_figures(path: Path) -> list[dict[str, Any]]:
    """The figures of each line of such a log, in order; none without a log, and none of a line that was cut short."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: bytes) -> float:
    """Step of a line; of a line that was cut short, infinity."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
