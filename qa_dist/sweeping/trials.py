"""One trial, run in this process as far as it is to go; however it ends, its folder says so."""

import gc
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import safe_open

from qa_dist.common.errors import DivergedError, UserError
from qa_dist.common.reading import read_json_object
from qa_dist.common.signals import Stopped
from qa_dist.distributed.failures import launched_rank
from qa_dist.machine.usage import forget_peak_memory, peak_memory_bytes
from qa_dist.sweeping.plan import Trial
from qa_dist.sweeping.record import Record, new_record, read_record, write_record
from qa_dist.training.checkpoints import CHECKPOINTS, WEIGHTS, checkpoints_in
from qa_dist.training.loop import train
from qa_dist.training.metrics_log import logged_figures
from qa_dist.training.output_folder import TIMINGS

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def run_trial(
    trial: Trial, pause_after: int | None, *, asked_to_stop: Callable[[], signal.Signals | None] = lambda: None
) -> Record:
    """Take a trial to its end, or to a rung; returns and writes its record.

    Where it runs as several ranks, rank 0 writes the record, and that of the others says no more than how it ended.

    Args:
        trial: The trial, which goes on from its newest checkpoint.
        pause_after: Optimiser steps of the rung; None: to the end.
        asked_to_stop: The signal by which this process was asked to stop.

    Raises:
        UserError: Data, model or options cannot be used, and this is another rank.
    """
    record = read_record(trial) or new_record(trial)
    record["starts"] += 1
    peak = record.get("peak_memory_bytes") or 0
    begun = time.monotonic()
    forget_peak_memory()
    try:
        evaluation = train(trial.config, asked_to_stop=asked_to_stop, pause_after=pause_after)
    except Stopped:
        record |= {"status": "stopped", "step": _last_step(trial)}
    except DivergedError as error:
        record |= {"status": "diverged", "error": str(error)}
    except UserError as error:
        if launched_rank():
            # Its log is the only place where it can be said.
            raise
        sys.stderr.write(f"{error}\n")
        record |= {"status": "failed", "error": str(error)}
    except Exception as error:
        # Whatever it is, the other trials go on, and the log of this one has all of it.
        traceback.print_exc()
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
    else:
        if launched_rank():
            return {**record, "status": "paused", "error": None}
        figures = None if evaluation is None else {"loss": evaluation.loss, **evaluation.named_metrics}
        written = read_json_object(trial.folder / "run.json")
        if not written:
            record |= {"status": "paused", "step": pause_after, "error": None, **_trained(trial)}
            record["rungs"] = [*record["rungs"], {"step": pause_after, **(figures or _logged(trial))}]
        else:
            record |= {"status": "done", "step": written["num_steps"], "error": None, **_facts(trial, written)}
            record["final"] = figures
            # Of all ranks.
            peak = max(peak, *written["peak_memory_bytes_per_rank"])
    record["seconds"] = round(record["seconds"] + time.monotonic() - begun, 3)
    record["train_seconds"] = _seconds_of_steps(trial)
    record["peak_memory_bytes"] = peak if record["status"] == "done" else max(peak, _peak_of_this_rank())
    if not launched_rank():
        write_record(trial, record)
    # What a failed run held, the next one may need.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def _last_step(trial: Trial) -> int:
    """Optimiser steps that a run that was stopped has done, as its log says."""
    figures = logged_figures(trial.folder / "metrics.jsonl")
    return int(figures[-1]["step"]) if figures else 0


def _seconds_of_steps(trial: Trial) -> float:
    """Seconds of all optimiser steps of a run, whichever process made them; those that were lost do not count."""
    return round(math.fsum(figures["step_seconds"] for figures in logged_figures(trial.folder / TIMINGS)), 3)


def _peak_of_this_rank() -> int:
    is_on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return peak_memory_bytes(torch.device("cuda" if is_on_gpu else "cpu"))


def _trained(trial: Trial) -> Record:
    """Number and bytes of what is trained, as the newest checkpoint has it; {} without one."""
    checkpoints = checkpoints_in(trial.folder / CHECKPOINTS)
    if not checkpoints:
        return {}
    path = checkpoints[-1] / WEIGHTS
    with safe_open(path, "pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    return {"trainable_parameters": count, "saved_bytes": path.stat().st_size}


def _logged(trial: Trial) -> Record:
    """The latest evaluation in a run's log, which one that was stopped behind it does not repeat; {} without any."""
    for figures in reversed(logged_figures(trial.folder / "metrics.jsonl")):
        found = {name: value for name, value in figures.items() if name.startswith("eval_")}
        if found:
            return {name.removeprefix("eval_"): value for name, value in found.items()}
    return {}


def _facts(trial: Trial, run: Mapping[str, Any]) -> Record:
    """What the table shows of a run beside its scores."""
    parameters = run.get("parameters") or {}
    return {
        "num_steps": run["num_steps"],
        "trainable_parameters": parameters.get("trainable"),
        "total_parameters": parameters.get("total"),
        "saved_bytes": sum((trial.folder / name).stat().st_size for name in _WEIGHTS if (trial.folder / name).exists()),
        "phase_seconds": run["seconds"],
        "resumed_at_steps": run.get("resumed_at_steps") or [],
        "data": {
            split: {name: each[name] for name in ("fingerprint", "num_examples", "num_features")}
            for split, each in run["data"].items()
        },
        "started": run["started"],
        "finished": run["finished"],
        "world_size": run["world_size"],
        "hardware": run["hardware"],
        "versions": run["versions"],
        "git_commit": run["git_commit"],
    }
