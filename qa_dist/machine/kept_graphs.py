"""The graphs of passes that are replayed, by what each is for: in training and in evaluation alike."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qa_dist.common.libraries import reason
from qa_dist.machine.cuda_graphs import Graph
from qa_dist.machine.usage import is_out_of_memory


@dataclass(slots=True, eq=False)
class Recorded:
    """A recorded pass.

    Attributes:
        graph: The work.
        numbers: What it reads of a batch, where it reads it.
    """

    graph: Graph
    numbers: torch.Tensor


Kind = TypeVar("Kind", bound=Hashable)
Pass = TypeVar("Pass", bound=Recorded)


class KeptGraphs(dict[Kind, Pass]):
    """Recorded passes by the kind of batch that each is for; the one that was not replayed for longest comes first.

    Attributes:
        seen: Kinds of which a pass was launched: the next one is recorded too.
        problem: Why there are no graphs any more, as a clause; None while there may be.
        num_launched: Passes that were launched operation by operation.
        num_replayed: Passes that were replayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Kind] = set()
        self.problem: str | None = None
        self.num_launched = 0
        self.num_replayed = 0

    def replay(self, kind: Kind, numbers: torch.Tensor, *, is_good: Callable[[Pass], bool]) -> Pass | None:
        """Replay the pass of a kind on these numbers; None if there is none, or if it is good no longer and dropped."""
        recorded = self.pop(kind, None)
        if recorded is None:
            return None
        if not is_good(recorded):
            recorded.graph.reset()
            return None
        self[kind] = recorded
        recorded.numbers.copy_(numbers)
        recorded.graph.replay()
        self.num_replayed += 1
        return recorded

    def note_launch(self, kind: Kind) -> bool:
        """Count a pass that is launched; returns whether it is to be recorded, as from the second of a kind on."""
        self.num_launched += 1
        if self.problem is None and kind in self.seen:
            return True
        self.seen.add(kind)
        return False

    def shrink(self, most: int) -> None:
        """Make room for a graph that has just come: at most so many stay."""
        if len(self) > most:
            oldest = next(iter(self))
            self.pop(oldest).graph.reset()
            self.seen.discard(oldest)

    def release(self) -> None:
        """Give all of them back; what is launched from now on is the first of its kind again."""
        for recorded in self.values():
            recorded.graph.reset()
        self.clear()
        self.seen.clear()

    def give_up(self, problem: str) -> None:
        """Keep none any more, because of a problem."""
        self.release()
        self.problem = problem

    def describe(self) -> dict[str, Any]:
        """What was used, for run.json."""
        counts = {"replayed": self.num_replayed, "launched": self.num_launched, "graphs": len(self)}
        return counts if self.problem is None else {**counts, "problem": self.problem}


def recording_problem(error: RuntimeError) -> str:
    """Why a pass cannot be recorded, as a clause."""
    why = "there is no memory for them" if is_out_of_memory(error) else reason(error)
    return f"one cannot be recorded ({why})"
