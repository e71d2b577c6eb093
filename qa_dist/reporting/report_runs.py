"""What a report says of runs themselves: how far they came, what they ran with, and where they differ."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qa_dist.common.parsers import is_number
from qa_dist.common.secrets import masked
from qa_dist.config.options import RunConfig
from qa_dist.reporting.run_folders import Run

UNKNOWN = "\u2013"

Scores = Mapping[str, Any]


class Row(NamedTuple):
    """A row of a table with a column for each run."""

    name: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs have not all the same there."""
        return len(set(self.cells)) > 1


def state(run: Run) -> str:
    """How far a run came, in a few words."""
    if run.record:
        return "ended" if run.numbers("seconds") else "ended (written by an earlier version)"
    if not run.config and not len(run.steps["step"]):
        return "an evaluation" if run.metrics else "nothing noted"
    return f"going on, or cut off after step {run.num_steps:,}" if run.num_steps else "no step yet"


def figures(run: Run, analyzed: Scores | None) -> Iterator[tuple[str, str, str]]:
    """The figures of a run at a glance: what each is, the figure, and something to it.

    Args:
        run: the run.
        analyzed: its part of an analysis, with intervals; None without one.
    """
    final, latest = run.part("final") or run.metrics, run.evaluations[-1] if run.evaluations else {}
    for name, title in (("f1", "F1"), ("exact_match", "Exact match")):
        if analyzed is not None:
            low, high = analyzed[name]["low"], analyzed[name]["high"]
            within = "one context: no interval" if low is None else f"{low:.2f} to {high:.2f}"
            yield title, f"{analyzed[name]['value']:.2f}", within
        elif is_number(final.get(name)):
            yield title, f"{final[name]:.2f}", "as the run noted it"
        elif name in latest:
            yield title, f"{latest[name]:.2f}", f"evaluation at step {int(latest['step']):,}"
    losses = run.steps["loss"]
    if np.isfinite(losses).any():
        last = losses[np.isfinite(losses)][-max(1, len(losses) // 20) :]
        yield (
            "Training loss",
            f"{last.mean():#.4g}",
            f"mean of the last {len(last):,} steps" if len(last) > 1 else "last step",
        )
    planned = run.record.get("num_steps")
    if run.num_steps:
        is_short = is_number(planned) and planned != run.num_steps
        yield "Steps", f"{run.num_steps:,}", f"of {planned:,}" if is_short else ""
    tokens = np.nansum(run.steps["num_tokens"])
    seconds = run.numbers("seconds").get("train", 0.0)
    # A run that went on from a checkpoint noted the seconds of its last process alone.
    is_whole = not run.record.get("resumed_at_steps")
    if tokens:
        yield "Tokens trained on", _short(tokens), f"{tokens / seconds:,.0f} a second" if seconds and is_whole else ""
    if seconds:
        in_all = f"{duration(sum(run.numbers('seconds').values()))} in all"
        yield "Time of training", duration(seconds), in_all if is_whole else "in its last process"
    if memory := peak_memory(run):
        yield "Most memory of a rank", f"{max(memory) / 2**30:.2f} GiB", f"{len(memory)} rank{'s' * (len(memory) > 1)}"


def peak_memory(run: Run) -> list[float]:
    """The most memory that each rank used, in bytes; empty where it is not noted."""
    noted = run.record.get("peak_memory_bytes_per_rank")
    return [float(value) for value in noted if is_number(value)] if isinstance(noted, list) else []


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _short(number: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def option_rows(runs: Sequence[Run]) -> list[Row]:
    """Every option that a run's config.yaml has, in its order."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [
        Row(str(name), tuple(_option(run.config[name]) if name in run.config else UNKNOWN for run in runs))
        for name in names
    ]


def chosen_options(runs: Sequence[Run]) -> list[Row]:
    """Of one run the options that are not the defaults of this version; of several, those in which they differ."""
    rows = option_rows([run for run in runs if run.config])
    if len(runs) > 1:
        return [row for row in option_rows(runs) if row.differs]
    defaults = {name: _option(value) for name, value in RunConfig().flat().items()}
    return [row for row in rows if row.cells[0] != defaults.get(row.name)]


def _option(value: Any) -> str:
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def fact_rows(runs: Sequence[Run]) -> list[Row]:
    """What runs noted of themselves: when and how they ran, on what, with which versions and data."""
    columns = [dict(_facts(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [Row(name, tuple(column.get(name) or UNKNOWN for column in columns)) for name in names]
    return [row for row in rows if set(row.cells) != {UNKNOWN}]


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    record, hardware = run.record, run.part("hardware")
    for name in ("started", "finished"):
        yield name, _time(record.get(name))
    command = record.get("command")
    # Whoever wrote run.json may not have.
    yield "command", masked(" ".join(map(str, command))) if isinstance(command, list) else ""
    yield "ranks", _plain(record.get("world_size"))
    yield "strategy", _plain(record.get("strategy"))
    yield "steps", _plain(record.get("num_steps"))
    yield "weights of step", _plain(record.get("weights_of_step"))
    resumed = record.get("resumed_at_steps")
    yield "resumed after steps", ", ".join(map(_plain, resumed)) if isinstance(resumed, list) else ""
    yield "skipped steps (float16)", _plain(record.get("skipped_steps"))
    parameters = run.numbers("parameters")
    if {"trainable", "total"} <= parameters.keys():
        share = 100 * parameters["trainable"] / max(1.0, parameters["total"])
        yield "parameters", f"{parameters['trainable']:,.0f} of {parameters['total']:,.0f} are trained ({share:.3g} %)"
    yield "rows", _plain(record.get("padding"))
    for split, noted in run.part("data").items():
        if isinstance(noted, dict):
            yield f"{split} data", _data(noted)
    devices = hardware.get("devices")
    yield "devices", ", ".join(map(str, devices)) if isinstance(devices, list) else ""
    yield "processor", _plain(hardware.get("processor"))
    yield "cores", _plain(hardware.get("cpu_count"))
    yield "threads of a rank", _plain(hardware.get("threads"))
    yield "system", _plain(hardware.get("platform"))
    yield "commit", _plain(record.get("git_commit"))
    for package, version in run.part("versions").items():
        yield str(package), _plain(version)


def _data(noted: Mapping[str, Any]) -> str:
    said = []
    for name, words in (
        ("num_examples", "questions"),
        ("num_unanswerable", "without an answer"),
        ("num_features", "features"),
    ):
        if is_number(noted.get(name)):
            said.append(f"{noted[name]:,} {words}")
    if is_number(noted.get("mean_tokens")):
        said.append(f"{noted['mean_tokens']:.4g} tokens a feature")
    if isinstance(noted.get("fingerprint"), str):
        said.append(f"fingerprint {noted['fingerprint'][:12]}")
    return ", ".join(said)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if is_number(value):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _time(value: Any) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(value):%Y-%m-%d %H:%M:%S %Z}"
    except (TypeError, ValueError):
        return ""
