"""Which graphs are kept, with ones that only note what is asked of them."""

import torch

from qa_dist.machine.kept_graphs import KeptGraphs, Recorded, recording_problem


class Noting:
    def __init__(self) -> None:
        self.replays, self.is_reset = 0, False

    def replay(self) -> None:
        assert not self.is_reset
        self.replays += 1

    def reset(self) -> None:
        self.is_reset = True


def kept(kinds: str) -> tuple[KeptGraphs[str, Recorded], dict[str, Noting]]:
    """Graphs of these kinds, each launched twice."""
    graphs: KeptGraphs[str, Recorded] = KeptGraphs()
    noting = {kind: Noting() for kind in kinds}
    for kind, graph in noting.items():
        assert [graphs.note_launch(kind), graphs.note_launch(kind)] == [False, True]
        graphs[kind] = Recorded(graph, torch.zeros(2))
    return graphs, noting


def replayed(graphs: KeptGraphs[str, Recorded], kind: str, *, is_good: bool = True) -> Recorded | None:
    return graphs.replay(kind, torch.ones(2), is_good=lambda each: is_good)


def test_the_one_that_was_not_replayed_for_longest_makes_room() -> None:
    graphs, noting = kept("abc")
    assert replayed(graphs, "a") is graphs["a"]
    graphs.shrink(3)
    assert len(graphs) == 3
    graphs.shrink(2)
    assert [kind for kind, graph in noting.items() if graph.is_reset] == ["b"]
    # It has to be seen again before it is recorded again.
    assert [graphs.note_launch("b"), graphs.note_launch("b"), graphs.note_launch("c")] == [False, True, True]


def test_a_replay_reads_the_numbers_and_one_that_is_good_no_longer_is_dropped() -> None:
    graphs, noting = kept("ab")
    recorded = replayed(graphs, "a")
    assert recorded is not None
    assert recorded.numbers.tolist() == [1, 1]
    assert replayed(graphs, "b", is_good=False) is None
    assert replayed(graphs, "none") is None
    assert (noting["a"].replays, noting["b"].replays, noting["b"].is_reset) == (1, 0, True)
    assert graphs.describe() == {"replayed": 1, "launched": 4, "graphs": 1}
    # Its kind is known, so that the next pass is recorded.
    assert graphs.note_launch("b")


def test_after_a_release_they_come_back_and_after_a_problem_they_do_not() -> None:
    graphs, noting = kept("ab")
    graphs.release()
    assert all(graph.is_reset for graph in noting.values())
    assert not graphs
    assert [graphs.note_launch("a"), graphs.note_launch("a")] == [False, True]
    problem = recording_problem(torch.OutOfMemoryError("CUDA out of memory"))
    graphs.give_up(problem)
    assert [graphs.note_launch("a"), graphs.note_launch("a")] == [False, False]
    assert graphs.describe() == {"replayed": 0, "launched": 8, "graphs": 0, "problem": problem}
    assert problem == "one cannot be recorded (there is no memory for them)"
    assert recording_problem(RuntimeError("it waits")) == "one cannot be recorded (it waits)"
