"""A sweep from its first trial to its last, rung by rung; what an earlier call has done is not done again."""

import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from qa_dist.common.secrets import masked
from qa_dist.sweeping.halving import better_half
from qa_dist.sweeping.plan import Plan, Trial
from qa_dist.sweeping.record import Record, is_at, read_record, score_at, without_folders, write_sweep
from qa_dist.sweeping.workers import Task


class Runner(Protocol):
    """What runs tasks: `Workers`."""

    def run(self, tasks: Sequence[Task], *, is_over: Callable[[], bool], ended: Callable[[Trial], object]) -> bool:
        """Run tasks; whether none is left over."""


def run_sweep(
    plan: Plan,
    runner: Runner,
    results: Path,
    *,
    is_over: Callable[[], bool] = lambda: False,
    notice: Callable[[str], object] = lambda text: None,
) -> bool:
    """Bring the trials of a sweep to their ends, or as far as its rungs let them; whether nothing is left to do.

    All go to the first rung; there the better half of the methods goes on to the next, and from the last one to the
    end. As long as trials run, and after, `results` holds what is known of all of them.

    Args:
        plan: The sweep.
        runner: Runs the trials.
        results: The file of results.
        is_over: Whether to stop.
        notice: Hears what happens.

    Raises:
        UserError: A folder holds a trial with other options.
    """
    begun = time.monotonic()
    about = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["qa-dist", "sweep", *(without_folders(masked(word)) for word in sys.argv[1:])],
    }
    records = {trial.name: read_record(trial) for trial in plan.trials}

    def note() -> None:
        about_now = {**about, "seconds": round(time.monotonic() - begun, 1)}
        write_sweep(results, plan, [record for record in records.values() if record is not None], about_now)

    def ended(trial: Trial) -> None:
        record = records[trial.name] = read_record(trial)
        if record is not None:
            num_ended = sum(each is not None and each["status"] != "stopped" for each in records.values())
            notice(f"{num_ended} of {len(plan.trials)} trials, {time.monotonic() - begun:.0f} s: {_line(record)}")
        note()

    note()
    methods = list(dict.fromkeys(trial.method for trial in plan.trials))
    for step in (*plan.rungs, None):
        trials = [trial for trial in plan.trials if trial.method in methods]
        tasks: list[Task] = [(trial, step) for trial in trials if not is_at(records[trial.name], step)]
        if tasks and not runner.run(tasks, is_over=is_over, ended=ended):
            return False
        if step is not None:
            metric = plan.trials[0].config.training.metric_for_best_model
            scores = {
                method: [score_at(records[trial.name], step, metric) for trial in trials if trial.method == method]
                for method in methods
            }
            kept = better_half(scores)
            notice(f"after {step} steps, {len(kept)} of {len(methods)} methods go on: {', '.join(kept) or 'none'}")
            methods = kept
    note()
    return True


def _line(record: Record) -> str:
    """One line about a trial."""
    name = f"{record['method']}, seed {record['seed']}"
    figures = record["final"] or (record["rungs"] or [None])[-1]
    if record["status"] in ("diverged", "failed"):
        return f"{name} {record['status']}: {record['error']}"
    scores = f" EM {figures['exact_match']:.2f}, F1 {figures['f1']:.2f}" if figures and "f1" in figures else ""
    return f"{name} {record['status']} after step {record['step']}{scores}"
