"""Runs whose ranks are forked from a server that has imported everything: a start costs a fraction of a second.

That makes it possible to kill a run a hundred times. What a rank does is what `python -m qa_dist.train` does; a fault
is put into it from outside, by wrapping one of its functions.
"""

import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from torch.distributed import TCPStore
from torch.distributed import run as torch_launcher

from tests.distributed.launching import ROOT, free_port
from tests.support import forked_python

PRELOADED = [
    "qa_dist.training.loop",
    "qa_dist.train",
    "qa_dist.evaluate",
    "qa_dist.predict",
    "qa_dist.answering.prediction",
    "qa_dist.answering.reader",
    "qa_dist.answering.torch_backend",
    "transformers.models.bert.modeling_bert",
    "peft",
    "datasets",
    # What is not installed is passed over.
    "deepspeed",
    "tests.distributed.forking",
    # Last: nothing that it makes is to be imported anew.
    "tests.distributed.warm",
]


@dataclass(frozen=True)
class Fault:
    """A signal that a rank sends itself, or a hang, when it enters a phase for the n-th time.

    Attributes:
        phase: "load", "step", "data", "evaluate" or "save".
        count: Which entry, from 1.
        rank: Which rank; None for all.
        signal: What is sent; None: the rank hangs.
    """

    phase: str
    count: int
    rank: int | None = None
    signal: int | None = signal.SIGTERM


@dataclass
class Group:
    """The running ranks of one run."""

    ranks: list[BaseProcess]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes, as `subprocess` counts them, when all ranks have ended."""
        until = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, until - time.monotonic()))
        hanging = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        for rank in self.ranks:
            rank.kill()
            rank.join()
        assert not hanging, f"ranks {hanging} still ran after {seconds} s:\n{self.text()[-3000:]}"
        return [rank.exitcode for rank in self.ranks]

    def end(self, grace_seconds: float = 10) -> list[int | None]:
        """Exit codes; what has not ended by itself is killed, as a launcher does when one rank has gone."""
        until = time.monotonic() + grace_seconds
        for rank in self.ranks:
            rank.join(max(0.0, until - time.monotonic()))
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in self.ranks]

    def text(self) -> str:
        """Everything the ranks wrote to their standard streams."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def start(
    words: Sequence[str],
    log: Path,
    *,
    num_processes: int = 1,
    fault: Fault | None = None,
    environment: Mapping[str, str] | None = None,
) -> Group:
    """Start the ranks of `qa_dist.train words`; their output goes to `log`."""
    body = partial(run_rank, list(words), fault)
    return start_ranks(body, log, num_processes=num_processes, environment=environment)


def run_main(
    module: str,
    words: Sequence[str],
    log: Path,
    *,
    num_processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `python -m module words` on that many ranks; all must succeed."""
    body = partial(call_main, module, list(words))
    group = start_ranks(body, log, num_processes=num_processes, environment=environment)
    assert group.wait(240) == [0] * num_processes, group.text()[-6000:]


def run_apart(
    module: str, words: Sequence[str], *, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error of `python -m module words`."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "stdout", Path(name) / "stderr"
        group = start_ranks(partial(_call_apart, module, list(words), out, cwd), err, environment=environment)
        (code,) = group.wait(240)
        return code, out.read_text(encoding="utf-8"), group.text()


def _call_apart(module: str, words: list[str], out: Path, cwd: Path, rank: int) -> int:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.chdir(cwd)
    return call_main(module, words, rank)


def start_ranks(
    body: Callable[[int], int], log: Path, *, num_processes: int = 1, environment: Mapping[str, str] | None = None
) -> Group:
    """Start ranks that do `body`, which takes their number and returns their exit code; their output goes to `log`.

    Args:
        body: What can be pickled, and is called in every rank, in the folder of the checkout.
        log: Where its standard streams go.
        num_processes: How many ranks.
        environment: What a launcher's configuration would set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server is itself a fork of one that has imported the libraries, for all processes of the tests.
    context.set_executable(forked_python.program("python"))
    port = free_port()
    ranks: list[BaseProcess] = []
    for rank in range(num_processes):
        arguments = (body, str(log), rank, num_processes, port, dict(environment or {}))
        process = context.Process(target=_live, args=arguments)
        process.start()
        ranks.append(process)
    return Group(ranks, log)


def in_a_fork(work: Callable[[], int], port: int) -> int:
    """Exit code of `work`, done in a fork of this rank that meets those of the others at a port of its own.

    What is imported is shared, and what libraries keep of a process group ends with it.
    """
    child = os.fork()
    if not child:
        os.environ["MASTER_PORT"] = str(port)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def torchrun_store() -> Iterator[dict[str, str]]:
    """Variables that lead ranks to a store that outlives each of them, as torchrun's does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # What leads to it keeps it.
    del store


class ForkedProcess:
    """In the place of a `subprocess.Popen` whose command is `python [-m torch.distributed.run ...] -m module word ...`.

    Only the last words are the module's: torchrun's own parser takes the others, and its ranks are forked.
    """

    def __init__(self, command: Sequence[str], *, stdout: int, stderr: IO[bytes], env: Mapping[str, str]) -> None:
        python, dash, module, *words = command
        assert (python, dash, stdout) == (sys.executable, "-m", subprocess.DEVNULL)
        num_processes = 1
        if module == "torch.distributed.run":
            asked = torch_launcher.get_args_parser().parse_args(words)
            assert asked.module
            assert asked.standalone
            num_processes, module, words = int(asked.nproc_per_node), asked.training_script, asked.training_script_args
        body = partial(call_main, module, words)
        self._group = start_ranks(body, Path(stderr.name), num_processes=num_processes, environment=env)

    def poll(self) -> int | None:
        """The first exit code that is not 0, or 0 when all have ended well; None while one is running."""
        codes = [rank.exitcode for rank in self._group.ranks]
        return next((code for code in codes if code), None if None in codes else 0)

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.poll()

    def terminate(self) -> None:
        """Send SIGTERM to all ranks."""
        for rank in self._group.ranks:
            rank.terminate()

    def wait(self) -> int | None:
        """The exit code, when all have ended."""
        self._group.wait()
        return self.poll()


def _live(
    body: Callable[[int], int], log: str, rank: int, num_processes: int, port: int, environment: dict[str, str]
) -> None:
    """Life of a rank: never returns."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if num_processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_processes),
            LOCAL_WORLD_SIZE=str(num_processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.environ.update(environment)
    os.chdir(ROOT)
    # The server's own handlers are not a launched process's; nor is its way to start others, such as loaders of data.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)
    code = body(rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def call_main(module: str, words: list[str], rank: int) -> int:
    """Run `python -m module words` on this rank, but for the start of the interpreter."""
    sys.argv[1:] = words
    # Otherwise runpy warns that it is imported already.
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_rank(words: list[str], fault: Fault | None, rank: int) -> int:
    """Train on this rank."""
    _log_features(Path(words[words.index("--output_dir") + 1]).with_suffix(".features.jsonl"), rank)
    if fault is not None and fault.rank in (None, rank):
        _install(fault)
    from qa_dist.train import main

    return main(words)


def run_rank_and_copy(words: list[str], copies: Path, last: str, rank: int) -> int:
    """Train on this rank; the first one copies its run to `copies` before each change that a save makes to the disk.

    Each copy is what a SIGKILL at that instant would leave. No more are made when there is a checkpoint named `last`.
    """
    from qa_dist.training import checkpoints

    output, lock = Path(words[words.index("--output_dir") + 1]), threading.RLock()
    copied = itertools.count()
    is_saved = False

    def copy() -> None:
        nonlocal is_saved
        is_saved = is_saved or (output / "checkpoints" / last).exists()
        if not is_saved:
            folder = copies / f"{next(copied):03d}"
            shutil.copytree(output, folder)
            shutil.copy(output.with_suffix(".features.jsonl"), folder.with_suffix(".features.jsonl"))

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            # The rank steps on while a thread saves: one change after another.
            with lock:
                copy()
                return real(*arguments, **options)

        setattr(owner, name, wrapped)

    if rank == 0:
        copies.mkdir()
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (Path, "write_bytes"),
            (Path, "unlink"),
            (Path, "rmdir"),
            (shutil, "rmtree"),
            (checkpoints, "_remove"),
            (checkpoints, "prune"),
        ):
            wrap(owner, name)
    return run_rank(words, None, rank)


def _log_features(path: Path, rank: int) -> None:
    """Note which features every finished step had."""
    from qa_dist.training.trainer import Trainer

    real = Trainer.step

    def step(self: Any, number: int) -> Any:
        done = real(self, number)
        if rank == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": number, "features": self.inputs.global_batch(number).tolist()}) + "\n")
        return done

    Trainer.step = step  # type: ignore[method-assign]


def _install(fault: Fault) -> None:
    from qa_dist.evaluation import loop as evaluation
    from qa_dist.training import checkpoints, loop, step_inputs, trainer

    entered = 0

    def strike() -> None:
        nonlocal entered
        entered += 1
        if entered != fault.count:
            return
        while fault.signal is None:
            time.sleep(1)
        os.kill(os.getpid(), fault.signal)

    places: dict[str, tuple[Any, str]] = {
        "load": (loop, "build_trainable"),
        "step": (trainer.Trainer, "step"),
        "data": (step_inputs.FeatureBatch, "several"),
        "evaluate": (evaluation, "forward"),
        "save": (checkpoints, "write_checkpoint"),
    }
    owner, name = places[fault.phase]
    real = getattr(owner, name)

    def struck(*arguments: Any, **options: Any) -> Any:
        strike()
        return real(*arguments, **options)

    setattr(owner, name, struck)
