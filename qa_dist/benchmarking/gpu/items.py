"""Runs items one after another: each under its own limit, and its result on the disk before the next one starts.

Time on a rented machine ends without a word. So every item is a line of JSON that is written, and synchronised, when
the item ends; an item that fails leaves its traceback there and the next one starts.
"""

import gc
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args

from qa_dist.common.secrets import masked

Figures = dict[str, Any]
Status = Literal["passed", "failed", "skipped", "not reached"]

_GRACE_SECONDS = 20.0
"""How long an item may go on after its limit, inside a library that no exception reaches."""

_TRACEBACK_LINES = 25
_MIN_SECONDS = 3.0


class Skipped(Exception):  # noqa: N818 - it is no error
    """Raised by an item that cannot be done here; the message is the reason."""


def require_installed(*names: str) -> None:
    """Make sure of modules that an item needs.

    Raises:
        Skipped: One is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise Skipped(f"{name} is not installed")


class Failed(AssertionError):  # noqa: N818 - what it says is a result
    """Raised by an item whose figures are wrong; they are kept beside the sentence that says what is wrong."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class _TooLong(BaseException):
    """An item's time is over. No `Exception`: libraries catch those."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to check or to measure.

    Attributes:
        name: as in the results.
        part: "a" is a check, "b" a measurement.
        seconds: the longest it may take.
        work: does it; returns figures.
        least: with fewer seconds left of the whole time, it is not begun.
    """

    name: str
    part: Literal["a", "b"]
    seconds: float
    work: Callable[[], Figures | None]
    least: float = _MIN_SECONDS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item.

    Attributes:
        item: its name.
        part: its part.
        status: a word.
        seconds: how long it took.
        figures: what it found.
        reason: why it was skipped, failed or not reached.
        traceback: the last lines of the traceback of a failure.
    """

    item: str
    part: str
    status: Status
    seconds: float
    figures: Figures
    reason: str = ""
    traceback: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"item": self.item, "part": self.part, "status": self.status}
        values |= {"seconds": round(self.seconds, 3), "figures": self.figures}
        if self.reason:
            values["reason"] = self.reason
        if self.traceback:
            values["traceback"] = list(self.traceback)
        return values


class Log:
    """A file of JSON lines that is on the disk after every line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps(_plain(values), allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_items(
    items: Sequence[Item],
    log: Log,
    *,
    seconds: float | None,
    started: float,
    notice: Callable[[str], object],
) -> list[Outcome]:
    """What became of all items, in their order.

    Args:
        items: The most important first.
        log: Where each outcome is written at once.
        seconds: The time that all may take; None: no limit. What does not fit is "not reached".
        started: When that time began, on `time.monotonic`'s clock.
        notice: Called with a line about each.
    """
    outcomes: list[Outcome] = []
    end = math.inf if seconds is None else started + seconds
    for number, item in enumerate(items):
        left = end - time.monotonic()
        if left < item.least:
            outcome = _not_reached(item, f"{max(0.0, left):.0f} s were left")
        else:
            rest = items[number + 1 :]
            outcome = _run_item(item, min(item.seconds, left), lambda: _give_up(log, outcomes, item, rest))  # noqa: B023
        log.write(outcome.to_json())
        outcomes.append(outcome)
        notice(_in_words(outcome))
    return outcomes


def _not_reached(item: Item, reason: str) -> Outcome:
    return Outcome(item.name, item.part, "not reached", 0.0, {}, reason)


def _run_item(item: Item, limit: float, give_up: Callable[[], None]) -> Outcome:
    begin = time.monotonic()

    def outcome(status: Status, figures: Figures | None = None, reason: str = "", lines: Sequence[str] = ()) -> Outcome:
        return Outcome(
            item.name, item.part, status, time.monotonic() - begin, figures or {}, masked(reason), tuple(lines)
        )

    try:
        with _time_limit(limit, give_up):
            return outcome("passed", item.work())
    except Skipped as skip:
        return outcome("skipped", reason=str(skip))
    except _TooLong as error:
        if limit < item.seconds:
            return outcome("not reached", reason=f"it was not done in the {limit:.0f} s that were left")
        return outcome("failed", reason=f"not done after {limit:.0f} s", lines=_last_lines(error))
    except Exception as error:
        figures = error.figures if isinstance(error, Failed) else None
        reason = f"{type(error).__name__}: {error}"
        return outcome("failed", figures, _shortened(reason), _last_lines(error))
    finally:
        _free_memory()


@contextmanager
def _time_limit(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Raise `_TooLong` in the main thread when the time is over; call `give_up` when that has not helped.

    The alarm is delivered between two Python instructions. It does not interrupt a library that waits in C - a kernel
    that hangs, a collective operation whose other ranks have gone - and what is started as a process of its own ends
    only because `qa_dist.benchmarking.gpu.processes` kills it on the way. For the first there is a timer thread, which
    needs the interpreter's lock: torch gives it up while it waits for a device.
    """

    def ring(_: int, frame: FrameType | None) -> NoReturn:
        raise _TooLong(f"in {frame.f_code.co_qualname}" if frame else "")

    def too_late() -> None:
        give_up()
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds + _GRACE_SECONDS, too_late)
    timer.daemon = True
    before = signal.signal(signal.SIGALRM, ring)
    begin = time.monotonic()
    # Somebody else's alarm - a test runner's - goes on afterwards.
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    timer.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        timer.cancel()
        signal.signal(signal.SIGALRM, before)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, others - (time.monotonic() - begin)))


def _give_up(log: Log, outcomes: Sequence[Outcome], item: Item, rest: Sequence[Item]) -> None:
    """Write what is known, before the process ends."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = "".join(traceback.format_stack(frame) if frame else []).splitlines()[-_TRACEBACK_LINES:]
    reason = "it hangs in a library that cannot be interrupted; the process ended here"
    hung = Outcome(item.name, item.part, "failed", item.seconds, {}, reason, tuple(lines))
    last = [hung, *(_not_reached(later, f"{item.name} hung") for later in rest)]
    for outcome in last:
        log.write(outcome.to_json())
    sys.stderr.write(f"{_in_words(hung)}\n{table([*outcomes, *last])}")


def _free_memory() -> None:
    """Leave nothing of an item on the device; a traceback holds frames, and they hold tensors."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _last_lines(error: BaseException) -> list[str]:
    lines = "".join(traceback.format_exception(error)).splitlines()[-_TRACEBACK_LINES:]
    traceback.clear_frames(error.__traceback__)
    return [masked(line[:400]) for line in lines]


def _shortened(text: str, longest: int = 1000) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def _plain(value: Any) -> Any:
    """The value in what JSON has: numbers that are not finite as text, five digits of the others."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)


def _in_words(outcome: Outcome) -> str:
    figures = ", ".join(f"{name} {_shown(value)}" for name, value in outcome.figures.items() if is_number(value))
    said = outcome.reason or figures
    return f"{outcome.part} {outcome.item}: {outcome.status} in {outcome.seconds:.1f} s; {_shortened(said, 300)}"


def is_number(value: Any) -> bool:
    """Whether a figure is one that can be shown as such."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each item: what became of it, and how long it took."""
    width = max((len(outcome.item) for outcome in outcomes), default=0)
    lines = [
        f"{outcome.part} {outcome.item:<{width}} {outcome.status:<11} {outcome.seconds:7.1f} s  "
        f"{_shortened(' '.join(outcome.reason.split()), 70)}".rstrip()
        for outcome in outcomes
    ]
    counts = Counter(outcome.status for outcome in outcomes)
    return "\n".join([*lines, ", ".join(f"{counts[status]} {status}" for status in get_args(Status)), ""])
