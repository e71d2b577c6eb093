"""A sweep as a table: a row per method, the mean and the deviation of its seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qa_dist.common.columns import aligned

HEADINGS = (
    "method",
    "trainable parameters",
    "seeds",
    "EM",
    "F1",
    "minutes of training",
    "peak memory, MiB",
    "saved, MiB",
)


def rows(sweep: Mapping[str, Any]) -> list[list[str]]:
    """A row per method, the best mean F1 first, and those without one at the end.

    Scores are the mean over the seeds and, behind it, the standard deviation of a sample; minutes and the size of what
    was saved are means, and the memory is the most of any seed. Of a method of which no seed has come to its end there
    are the scores of the last rung that all seeds with a score have, and the row says so. A method with a run that
    failed, diverged or was not finished shows what it has, and says that too.

    Args:
        sweep: The content of a file that `record.write_sweep` wrote.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for trial in sweep["trials"]:
        by_method.setdefault(trial["method"], []).append(trial)
    found = [_row(method, trials) for method, trials in by_method.items()]
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _row(method: str, trials: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], list[str]]:
    done = [trial for trial in trials if trial["status"] == "done"]
    step = None
    if done:
        scored, figures = done, [trial["final"] for trial in done]
    else:
        scored = [trial for trial in trials if trial["rungs"]]
        by_step = [{rung["step"]: rung for rung in trial["rungs"]} for trial in scored]
        step = max(set.intersection(*map(set, by_step)), default=0) if scored else 0
        figures = [rungs[step] for rungs in by_step] if step else []
    notes = [f"after {step} steps"] if step else []
    for status in ("failed", "diverged", "stopped"):
        count = sum(trial["status"] == status for trial in trials)
        notes += [f"{count} {status}"] if count else []
    exact = [figure["exact_match"] for figure in figures if figure and "exact_match" in figure]
    f1 = [figure["f1"] for figure in figures if figure and "f1" in figure]
    row = [
        f"{method} ({'; '.join(notes)})" if notes else method,
        _figure(scored, "trainable_parameters", 1, "{:,.0f}"),
        str(len(f1)),
        spread(exact),
        spread(f1),
        _figure([_train_seconds(trial) for trial in scored], "train", 60, "{:.2f}"),
        _figure(scored, "peak_memory_bytes", 2**20, "{:,.0f}", max),
        _figure(scored, "saved_bytes", 2**20, "{:.2f}"),
    ]
    order = 2 if not f1 else 1 if step else 0
    return (order, -statistics.fmean(f1) if f1 else 0.0), row


def _train_seconds(trial: Mapping[str, Any]) -> Mapping[str, Any]:
    """Seconds of the training of a run under `train`: those of all its starts, where its record has them."""
    seconds = trial.get("train_seconds")
    return trial.get("phase_seconds") or {} if seconds is None else {"train": seconds}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the scores of some seeds."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _figure(
    items: Sequence[Mapping[str, Any]],
    name: str,
    unit: float,
    form: str,
    of_all: Callable[[Sequence[float]], float] = statistics.fmean,
) -> str:
    values = [item[name] / unit for item in items if item.get(name) is not None]
    return form.format(of_all(values)) if values else "-"


def markdown(sweep: Mapping[str, Any]) -> str:
    """The table of a sweep as Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows(sweep)), ""])


def text(sweep: Mapping[str, Any]) -> str:
    """The table of a sweep in columns, for a terminal."""
    return "\n".join([*aligned([HEADINGS, *rows(sweep)], left=(0,)), ""])
