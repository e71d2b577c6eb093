"""A search from its first point to its last: a study proposes, trials run, and a pruner looks at every rung."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qa_dist.common.errors import ConfigError
from qa_dist.sweeping.plan import Method, Plan, Trial
from qa_dist.sweeping.record import Record, is_at, is_paused_at, score_at
from qa_dist.sweeping.running import Ledger, Runner, Task
from qa_dist.sweeping.study import Proposal, Study

_LOST = ("failed", "diverged")


@dataclass
class _Point:
    """A point whose end is not told yet: what the study proposed, and its trials, one with each seed."""

    proposal: Proposal
    trials: list[Trial]
    running: set[str] = field(default_factory=set)
    """Names of the trials that a runner has."""


def run_search(
    plan: Plan,
    runner: Runner,
    results: Path,
    *,
    is_over: Callable[[], bool] = lambda: False,
    notice: Callable[[str], object] = lambda text: None,
) -> bool:
    """Try as many points as the sweep file asks for; whether nothing is left to do.

    A point is asked for when there is room for it, so that the sampler knows all that has ended before. At a rung the
    pruner decides at once, from the scores of the points that have been there: one that goes on does so before another
    is asked for, and one that does not stays at the rung's checkpoint. The score of a point is the mean over its seeds;
    one with a seed that failed or diverged counts as failed.

    Args:
        plan: The sweep, with a search.
        runner: Runs the trials.
        results: The file of results.
        is_over: Whether to stop.
        notice: Hears what happens.

    Raises:
        ConfigError: optuna is missing, or cannot be used as the sweep file says.
        UserError: A folder, or the study, is of another sweep.
    """
    search = _Search(plan, Ledger(plan, results, notice))
    is_done = runner.run(search.next_task, is_over=is_over, ended=search.ended)
    search.ledger.note()
    return is_done


class _Search:
    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        assert plan.search is not None
        self._plan = plan
        self.ledger = ledger
        about = {"metric": plan.metric, "seeds": list(plan.seeds), "rungs": list(plan.rungs)}
        self._study = Study(plan.search, plan.output_dir, about, first_rung=plan.rungs[0] if plan.rungs else None)
        self._num_trials = plan.search.trials
        self._num_asked = 0
        self._open: dict[int, _Point] = {}
        self._left_over: set[str] = set()
        for number, point, proposal in self._study.points():
            self._num_asked += 1
            try:
                trials = plan.runs(Method(plan.search.point_name(number, point), point))
            except ConfigError:
                trials = []
            ledger.add(trials)
            if proposal is not None:
                self._take_up(proposal, trials)
        ledger.note()

    def next_task(self) -> Task | None:
        """What is to be run next: points that are on their way come first."""
        while True:
            for point in self._open.values():
                step = self._goal(point)
                for trial in point.trials:
                    is_free = trial.name not in point.running and trial.name not in self._left_over
                    if is_free and not is_at(self.ledger.records[trial.name], step):
                        point.running.add(trial.name)
                        return trial, step
            if self._num_asked >= self._num_trials:
                return None
            self._ask()

    def ended(self, trial: Trial) -> None:
        """Take in that a trial has come to its rung or its end, and decide about its point when all its seeds have."""
        record = self.ledger.ended(trial)
        for point in list(self._open.values()):
            if trial.name in point.running:
                if not is_at(record, self._goal(point)):
                    # Somebody stopped this one alone, as with scancel: the next call of the command goes on with it.
                    self._left_over.add(trial.name)
                point.running.remove(trial.name)
                self._judge(point)

    def _ask(self) -> None:
        assert self._plan.search is not None
        proposal = self._study.ask()
        self._num_asked += 1
        method = Method(self._plan.search.point_name(proposal.number, proposal.point), proposal.point)
        try:
            trials = self._plan.runs(method)
        except ConfigError as error:
            # Values that go together with the first of each other parameter, but not with these.
            self.ledger.notice(f"{method.name} failed: {error}")
            proposal.fail()
            return
        self.ledger.add(trials)
        self._take_up(proposal, trials)

    def _take_up(self, proposal: Proposal, trials: list[Trial]) -> None:
        if not trials:
            proposal.fail()
            return
        self._open[proposal.number] = point = _Point(proposal, trials)
        # What an earlier call has brought it to; it may have ended between a report and what the pruner says to it.
        last = max((step for step in self._plan.rungs if proposal.is_reported(step)), default=None)
        records = [self.ledger.records[trial.name] for trial in trials]
        if last is not None and all(is_paused_at(record, last) for record in records) and self._prunes(point, last):
            return
        self._judge(point)

    def _prunes(self, point: _Point, step: int) -> bool:
        """Whether the pruner ends a point at a rung that was reported; if so, it has ended."""
        if not point.proposal.is_to_stop():
            return False
        self.ledger.notice(f"{point.trials[0].method} goes no further than step {step}")
        point.proposal.prune()
        del self._open[point.proposal.number]
        return True

    def _goal(self, point: _Point) -> int | None:
        """The rung that a point is on its way to; None: its end."""
        return next((step for step in self._plan.rungs if not point.proposal.is_reported(step)), None)

    def _judge(self, point: _Point) -> None:
        """Tell the study what is known of a point, until there is something to run for it or its end is told."""
        proposal = point.proposal
        while not point.running:
            records = [self.ledger.records[trial.name] for trial in point.trials]
            known: list[Record] = [record for record in records if record is not None]
            if any(record["status"] in _LOST for record in known):
                self._lose(proposal)
                return
            is_done = len(known) == len(records) and all(record["status"] == "done" for record in known)
            step = None if is_done else self._goal(point)
            if not is_done and (step is None or not all(is_at(record, step) for record in records)):
                return
            at = known[0]["num_steps"] if step is None else step
            scores = [score_at(record, step, self._plan.metric) for record in known]
            if any(score is None for score in scores):
                self.ledger.notice(f"{point.trials[0].method} failed: it has no {self._plan.metric}")
                self._lose(proposal)
                return
            mean = statistics.fmean(score for score in scores if score is not None)
            # The study has the loss itself, which is to be small.
            mean = -mean if self._plan.metric == "loss" else mean
            proposal.report(at, mean)
            if is_done:
                proposal.complete(mean)
                del self._open[proposal.number]
                return
            if self._prunes(point, at):
                return

    def _lose(self, proposal: Proposal) -> None:
        proposal.fail()
        del self._open[proposal.number]
