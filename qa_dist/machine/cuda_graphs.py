"""Work of a CUDA device recorded once and asked for again as a whole: torch's CUDA graphs, and what they need around.

Rules of recording, as torch 2.11 and 2.13 have them (`torch/cuda/graphs.py`, `aten/src/ATen/cuda/CUDAGraph.cpp`):

- What is recorded is not done. A replay reads and writes the same addresses, so inputs, outputs and gradients stay.
- Nothing may wait for the device, and nothing may run on the default stream. A node that adds to a parameter's gradient
  stays on the stream where it was made for as long as anything refers to it, so that what is to be recorded first runs
  on the stream of the recording.
- Random numbers are drawn from the device's default generator, whose seed and position a replay reads from memory that
  it fills from the generator first: a seed set before the replay is honoured, and the position moves on as it would.
- Graphs that are not replayed at the same time, and whose results are read before the next one, share one pool.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Ask the device for it."""

    def reset(self) -> None:
        """Give its memory back; it must not be replayed any more."""


class Recorder(Protocol):
    """Records work; a simulated one takes the place of the device's in tests."""

    def beside(self) -> AbstractContextManager[None]:
        """Context in which what is asked for goes where it would be recorded."""

    def waits(self) -> AbstractContextManager[list[str]]:
        """Context that notes where the host waits for the device, one line each; they are there when it ends."""

    def record(self, work: Callable[[], object]) -> Graph:
        """Record work without doing it.

        Raises:
            RuntimeError: It cannot be recorded. Everything else can go on, and nothing recorded before is good.
        """

    def dropout_state(self) -> torch.Tensor:
        """Where the generator is that dropout draws from."""

    def set_dropout_state(self, state: torch.Tensor) -> None:
        """Put the generator back to where it was."""


class CudaRecorder:
    """Records what is asked of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._recorded: list[_Recorded] = []
        # What a recording left that failed: the allocator may go on asking it whether it is over.
        self._failed: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def beside(self) -> Iterator[None]:
        """See `Recorder`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """See `Recorder`."""
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                found.append(f"{Path(warning.filename).name}, line {warning.lineno}")
            elif "Synchronization debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def record(self, work: Callable[[], object]) -> Graph:
        """See `Recorder`."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # A pool is gone with its last graph, and its name with it.
        self._recorded = [each for each in self._recorded if not each.is_reset]
        pool = self._recorded[0].graph.pool() if self._recorded else torch.cuda.graph_pool_handle()
        try:
            # Other threads, such as NCCL's, may ask the device what they like meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            self._clean_up(graph, pool, current)
            raise
        recorded = _Recorded(graph)
        self._recorded.append(recorded)
        return recorded

    def _clean_up(self, graph: torch.cuda.CUDAGraph, pool: Any, current: torch.cuda.Stream) -> None:
        """Undo what torch leaves of a recording that failed."""
        torch.cuda.set_stream(current)
        self._failed.append(graph)
        # It raises where torch has ended that itself, and has let go of the pool with the graph.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
            torch._C._cuda_releasePool(current.device_index, pool)
        graph.reset()
        # The state of the generator goes on taking itself for one that is recorded; a copy does not.
        generator: Any = torch.cuda.default_generators[current.device_index]
        generator.graphsafe_set_state(generator.clone_state())

    def dropout_state(self) -> torch.Tensor:
        """See `Recorder`."""
        return torch.cuda.get_rng_state(self._device)

    def set_dropout_state(self, state: torch.Tensor) -> None:
        """See `Recorder`."""
        torch.cuda.set_rng_state(state, self._device)


class _Recorded:
    """A graph of torch's."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph, self.is_reset = graph, False

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.is_reset = True
        self.graph.reset()
