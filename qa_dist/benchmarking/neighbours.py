"""How much of the machine others used while something was measured.

A process beside a measurement takes cores, caches and clock rate from it. Linux counts for each core how long it was
busy (`/proc/stat`), and for each process how long it and the processes that it has waited for were on a core; what is
left is the time of others: other programs, other users, and the hosts of virtual machines (`steal`). Cores that this
process may not use do not count. Elsewhere than on Linux nothing is known of others.
"""

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qa_dist.machine.usage import num_cores

MAX_OTHERS = 0.25
"""Cores that others may use on average. On two cores it is an eighth of them, and what a quiet machine's own services
use stays far below."""

MAX_OTHERS_SHARE = 0.02
"""The same as a share of the cores, which is more on large machines: they have more services."""

EXTRA_TRIES = 2
"""How often a disturbed measurement is made again."""

MIN_UNDISTURBED = 2
"""Undisturbed repeats that a headline needs."""

UNSTABLE = "unstable"
"""What stands for a headline that has fewer."""

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class Reading(NamedTuple):
    """What the machine has done until a moment.

    Attributes:
        wall_seconds: the time.
        own_seconds: CPU time of this process and of the processes that it has waited for.
        busy_seconds: CPU time of everybody on the cores that this process may use; None: not known.
    """

    wall_seconds: float
    own_seconds: float
    busy_seconds: float | None


def read_machine(stat: Path = Path("/proc/stat")) -> Reading:
    """What the machine has done until now. Processes that were started must have ended, and been waited for."""
    times = os.times()
    busy = None
    if hasattr(os, "sched_getaffinity") and stat.is_file():
        busy = busy_seconds(stat.read_text(encoding="ascii"), os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK"))
    return Reading(time.monotonic(), sum(times[:4]), busy)


def busy_seconds(text: str, cores: Collection[int], ticks_per_second: int) -> float | None:
    """Seconds that these cores have been busy, from the text of `/proc/stat`; None if it does not name them.

    Source: proc_stat(5). The time of guests is part of `user` and `nice`.
    """
    ticks, found = 0, 0
    for line in text.splitlines():
        name, *numbers = line.split()
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdecimal() and int(number) in cores:
            counts = dict(zip(_FIELDS, map(int, numbers), strict=False))
            ticks += sum(counts.get(field, 0) for field in _BUSY)
            found += 1
    return ticks / ticks_per_second if found == len(cores) else None


def describe(before: Reading, after: Reading, *, own_seconds: float | None = None) -> dict[str, Any]:
    """What JSON files hold of the time between two readings.

    `wall_seconds`, `cpu_seconds` of what was measured, the `others_cores` that others used on average (None: not
    known), and whether that is too many: `disturbed`.

    Args:
        before: When the measurement began.
        after: When it had ended.
        own_seconds: CPU time of all that was measured; None: of this process and those that it started.
    """
    wall = max(after.wall_seconds - before.wall_seconds, 1e-9)
    own = after.own_seconds - before.own_seconds if own_seconds is None else own_seconds
    others = None
    if before.busy_seconds is not None and after.busy_seconds is not None:
        # Both clocks tick, so that a little more than nothing may come out as less.
        others = max(0.0, after.busy_seconds - before.busy_seconds - own) / wall
    return {
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(own, 3),
        "others_cores": None if others is None else round(others, 3),
        "disturbed": others is not None and others > most_others(),
    }


def most_others() -> float:
    """Cores that others may use on average before a measurement counts as disturbed."""
    return max(MAX_OTHERS, MAX_OTHERS_SHARE * num_cores())


def undisturbed_result(
    measure: Callable[[], dict[str, Any]], *, read: Callable[[], Reading] | None = None
) -> dict[str, Any]:
    """A result with `neighbours` in it; a disturbed one is measured again, and the least disturbed is kept.

    Args:
        measure: Measures once, in processes that have ended when it returns.
        read: Reads the machine; None: `read_machine`.
    """
    read = read or read_machine
    results: list[dict[str, Any]] = []
    for _ in range(1 + EXTRA_TRIES):
        before = read()
        result = measure()
        results.append({**result, "neighbours": describe(before, read())})
        if not is_disturbed(results[-1]):
            break
    best = min(results, key=lambda each: each["neighbours"]["others_cores"] or 0.0)
    return {**best, "neighbours": {**best["neighbours"], "tries": len(results)}}


def is_disturbed(result: Mapping[str, Any]) -> bool:
    """Whether others used too much of the machine; results of earlier versions do not say so."""
    return bool(result.get("neighbours", {}).get("disturbed"))


def undisturbed(results: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The results that count: those that were not disturbed, or all if all were."""
    return [result for result in results if not is_disturbed(result)] or list(results)


def is_stable(*groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each group has as many undisturbed results as a headline needs."""
    return all(sum(not is_disturbed(result) for result in group) >= MIN_UNDISTURBED for group in groups)


def in_words(result: Mapping[str, Any]) -> str:
    """What is said behind a measurement; nothing if it was not disturbed."""
    if not is_disturbed(result):
        return ""
    noted = result["neighbours"]
    return f" (disturbed: others used {noted['others_cores']:.2f} cores)"


def warn(noted: Mapping[str, Any]) -> None:
    """Say on standard error that what was measured was disturbed, if it was."""
    if noted["disturbed"]:
        sys.stderr.write(
            f"warning: others used {noted['others_cores']:.2f} cores meanwhile; measure again on a quiet machine\n"
        )
