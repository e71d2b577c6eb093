"""Recording on a CUDA device that is not there: streams, pools, and what is tidied up behind a recording that fails."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qa_dist.machine.cuda_graphs import CudaRecorder

CUDA = torch.device("cuda", 0)


class Stream:
    device_index = 0

    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other)


class Generator:
    is_recorded = False

    def clone_state(self) -> str:
        return "copy"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


class Device:
    """What torch.cuda says of a device, and is told."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.default = self.current = Stream()
        self.generator = Generator()
        self.pools: list[Any] = []
        self.modes: list[Any] = []
        self.ended: list[Any] = []
        device = self

        class Graph:
            def __init__(self) -> None:
                self.resets = 0

            def pool(self) -> str:
                return "pool of a graph"

            def replay(self) -> None:
                device.modes.append("replayed")

            def reset(self) -> None:
                self.resets += 1

        @contextmanager
        def stream(wanted: Stream) -> Iterator[None]:
            before, self.current = self.current, wanted
            yield
            self.current = before

        @contextmanager
        def graph(made: Graph, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            self.pools.append(pool)
            # As torch's own: where the work fails, nobody goes back to the stream before.
            before, self.current = self.current, stream
            yield
            self.current = before

        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        patch.setattr(torch.cuda, "set_stream", lambda wanted: setattr(self, "current", wanted))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: f"new pool {len(self.pools)}")
        patch.setattr(torch.cuda, "default_generators", (self.generator,))
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        patch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *given, name=name: self.ended.append((name, *given)), raising=False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_what_is_launched_beside_waits_and_is_waited_for(device: Device) -> None:
    recorder = CudaRecorder(CUDA)
    with recorder.beside():
        own = device.current
        assert own is not device.default
        assert own.waited_for == [device.default]
    assert device.current is device.default
    assert device.default.waited_for == [own]


def test_graphs_share_a_pool_while_one_of_them_lives(device: Device) -> None:
    recorder = CudaRecorder(CUDA)
    streams: list[Any] = []
    first, second = (recorder.record(lambda: streams.append(device.current)) for _ in range(2))
    assert streams[0] is streams[1] is not device.default
    first.reset()
    third = recorder.record(lambda: None)
    assert device.pools == ["new pool 0", "pool of a graph", "pool of a graph"]
    third.replay()
    assert device.modes == ["replayed"]
    second.reset()
    third.reset()
    recorder.record(lambda: None)
    assert device.pools[-1] == "new pool 3"
    assert device.ended == []


def test_behind_a_recording_that_fails_stream_pool_and_generator_are_free(device: Device) -> None:
    recorder = CudaRecorder(CUDA)

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fail)
    assert device.current is device.default
    assert device.ended == [("_cuda_endAllocateToPool", 0, "new pool 0"), ("_cuda_releasePool", 0, "new pool 0")]
    assert device.generator.state == "copy"


def test_waits_are_found_and_other_warnings_passed_on(device: Device) -> None:
    recorder = CudaRecorder(CUDA)
    found: list[str] = []

    def warn() -> None:
        with recorder.waits() as waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        found.extend(waits)

    with pytest.warns(UserWarning, match="something else") as passed_on:
        warn()
    assert len(passed_on) == 1
    assert len(found) == 1
    assert found[0].startswith("test_cuda_graphs.py, line ")
    assert device.modes == ["warn", 0]
