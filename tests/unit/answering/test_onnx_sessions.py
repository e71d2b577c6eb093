"""Batches of an exported model have a thread each where there are many, and all threads where there are few."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.answering.onnx_sessions import Sessions
from qa_dist.common.errors import CheckpointError

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

BATCHES = [np.array([number]) for number in range(6)]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph that doubles a number."""
    number = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("number", "double")]
    node = onnx.helper.make_node("Add", ["number", "number"], ["double"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "graph", number[:1], number[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(model, str(tmp_path / "double.onnx"))
    return tmp_path / "double.onnx"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each session that was opened."""
    session = onnxruntime.InferenceSession
    threads: list[int] = []

    def counting(path: str, options: Any, **others: Any) -> Any:
        threads.append(options.intra_op_num_threads)
        return session(path, options, **others)

    monkeypatch.setattr("onnxruntime.InferenceSession", counting)
    return threads


class Runs:
    """Runs of sessions; each waits for as many others as there are to be at once.

    Attributes:
        threads: Python's threads that ran a batch.
        sessions: sessions that were run, by their numbers in memory.
    """

    def __init__(self, at_once: int) -> None:
        self.threads: set[int] = set()
        self.sessions: set[int] = set()
        self._barrier = threading.Barrier(at_once)

    def __call__(self, session: Any, indices: Any) -> float:
        self.threads.add(threading.get_ident())
        self.sessions.add(id(session))
        # Broken, and an error, where fewer come.
        self._barrier.wait(30)
        (double,) = session.run(["double"], {"number": indices.astype(np.float32)})
        return float(double[0])


@pytest.mark.parametrize("num_threads", [2, 3])
def test_many_batches_have_a_thread_each(graph: Path, opened: list[int], num_threads: int) -> None:
    sessions, runs = Sessions(graph, num_threads), Runs(at_once=num_threads)
    assert (sessions.inputs, sessions.outputs) == (("number",), ("double",))
    assert sessions.map(runs, BATCHES) == [0, 2, 4, 6, 8, 10]
    assert len(runs.threads) == num_threads
    assert len(runs.sessions) == 1
    assert opened == [num_threads, 1]


def test_few_batches_have_all_threads(graph: Path, opened: list[int]) -> None:
    sessions, runs = Sessions(graph, 3), Runs(at_once=1)
    assert sessions.map(runs, BATCHES[:2]) == [0, 2]
    assert runs.threads == {threading.get_ident()}
    assert opened == [3]


def test_one_thread_needs_one_session(graph: Path, opened: list[int]) -> None:
    sessions, runs = Sessions(graph, 1), Runs(at_once=1)
    assert sessions.map(runs, BATCHES) == [0, 2, 4, 6, 8, 10]
    assert sessions.map(runs, BATCHES[:1]) == [0]
    assert runs.threads == {threading.get_ident()}
    assert opened == [1]


def test_a_session_is_kept_where_it_has_computed(graph: Path, opened: list[int]) -> None:
    sessions = Sessions(graph, 2)
    # Opened to see that it can be, and given up for the other kind.
    sessions.map(Runs(at_once=2), BATCHES)
    sessions.map(Runs(at_once=1), BATCHES[:1])
    assert opened == [2, 1, 2]
    sessions.map(Runs(at_once=2), BATCHES)
    sessions.map(Runs(at_once=1), BATCHES[:1])
    assert opened == [2, 1, 2]


def test_what_a_batch_raises_is_raised(graph: Path) -> None:
    def run(session: Any, indices: Any) -> None:
        raise CheckpointError(f"batch {indices[0]}")

    with pytest.raises(CheckpointError, match="batch 0"):
        Sessions(graph, 2).map(run, BATCHES)
