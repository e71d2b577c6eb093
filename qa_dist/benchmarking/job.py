"""What is measured, and the processes that measure it.

A `Job` is one measurement. It is done by processes of its own - fresh ones, so that peaks of memory are honest and no
measurement finds what another left in a cache - which write their result as JSON. Comparisons alternate: all jobs
once, then all again, so that whatever disturbs the machine for a while disturbs all of them. A measurement beside which
others used much of the machine is made again (`neighbours`).
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from qa_dist.benchmarking import neighbours
from qa_dist.common.errors import UserError

Result = dict[str, Any]
Headline = float | str
"""A figure, or `neighbours.UNSTABLE`: too few of its repeats were undisturbed."""

_WORKER = "qa_dist.benchmarking.worker"
_POLL_SECONDS = 0.2
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
"""The folder that the package is in: of a checkout, or of installed packages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measurement.

    Attributes:
        kind: what the processes run: qa_dist's training loop or evaluation, or their counterparts of Hugging Face.
        options: options of the run, under their flag names.
        num_features: features measured, over all ranks.
        warmup_steps: optimiser steps before the clock starts.
        num_processes: ranks, under one launcher if there are several.
        threads: CPU threads of each process; None: as torch chooses.
        part: which part of the features is used, and of how many equal ones.
        profiled_steps: steps run after the measured ones to see which phases take how long.
        measure_ceiling: whether to measure matrix products before and after.
        trainer: for Hugging Face: how its `Trainer` is set up, see `hugging_face.Setup`.
        device: index of the only GPU that the process may see; None: all of them.
    """

    kind: Literal["train", "train_hugging_face", "evaluate", "evaluate_hugging_face"]
    options: Mapping[str, Any]
    num_features: int
    warmup_steps: int = 1
    num_processes: int = 1
    threads: int | None = None
    part: tuple[int, int] = (0, 1)
    profiled_steps: int = 0
    measure_ceiling: bool = False
    trainer: Mapping[str, Any] = field(default_factory=dict)
    device: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Job":
        """The job that `to_json` made these values of."""
        return cls(**{**values, "part": tuple(values["part"])})


def measure(*jobs: Job) -> list[Result]:
    """The results of jobs that run at the same time; those of several wait for each other before their clocks start.

    Raises:
        UserError: A process ended with the exit code of a user's mistake; its message is passed on.
        RuntimeError: A process failed.
    """
    with tempfile.TemporaryDirectory(prefix="qa_dist-bench-") as name:
        directory = Path(name)
        running = []
        try:
            for number, job in enumerate(jobs):
                running.append(_start(job, directory, number=number, together=len(jobs)))
            while any(process.poll() is None for process, _ in running):
                # One that fails would leave those measured with it waiting.
                for process, errors in running:
                    _require_success(process.poll() or 0, errors)
                time.sleep(_POLL_SECONDS)
            for process, errors in running:
                _require_success(process.returncode, errors)
        finally:
            for process, _ in running:
                if process.poll() is None:
                    # A launcher passes it on to its ranks.
                    process.terminate()
                    process.wait()
        return [
            json.loads((directory / f"result-{number}.json").read_text(encoding="utf-8")) for number in range(len(jobs))
        ]


def _start(job: Job, directory: Path, *, number: int, together: int) -> tuple["subprocess.Popen[bytes]", Path]:
    spec = directory / f"job-{number}.json"
    spec.write_text(
        json.dumps(
            {
                "job": job.to_json(),
                "result": str(directory / f"result-{number}.json"),
                "directory": str(directory),
                "together": together,
            }
        ),
        encoding="utf-8",
    )
    environment = environment_for_children()
    if job.threads is not None:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    if job.device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = _visible_device(job.device)
    launcher = []
    if job.num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.num_processes)]
    error_path = directory / f"stderr-{number}.txt"
    with error_path.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", _WORKER, str(spec)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
        )
    return process, error_path


def environment_for_children() -> dict[str, str]:
    """This process's variables as the processes that it starts get them: no rank of its launch, this package first."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join(part for part in (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")) if part)
    return kept | {"PYTHONPATH": paths}


def _visible_device(index: int) -> str:
    """Name of the GPU that is number `index` of those this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def _require_success(code: int, error_path: Path) -> None:
    if code == 0:
        return
    errors = error_path.read_text(encoding="utf-8", errors="replace")
    for line in errors.splitlines():
        before, marker, message = line.partition(f"{_WORKER}: error: ")
        if marker and not before:
            raise UserError(message)
    raise RuntimeError(f"a measuring process ended with code {code}:\n{errors[-4000:]}")


def alternate(
    cells: Mapping[str, Job | Sequence[Job]], *, repeats: int, notice: Callable[[str], None]
) -> dict[str, list[Result]]:
    """Results of every cell, measured in turn: all once, then all again; each says what `neighbours` there were.

    Args:
        cells: The job of each, by name; several run at the same time and their rates are added up.
        repeats: How often.
        notice: Called with a line about each measurement.
    """
    results: dict[str, list[Result]] = {name: [] for name in cells}
    for repeat in range(repeats):
        for name, jobs in cells.items():
            result = neighbours.undisturbed_result(functools.partial(_measured_together, jobs))
            results[name].append(result)
            notice(f"{repeat + 1}/{repeats} {name}: {_in_words(result)}{neighbours.in_words(result)}")
    return results


def _measured_together(jobs: Job | Sequence[Job]) -> Result:
    return measure(jobs)[0] if isinstance(jobs, Job) else _added_up(measure(*jobs))


def _added_up(results: Sequence[Result]) -> Result:
    """Jobs that ran at the same time, as one: rates and counts added, the slowest step and the largest process."""
    if any(result.get("out_of_memory") for result in results):
        return {"out_of_memory": True}
    added = {
        name: sum(result[name] for result in results)
        for name in ("num_features", "num_tokens", "features_per_second", "tokens_per_second")
    }
    most = {
        name: max(result[name] for result in results)
        for name in ("seconds", "median_step_seconds", "peak_memory_bytes")
    }
    return {**added, **most, "processes": list(results)}


def _in_words(result: Result) -> str:
    if result.get("out_of_memory"):
        return "out of memory"
    rate = result.get("features_per_second")
    return f"{rate:.2f} features/s" if rate is not None else "done"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some values."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def medians(results: Sequence[Result], *names: str) -> dict[str, Any]:
    """Median and spread of some figures over the undisturbed repeats, or all if there are none, and all repeats.

    Says so if there was not enough memory, and how many repeats were disturbed, if any.
    """
    if any(result.get("out_of_memory") for result in results):
        return {"out_of_memory": True, "repeats": list(results)}
    counted = neighbours.undisturbed(results)
    figures = {name: spread([float(result[name]) for result in counted]) for name in names}
    return {**figures, **disturbance(results), "repeats": list(results)}


def disturbance(results: Sequence[Result]) -> dict[str, int]:
    """How many repeats were disturbed; nothing if none was."""
    count = sum(map(neighbours.is_disturbed, results))
    return {"num_disturbed": count} if count else {}


def rate(results: Sequence[Result]) -> float:
    """Median features per second of the repeats that count."""
    return float(median(result["features_per_second"] for result in neighbours.undisturbed(results)))


def ratio(ours: Sequence[Result], theirs: Sequence[Result]) -> Headline:
    """Ratio of median features per second."""
    return rate(ours) / rate(theirs) if neighbours.is_stable(ours, theirs) else neighbours.UNSTABLE
