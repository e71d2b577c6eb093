"""Runs the tasks of a sweep in the test's own process."""

from collections.abc import Callable

from accelerate.state import AcceleratorState

from qa_dist.sweeping.plan import Trial
from qa_dist.sweeping.running import NextTask
from qa_dist.sweeping.trials import run_trial


def forget_ranks() -> None:
    """What a process knows of its ranks, which the next trial finds out for itself."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(trial: Trial, step: int | None) -> None:
    forget_ranks()
    run_trial(trial, step)


class Inline:
    """Runs tasks one after the other, up to a number of them; notes which."""

    def __init__(self, most: int = 99, body: Callable[[Trial, int | None], object] = train) -> None:
        self.most = most
        self.body = body
        self.done: list[tuple[str, int | None]] = []

    def run(self, next_task: NextTask, *, is_over: Callable[[], bool], ended: Callable[[Trial], object]) -> bool:
        while task := next_task():
            if len(self.done) == self.most:
                return False
            self.body(*task)
            self.done.append((task[0].name, task[1]))
            ended(task[0])
        return True
