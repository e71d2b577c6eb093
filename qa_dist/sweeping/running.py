"""A sweep from its first trial to its last, rung by rung; what an earlier call has done is not done again."""

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qa_dist.common.files import write_json
from qa_dist.common.reading import read_json_object
from qa_dist.common.secrets import masked
from qa_dist.sweeping.halving import better_half
from qa_dist.sweeping.plan import Plan, Trial
from qa_dist.sweeping.record import (
    FORMAT,
    Record,
    is_at,
    other_records,
    read_record,
    require_rungs,
    score_at,
    without_folders,
    write_sweep,
)

CALLS = ".calls.json"
"""The file in a sweep's folder that says when the sweep began, by which command, and the seconds of all calls."""

Task = tuple[Trial, int | None]
"""A trial, and after how many steps it pauses (None: it goes to its end)."""

NextTask = Callable[[], Task | None]
"""Gives the next task whenever there is room for one; None if there is none now."""


class Runner(Protocol):
    """What runs tasks: `Workers`, or `SlurmJobs`."""

    def run(self, next_task: NextTask, *, is_over: Callable[[], bool], ended: Callable[[Trial], object]) -> bool:
        """Run tasks in their order, as many at once as this can, until there is no next one; whether none is left over.

        Args:
            next_task: Gives them.
            is_over: Whether nothing more may be started, and what runs is to stop.
            ended: Called when a trial has paused, ended, failed or stopped, and its record is written.
        """


def in_order(tasks: Iterable[Task]) -> NextTask:
    """Gives these tasks, one after the other."""
    return partial(next, iter(tasks), None)


def command(argv: Sequence[str]) -> list[str]:
    """The words that start a sweep again, without secrets and folders of this machine, of `sys.argv`."""
    # `qa-dist sweep FILE` and `python -m qa_dist.sweep FILE`.
    words = argv[2:] if argv[1:2] == ["sweep"] else argv[1:]
    return ["qa-dist", "sweep", *map(_word, words)]


def _word(word: str) -> str:
    """A word of a command line as others may read it."""
    word = masked(word)
    flag, equals, value = word.partition("=")
    if word.startswith("--"):
        return f"{flag}{equals}{without_folders(value)}"
    return str(without_folders(word))


class Ledger:
    """What is known of the trials of a sweep; the file of results holds it as long as they run, and after."""

    def __init__(self, plan: Plan, results: Path, notice: Callable[[str], object]) -> None:
        """Open it.

        Args:
            plan: The sweep.
            results: The file of results.
            notice: Hears what happens.
        """
        self._plan = plan
        self._results = results
        self._calls = plan.output_dir / CALLS
        self._begun = time.monotonic()
        self._earlier_seconds = 0.0
        self._goes_on = False
        self._about: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command(sys.argv),
        }
        self.records: dict[str, Record | None] = {}
        self._others = other_records(plan)
        self.notice = notice

    def add(self, trials: Iterable[Trial]) -> None:
        """Read what earlier calls have left of some trials.

        Raises:
            UserError: A folder holds a trial with other options.
        """
        found = {trial.name: read_record(trial) for trial in trials}
        self.records |= found
        # A search adds its points one by one, and the first of them may have left nothing.
        if not self._goes_on and any(found.values()):
            self._goes_on = True
            self._go_on()

    def _go_on(self) -> None:
        """Take over when the sweep was started, by which command, and how long it has taken so far.

        Earlier calls may have had another file of results, where earlier versions noted these alone.
        """
        for path in (self._calls, self._results, self._plan.output_dir / "sweep.json"):
            held = read_json_object(path) if path.is_file() else {}
            if held.get("sweep") == self._plan.name and held.get("format") == FORMAT:
                self._about |= {name: held[name] for name in self._about if name in held}
                seconds = held.get("seconds")
                self._earlier_seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
                return

    def note(self) -> None:
        """Write the file of results, and what the next call goes on from."""
        seconds = self._earlier_seconds + time.monotonic() - self._begun
        about = {**self._about, "seconds": round(seconds, 1)}
        known = [record for record in self.records.values() if record is not None]
        write_sweep(self._results, self._plan, [*known, *self._others], about)
        self._calls.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._calls, {"format": FORMAT, "sweep": self._plan.name, **about})

    def ended(self, trial: Trial) -> Record | None:
        """Take in what a trial has left, say it, and return it."""
        record = self.records[trial.name] = read_record(trial)
        if record is not None:
            num_ended = sum(each is not None and each["status"] != "stopped" for each in self.records.values())
            seconds = time.monotonic() - self._begun
            self.notice(f"{num_ended} of {self._plan.num_trials} trials, {seconds:.0f} s: {_line(record)}")
        self.note()
        return record


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
        plan: The sweep, without a search.
        runner: Runs the trials.
        results: The file of results.
        is_over: Whether to stop.
        notice: Hears what happens.

    Raises:
        UserError: A folder holds a trial with other options, or one that has passed a rung without a pause.
    """
    ledger = Ledger(plan, results, notice)
    ledger.add(plan.trials)
    for trial in plan.trials:
        if (record := ledger.records[trial.name]) is not None:
            require_rungs(trial, record, plan.rungs)
    ledger.note()
    methods = list(dict.fromkeys(trial.method for trial in plan.trials))
    for step in (*plan.rungs, None):
        trials = [trial for trial in plan.trials if trial.method in methods]
        tasks: list[Task] = [
            (trial, step)
            for trial in trials
            if (not plan.only or trial.method in plan.only) and not is_at(ledger.records[trial.name], step)
        ]
        if tasks and not runner.run(in_order(tasks), is_over=is_over, ended=ledger.ended):
            return False
        if step is not None:
            scores = {
                method: [
                    score_at(ledger.records[trial.name], step, plan.metric)
                    for trial in trials
                    if trial.method == method
                ]
                for method in methods
            }
            kept = better_half(scores)
            if over := [trial.name for trial in trials if _was_over_before(ledger.records[trial.name], step)]:
                notice(f"not paused after {step} steps, and compared by the scores of their ends: {', '.join(over)}")
            notice(f"after {step} steps, {len(kept)} of {len(methods)} methods go on: {', '.join(kept) or 'none'}")
            methods = kept
    ledger.note()
    return True


def _was_over_before(record: Record | None, step: int) -> bool:
    """Whether a trial came to its end without a pause at a rung, as it has no more steps than that."""
    return record is not None and record["status"] == "done" and all(each["step"] != step for each in record["rungs"])


def _line(record: Record) -> str:
    """One line about a trial."""
    name = f"{record['method']}, seed {record['seed']}"
    figures = record["final"] or (record["rungs"] or [None])[-1]
    if record["status"] in ("diverged", "failed"):
        return f"{name} {record['status']}: {record['error']}"
    scores = f" EM {figures['exact_match']:.2f}, F1 {figures['f1']:.2f}" if figures and "f1" in figures else ""
    return f"{name} {record['status']} after step {record['step']}{scores}"
