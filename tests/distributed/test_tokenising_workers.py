"""Processes that tokenise: the same columns from any number of them, and what a dead or failing one says."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from qa_dist.data.records import Example
from qa_dist.features import workers
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureColumns, FeatureSpec
from qa_dist.features.workers import build_columns
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import tiny_examples

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
SPEC = FeatureSpec(96, 24)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few examples be enough for several workers and many chunks."""
    monkeypatch.setattr(workers, "_CHUNK_EXAMPLES", 3)
    monkeypatch.setattr(workers, "_MIN_EXAMPLES_PER_WORKER", 1)


def columns_of(num_workers: int, examples: list[Example], **options: Any) -> FeatureColumns:
    tokenizer = TokenizerSpec.of(tiny_tokenizer())
    return build_columns(examples, tokenizer, SPEC, num_workers=num_workers, **options)[0]


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Make sure that a test ends the processes that it starts; others of this process belong to earlier tests."""
    before = psutil.Process().children()
    yield
    assert [process for process in psutil.Process().children() if process not in before] == []


@pytest.mark.usefixtures("small_chunks", "no_process_left")
@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_workers_gives_the_same_columns(num_workers: int) -> None:
    examples = tiny_examples() * 3
    alone, shared = columns_of(1, examples), columns_of(num_workers, examples)
    for name in FeatureColumns.__slots__:
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))
        assert getattr(alone, name).dtype == getattr(shared, name).dtype
    assert alone.example_index[-1] == len(examples) - 1


def test_few_examples_need_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Worker", None)
    assert len(columns_of(8, tiny_examples()).lengths) > 0


@pytest.mark.usefixtures("small_chunks")
def test_the_bar_is_on_stderr_and_only_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    columns_of(2, tiny_examples())
    assert capfd.readouterr() == ("", "")
    columns_of(2, tiny_examples(), progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err


def test_a_worker_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qa_dist.features.workers\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.usefixtures("small_chunks")
def test_modules_in_the_current_folder_do_not_reach_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit('imported by mistake')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported by mistake')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert len(columns_of(2, tiny_examples()).lengths) > 0


@pytest.mark.usefixtures("small_chunks", "no_process_left")
def test_a_failure_in_a_worker_comes_back_with_its_traceback() -> None:
    broken = Example("a", None, "context")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"a tokenising process failed:\n.*Traceback(?s:.*)AttributeError"):
        columns_of(2, [*tiny_examples(), broken])


def test_a_killed_worker_is_named_as_such() -> None:
    worker = workers._Worker(TokenizerSpec.of(tiny_tokenizer()), SPEC)
    try:
        part, _ = worker.request(tiny_examples(), 5)
        assert part.example_index[0] == 5
        worker.process.kill()
        with pytest.raises(RuntimeError, match=r"exit code -9 .*--preprocessing_num_workers"):
            worker.request(tiny_examples(), 5)
    finally:
        worker.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_that_ask_a_run_to_stop_are_not_for_workers(number: signal.Signals) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    worker = workers._Worker(TokenizerSpec.of(tiny_tokenizer()), SPEC)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    try:
        # From its first moment on.
        worker.process.send_signal(number)
        worker.request(tiny_examples(), 5)
        worker.process.send_signal(number)
        part, _ = worker.request(tiny_examples(), 7)
        assert part.example_index[0] == 7
    finally:
        worker.close()


def test_workers_end_with_a_killed_parent() -> None:
    code = (
        "import sys, time\n"
        "from qa_dist.features.workers import _Worker\n"
        "workers = [_Worker(None, None) for _ in range(2)]\n"
        "print(*(worker.process.pid for worker in workers), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        # A container may have nobody to reap orphans: they stay as zombies, which run nothing.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
