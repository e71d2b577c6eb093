"""Features of many examples at once, made by several processes.

The workers are plain child processes that run `worker` below and talk through their standard streams. They import what
this module needs and nothing else: not torch, not the caller's main script. A worker reads until its input ends, so it
ends with its parent, however that dies.
"""

import collections
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from qa_dist.common.signals import SIGNALS
from qa_dist.data.records import Example
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec, FeatureStats
from qa_dist.machine.usage import num_cores

_CHUNK_EXAMPLES = 512
"""Examples per request: short enough for a smooth progress bar, long enough to share the tokens of a context."""

_MIN_EXAMPLES_PER_WORKER = 2000
"""Starting a worker takes about as long as tokenising half as many."""

_MAX_AUTO_WORKERS = 16

_Part = tuple[FeatureColumns, FeatureStats]


def build_columns(
    examples: Sequence[Example],
    tokenizer: TokenizerSpec,
    spec: FeatureSpec,
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> tuple[FeatureColumns, FeatureStats]:
    """The features of all examples in order, the same for any number of workers, and counts over them.

    Args:
        examples: At least one validated example.
        tokenizer: The tokenizer.
        spec: Lengths.
        num_workers: Processes that tokenise; None: one per core, at most 16. Few examples are done in this process.
        progress: Whether to show a bar on stderr.

    Raises:
        ConfigError: Lengths and tokenizer contradict each other.
        RuntimeError: A worker failed or was killed.
    """
    builder = FeatureBuilder(tokenizer, spec)
    chunks = [(examples[start : start + _CHUNK_EXAMPLES], start) for start in range(0, len(examples), _CHUNK_EXAMPLES)]
    num_workers = min(num_workers or min(num_cores(), _MAX_AUTO_WORKERS), len(examples) // _MIN_EXAMPLES_PER_WORKER)
    with contextlib.ExitStack() as stack:
        if num_workers > 1:
            parts = stack.enter_context(_pool(tokenizer, spec, num_workers))(chunks)
        else:
            parts = (_columns_of(builder, *chunk) for chunk in chunks)
        bar = stack.enter_context(_progress_bar(len(examples))) if progress else None
        columns: list[FeatureColumns] = []
        total = FeatureStats()
        for part, stats in parts:
            columns.append(part)
            total += stats
            if bar is not None:
                bar.update(stats.num_examples)
    return FeatureColumns.concatenate(columns), total


def _columns_of(builder: FeatureBuilder, examples: Sequence[Example], first_index: int) -> _Part:
    features, stats = builder.build(examples, first_index)
    return FeatureColumns.of(features), stats


def _progress_bar(num_examples: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=num_examples, desc="tokenising", unit=" examples", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- workers


class _Worker:
    """The parent's end of a worker process: one request at a time."""

    def __init__(self, tokenizer: TokenizerSpec, spec: FeatureSpec) -> None:
        package_parent = str(Path(__file__).resolve().parents[2])
        paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A safe path keeps modules of the current folder, such as a stray random.py, out of the worker.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        with _blocked(SIGNALS):
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from qa_dist.features.workers import worker; worker()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        self._setup: tuple[TokenizerSpec, FeatureSpec] | None = (tokenizer, spec)

    def request(self, examples: Sequence[Example], first_index: int) -> _Part:
        """The worker's answer.

        Raises:
            RuntimeError: It failed or was killed.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if self._setup is not None:
                pickle.dump(self._setup, stdin, pickle.HIGHEST_PROTOCOL)
                self._setup = None
            pickle.dump((examples, first_index), stdin, pickle.HIGHEST_PROTOCOL)
            stdin.flush()
            reply = pickle.load(stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a tokenising process ended early with exit code {self.process.wait()} (-9: killed, perhaps for "
                "memory); lower --preprocessing_num_workers"
            ) from error
        if isinstance(reply, str):
            raise RuntimeError(f"a tokenising process failed:\n{reply}")
        part: _Part = reply
        return part

    def close(self) -> None:
        """End the process at once: it holds nothing that is worth waiting for."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            # Closing flushes what a dead worker did not read.
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        self.process.wait()


@contextlib.contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Context whose new processes never get these signals; this one gets them afterwards.

    Ctrl-C reaches a whole process group, and Slurm's signals every process of a step: what they mean, the parent says.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _pool(
    tokenizer: TokenizerSpec, spec: FeatureSpec, num_workers: int
) -> Iterator[Callable[[Sequence[tuple[Sequence[Example], int]]], Iterator[_Part]]]:
    """A function that maps chunks of examples to their parts, in order, over worker processes."""
    workers: list[_Worker] = []
    threads = ThreadPoolExecutor(num_workers)
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def serve(chunk: tuple[Sequence[Example], int]) -> _Part:
        worker = idle.get()
        try:
            return worker.request(*chunk)
        finally:
            idle.put(worker)

    def run(chunks: Sequence[tuple[Sequence[Example], int]]) -> Iterator[_Part]:
        # Two chunks per worker are under way, so that finished parts do not pile up.
        pending: collections.deque[Future[_Part]] = collections.deque()
        for chunk in chunks:
            if len(pending) == 2 * num_workers:
                yield pending.popleft().result()
            pending.append(threads.submit(serve, chunk))
        while pending:
            yield pending.popleft().result()

    try:
        for _ in range(num_workers):
            workers.append(_Worker(tokenizer, spec))
            idle.put(workers[-1])
        yield run
    finally:
        # Killing the workers ends the requests that threads may still be waiting for.
        for worker in workers:
            worker.process.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def worker() -> None:
    """Answer requests from standard input until it ends; the life of a worker process."""
    replies: BinaryIO = os.fdopen(os.dup(1), "wb")
    # Whatever prints must not end up among the replies.
    os.dup2(2, 1)
    try:
        tokenizer, spec = pickle.load(sys.stdin.buffer)
        builder = FeatureBuilder(tokenizer, spec)
        while True:
            examples, first_index = pickle.load(sys.stdin.buffer)
            try:
                reply: _Part | str = _columns_of(builder, examples, first_index)
            except Exception:
                reply = traceback.format_exc()
            pickle.dump(reply, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        # The parent is done, or gone. Closing `replies` could complain once more; the process ends here.
        os._exit(0)
