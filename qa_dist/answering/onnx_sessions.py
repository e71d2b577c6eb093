"""Sessions of onnxruntime for one graph: a batch on all threads, or a batch on each of them."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qa_dist.common.arrays import Indices
from qa_dist.common.errors import CheckpointError
from qa_dist.common.libraries import reason
from qa_dist.machine.usage import num_cores

_SLOWER_TOGETHER = ("SkipLayerNormFusion",)
"""What onnxruntime makes one operation of, by its own name, and computes more slowly then.

A sum and a normalisation of 1360 tokens and 384 channels took 1.1 ms apart and 3.3 ms as one operation (onnxruntime
1.32, one thread, AVX2), which was 8 % of the time of a six-layer MiniLM.
"""

Result = TypeVar("Result")


class Sessions:
    """A graph that any number of threads may run at once; what it gives is the same with any number of them.

    Each kind of session holds the weights: it is opened when there is something for it to compute.

    Attributes:
        num_threads: threads that compute.
        inputs: names of what the graph reads.
        outputs: names of what it gives.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        """Open a graph, for batches one after the other.

        Args:
            path: The file.
            num_threads: Threads that compute; None: as many as OMP_NUM_THREADS says, as launchers and torch have it,
                else one for each core.

        Raises:
            CheckpointError: It cannot be loaded.
        """
        # onnxruntime knows best how many of the cores' threads are worth while for one batch.
        self._together = num_threads or _threads_of(os.environ)
        self.num_threads = self._together or num_cores()
        self._path = path
        self._used: set[int] = set()
        self._lock = threading.Lock()
        session = open_session(path, self._together)
        self.inputs = tuple(each.name for each in session.get_inputs())
        self.outputs = tuple(each.name for each in session.get_outputs())
        self._opened = {self._together: session}

    def one(self) -> Any:
        """The session that computes a batch with all threads."""
        return self._session(self._together)

    def map(self, run: Callable[[Any, Indices], Result], batches: Sequence[Indices]) -> list[Result]:
        """What `run` makes of a session and each batch, in the order of the batches.

        As many batches are computed at once as there are threads, each by one of them: threads that share a batch wait
        for each other in every operation. Fewer batches than threads have all threads, one after the other.
        """
        if self.num_threads == 1 or len(batches) < self.num_threads:
            session = self.one()
            return [run(session, batch) for batch in batches]
        with ThreadPoolExecutor(self.num_threads, "batches") as threads:
            return list(threads.map(partial(run, self._session(1)), batches))

    def _session(self, num_threads: int) -> Any:
        with self._lock:
            if num_threads not in self._opened:
                # One that was opened to see whether it can be, and has computed nothing, holds its weights for nothing.
                self._opened = {key: session for key, session in self._opened.items() if key in self._used}
                self._opened[num_threads] = open_session(self._path, num_threads)
            self._used.add(num_threads)
            return self._opened[num_threads]


def _threads_of(environment: Mapping[str, str]) -> int:
    """Threads that OMP_NUM_THREADS asks for, which onnxruntime does not read by itself; 0 if it does not ask."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def open_session(path: Path, num_threads: int = 0) -> Any:
    """The model in a file, ready to run by any number of threads at once.

    Args:
        path: An ONNX graph.
        num_threads: Threads that compute a batch together; 0: as many as onnxruntime likes.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Errors are raised, and warnings are about the graph, which no user of it can change.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_SLOWER_TOGETHER)
        )
    except Exception as error:  # the library has a dozen unrelated types for what is wrong with a file
        raise CheckpointError(f"{path} cannot be loaded ({reason(error)}); export the model again") from error
