"""Processes that take one trial after the other: what each must import, it imports once."""

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from qa_dist.common.signals import StopSignals
from qa_dist.machine.cuda_environment import prepare_cuda
from qa_dist.machine.usage import num_cores
from qa_dist.sweeping.plan import Trial
from qa_dist.sweeping.record import note_failure, note_left_over, read_record
from qa_dist.sweeping.running import NextTask, Task

Body = Callable[[Trial, int | None, Callable[[], signal.Signals | None]], bool]
"""What a worker does with a task; it is told by which signal it was asked to stop, if it was. Returns whether the
process may take another one."""

LOG = "log.txt"
"""The file in a trial's folder with what its run said."""

_DONE, _BROKEN = "done", "broken"
"""What a worker says when it is through with a task: that it waits for another, or ends."""

_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
"""Of `linux/prctl.h`."""

_SECONDS_TO_STOP = 120.0


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: "Connection[Any, Any]"
    task: Task | None = None
    kind: object = None
    """What its trials must have in common; None: it has had none."""


class Workers:
    """Runs tasks in so many processes; a context manager that ends them."""

    def __init__(self, num_workers: int, body: Body | None = None) -> None:
        """Prepare to start them.

        Args:
            num_workers: How many there are at once.
            body: What a worker does with a task, and writes into its record; None: it trains. A name of a module.
        """
        self._num_workers = num_workers
        self._body = body or _train
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._is_one_stopped = False
        if num_workers > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_workers)))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(lambda trial: None)

    def run(self, next_task: NextTask, *, is_over: Callable[[], bool], ended: Callable[[Trial], object]) -> bool:
        """Run tasks in their order, as many at once as there are workers; whether none is left over (see `Runner`).

        A trial whose process alone was told to stop is left over.
        """
        self._is_one_stopped = False
        # A task that a worker of another kind made way for.
        waiting: list[Task] = []
        while True:
            if is_over():
                self._stop(ended)
                return False
            self._start(waiting, next_task)
            if not any(worker.task for worker in self._workers):
                return not self._is_one_stopped
            handles = [handle for each in self._workers for handle in (each.pipe, each.process.sentinel)]
            connection.wait(handles, _POLL_SECONDS)
            for worker in list(self._workers):
                self._collect(worker, ended)

    def _start(self, waiting: list[Task], next_task: NextTask) -> None:
        """Give each idle worker its next task, and start workers as long as there is something for them."""

        def is_one_waiting() -> bool:
            if not waiting and (task := next_task()) is not None:
                waiting.append(task)
            return bool(waiting)

        for worker in list(self._workers):
            if worker.task is None and is_one_waiting():
                if worker.kind != _kind(waiting[0]):
                    self._end(worker)
                else:
                    _give(worker, waiting.pop(0))
        while len(self._workers) < self._num_workers and is_one_waiting():
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_live, args=(theirs, self._body))
            process.start()
            theirs.close()
            worker = _Worker(process, ours)
            self._workers.append(worker)
            _give(worker, waiting.pop(0))

    def _collect(self, worker: _Worker, ended: Callable[[Trial], object]) -> None:
        """Note what a worker has done, or that it has died."""
        try:
            said = worker.pipe.recv() if worker.pipe.poll() else None
        # A pipe whose other end has died is reset where something in it was not read.
        except (EOFError, OSError):
            said = None
        if said is not None and worker.task:
            trial, worker.task = worker.task[0], None
            record = read_record(trial)
            self._is_one_stopped |= record is not None and record["status"] == "stopped"
            ended(trial)
            if said == _BROKEN:
                self._end(worker)
        elif not worker.process.is_alive():
            self._workers.remove(worker)
            worker.process.join()
            if worker.task is not None:
                trial = worker.task[0]
                code = worker.process.exitcode
                note_failure(trial, f"its process ended with code {code}; {trial.folder / LOG} has its last words")
                ended(trial)

    def _end(self, worker: _Worker) -> None:
        # One that has ended hears nothing.
        with suppress(OSError):
            worker.pipe.send(None)
        worker.process.join(_SECONDS_TO_STOP)
        worker.process.kill()
        worker.process.join()
        self._workers.remove(worker)

    def _stop(self, ended: Callable[[Trial], object]) -> None:
        """Ask every worker to stop: its run writes a checkpoint first."""
        for worker in self._workers:
            # One that waits for a task would wait on; one that has died hears nothing.
            with suppress(OSError):
                worker.pipe.send(None)
            worker.process.terminate()
        until = time.monotonic() + _SECONDS_TO_STOP
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            if worker.task is not None and read_record(worker.task[0]) is not None:
                ended(worker.task[0])
        self._workers = []


def _kind(task: Task) -> object:
    """Options that are the process's and not the run's."""
    training = task[0].config.training
    return training.deterministic, training.tf32


def _give(worker: _Worker, task: Task) -> None:
    worker.task, worker.kind = task, _kind(task)
    # One that has died hears nothing, which the next look at it notes.
    with suppress(OSError):
        worker.pipe.send(task)


def _live(pipe: "Connection[Any, Any]", body: Body) -> None:
    """Life of a worker."""
    with StopSignals() as stop:
        _end_with_parent()
        while stop.received is None:
            try:
                task: Task | None = pipe.recv()
            except EOFError:
                return
            if task is None:
                return
            _log_to(task[0])
            # One that was told to end, by somebody who did not tell the sweep, takes no other task.
            is_fit = body(*task, lambda: stop.received) and stop.received is None
            pipe.send(_DONE if is_fit else _BROKEN)
            if not is_fit:
                return


def _train(trial: Trial, pause_after: int | None, asked_to_stop: Callable[[], signal.Signals | None]) -> bool:
    prepare_cuda(os.environ, deterministic=trial.config.training.deterministic)
    if not _is_folder_free(trial):
        sys.stderr.write(f"another process still runs in {trial.folder}; the sweep's next call takes this trial up\n")
        note_left_over(trial)
        return True
    # Imported here, as these take seconds.
    from qa_dist.sweeping.trials import run_trial

    # An error of CUDA, say, stays with the process.
    return bool(run_trial(trial, pause_after, asked_to_stop=asked_to_stop)["status"] != "failed")


def _end_with_parent() -> None:
    """Let the kernel ask this process to stop when the sweep that started it has been killed; Linux alone does that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os.kill(os.getpid(), signal.SIGTERM)


def _is_folder_free(trial: Trial) -> bool:
    """Whether no other run is in the folder; one of a sweep that was killed has time to write its checkpoint."""
    until = time.monotonic() + _SECONDS_TO_STOP
    while True:
        folder = os.open(trial.folder, os.O_RDONLY)
        try:
            # What keeps other runs out of the folder of a run.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError:
            # A file system without locks.
            return True
        finally:
            os.close(folder)


def _log_to(trial: Trial) -> None:
    """Let the standard streams of this process go to the trial's log."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(trial.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
