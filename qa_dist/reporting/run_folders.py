"""Folders of runs as they are: of runs that have ended, that go on, or that were killed, and what each of them lacks.

Shapes: S steps.
"""

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qa_dist.common.arrays import Float64
from qa_dist.common.columns import aligned
from qa_dist.common.errors import ConfigError, DataError, UserError
from qa_dist.common.notebook import ShownAsText
from qa_dist.common.parsers import is_number
from qa_dist.common.reading import read_bytes, read_json_object
from qa_dist.config.recipe_files import read_run_options
from qa_dist.model.calibration import Calibration, read_calibration
from qa_dist.reporting.systems import System, read_run_system

STEP_FIGURES = ("step", "loss", "learning_rate", "grad_norm", "num_features", "num_tokens")
"""What is read of a line of metrics.jsonl about an optimiser step."""

TIMINGS = ("step_seconds", "most_tokens", "world_size")
"""What is read of a line of timings.jsonl: seconds of a step, tokens of the rank with the most, number of ranks."""

_MARKS = ("config.yaml", "metrics.jsonl", "run.json", "metrics.json", "predictions.json")
_EVALUATED = "eval_"

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Run(ShownAsText):
    """What the folder of a run holds.

    Attributes:
        name: how the page calls it.
        path: what the user named.
        config: the options, as its config.yaml has them; empty without one.
        record: run.json, which is written at the end of a run; empty before.
        steps: the figures of its optimiser steps by name (`STEP_FIGURES` and `TIMINGS`), float64 [S] each, NaN where a
            line has none.
        evaluations: `step`, `loss` and the metrics of every evaluation that metrics.jsonl notes.
        metrics: metrics.json; empty without one.
        calibration: what was tuned for its model; None where nothing was.
        system: its predictions; None without any.
        notes: what is missing, in sentences.
    """

    name: str
    path: str
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    steps: Mapping[str, Float64] = field(default_factory=dict, repr=False)
    evaluations: tuple[Figures, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict, repr=False)
    calibration: Calibration | None = field(default=None, repr=False)
    system: System | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Its evaluations as a table, and what it lacks."""
        columns = {"step": "{:,.0f}", "epoch": "{:.2f}", "loss": "{:.4f}", "exact_match": "{:.2f}", "f1": "{:.2f}"}
        known = [name for name in columns if any(name in figures for figures in self.evaluations)]
        rows = [tuple(known)]
        rows += [
            tuple(columns[name].format(figures[name]) if name in figures else "" for name in known)
            for figures in self.evaluations
        ]
        lines = [f"{self.name}: {self.num_steps:,} steps", *(aligned(rows) if known else ["no evaluations"])]
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))

    @property
    def num_steps(self) -> int:
        """After how many optimiser steps its last line was written."""
        return int(self.steps["step"][-1]) if len(self.steps["step"]) else 0

    def part(self, name: str) -> Mapping[str, Any]:
        """An object in run.json; empty where there is none."""
        value = self.record.get(name)
        return value if isinstance(value, dict) else {}

    def numbers(self, name: str) -> dict[str, float]:
        """The finite numbers of an object in run.json by name."""
        return {key: float(value) for key, value in self.part(name).items() if is_number(value)}


def read_runs(folders: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Run]:
    """The runs in these folders, or in this one.

    Raises:
        UserError: One is no folder of a run, is named twice, or holds a file that cannot be used.
    """
    named = [folders] if isinstance(folders, str | os.PathLike) else folders
    paths = [os.path.expanduser(os.fspath(each)) for each in named]
    seen: dict[str, str] = {}
    for path in paths:
        _require_run(path)
        real = os.path.realpath(path)
        if real in seen:
            both = path if seen[real] == path else f"{seen[real]} and {path}"
            raise ConfigError([f"{both}: the same run twice; name each once"])
        seen[real] = path
    names = [Path(path).resolve().name for path in paths]
    return [
        _read_run(path, name if name and names.count(name) == 1 else path)
        for path, name in zip(paths, names, strict=True)
    ]


def _require_run(path: str) -> None:
    """Make sure that something of a run is there, before the files of any are read."""
    if not os.path.lexists(path):
        raise DataError(f"{path} does not exist; name the --output_dir of a run")
    if not os.path.isdir(path):
        raise DataError(
            f"{path} is no folder; name the --output_dir of a run (qa-dist analyze takes files of predictions)"
        )
    if not _holds_run(Path(path)):
        if trials := sorted(filter(_holds_run, (Path(path) / "trials").glob("*"))):
            raise DataError(f"{path} is the folder of a sweep; name its runs, such as {trials[0]}")
        raise DataError(f"{path} holds nothing of a run ({', '.join(_MARKS)}); name the --output_dir of a run")


def _holds_run(folder: Path) -> bool:
    """Whether something of a run is in a folder."""
    return any((folder / name).is_file() for name in _MARKS)


def _read_run(path: str, name: str) -> Run:
    folder = Path(path)
    config, unknown = _read_options(folder / "config.yaml")
    record, metrics = read_json_object(folder / "run.json"), read_json_object(folder / "metrics.json")
    steps, evaluations, num_damaged = _read_log(folder / "metrics.jsonl")
    steps |= _read_timings(folder / "timings.jsonl", steps["step"])
    run = Run(name, path, config, record, steps, evaluations, metrics, read_calibration(folder))
    system = None
    if os.path.lexists(folder / "predictions.json"):
        system = read_run_system(path, name, config)
    return replace(run, system=system, notes=(*unknown, *_lacks(run, folder, system, num_damaged)))


def _read_options(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The options of a run; where they are not known none, and a sentence that says why."""
    unknown = "which options the run had is not known."
    try:
        options = read_run_options(path)
    except UserError as error:
        return {}, [f"{str(error).rstrip('.')}: {unknown}"]
    if options:
        return options, []
    return {}, [f"{'config.yaml holds no options' if path.is_file() else 'There is no config.yaml'}: {unknown}"]


def _read_log(path: Path) -> tuple[dict[str, Float64], tuple[Figures, ...], int]:
    """The steps and the evaluations of a metrics.jsonl, and how many of its lines cannot be read."""
    steps: list[list[float]] = []
    evaluations: list[Figures] = []
    num_damaged = 0
    for line in read_bytes(path).splitlines() if path.is_file() else ():
        try:
            figures = json.loads(line)
        except (ValueError, RecursionError):
            figures = None
        if not isinstance(figures, dict) or not is_number(figures.get("step")):
            num_damaged += bool(line.strip())
            continue
        if any(key.startswith(_EVALUATED) for key in figures):
            named = {key.removeprefix(_EVALUATED): value for key, value in figures.items() if is_number(value)}
            evaluations.append(named)
        else:
            found = (figures.get(name) for name in STEP_FIGURES)
            steps.append([float(value) if is_number(value) else math.nan for value in found])  # type: ignore[arg-type]
    columns = np.array(steps, np.float64).reshape(len(steps), len(STEP_FIGURES)).T
    return dict(zip(STEP_FIGURES, columns, strict=True)), tuple(evaluations), num_damaged


def _read_timings(path: Path, step_S: Float64) -> dict[str, Float64]:
    """What a timings.jsonl says of these steps, float64 [S] each, by name: NaN where it says nothing.

    Lines that cannot be read count for nothing.
    """
    found = {name: np.full(len(step_S), np.nan) for name in TIMINGS}
    places = {step: place for place, step in enumerate(step_S.tolist())}
    for line in read_bytes(path).splitlines() if path.is_file() else ():
        try:
            figures = json.loads(line)
        except (ValueError, RecursionError):
            continue
        place = places.get(figures["step"]) if isinstance(figures, dict) and is_number(figures.get("step")) else None
        for name in TIMINGS if place is not None else ():
            if is_number(figures.get(name)) and figures[name] > 0:
                found[name][place] = figures[name]
    return found


def _lacks(run: Run, folder: Path, system: System | None, num_damaged: int) -> Iterator[str]:
    log = folder / "metrics.jsonl"
    if not run.record and system is not None:
        yield "There is no run.json: versions, hardware, time and memory are not known."
    elif not run.record:
        when = ""
        if log.is_file():
            written = datetime.datetime.fromtimestamp(log.stat().st_mtime, datetime.UTC)
            when = f" Its last line is of step {run.num_steps:,}, written {written:%Y-%m-%d %H:%M} UTC."
        yield (
            "There is no run.json: the run is still going on, or was stopped or killed before its end. Versions, "
            f"hardware, time and memory are noted at the end.{when}"
        )
    if not log.is_file():
        yield "There is no metrics.jsonl: there are no curves."
    elif not len(run.steps["step"]):
        yield "metrics.jsonl has no line about a step: there are no curves."
    if num_damaged:
        lines = "1 line" if num_damaged == 1 else f"{num_damaged:,} lines"
        yield f"metrics.jsonl: {lines} cannot be read and count for nothing, as a killed run may leave its last one."
    if system is None:
        yield "There is no predictions.json, which is written at the end: no answers, slices or calibration to show."
