"""Processes that take tasks: every task is done once, a dead process is one failed trial, and a stop is heard."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.files import hold
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.sweeping import workers
from qa_dist.sweeping.plan import Trial
from qa_dist.sweeping.record import new_record, read_record, write_record
from qa_dist.sweeping.running import in_order
from qa_dist.sweeping.workers import LOG, Workers


def trial(folder: Path, method: str) -> Trial:
    config = RunConfig(training=TrainingConfig(output_dir=str(folder / method)))
    return Trial(method, 1, {}, config)


def body(each: Trial, step: int | None, asked_to_stop: Callable[[], signal.Signals | None]) -> bool:
    """Ends as the method's name says, and writes its process into the record."""
    print(f"log of {each.method}")
    if each.method == "dies":
        os._exit(7)
    while each.method.startswith("waits") and asked_to_stop() is None:
        time.sleep(0.01)
    status = "stopped" if asked_to_stop() else "done"
    write_record(each, {**new_record(each), "status": status, "process": os.getpid(), "pause": step})
    return each.method != "breaks"


def test_every_task_is_done_once_and_a_process_that_dies_is_one_failed_trial(tmp_path: Path) -> None:
    trials = [trial(tmp_path, method) for method in ("a", "dies", "b", "c", "breaks", "d")]
    ended: list[str] = []
    with Workers(1, body) as workers:
        assert workers.run(
            in_order((each, 5) for each in trials), is_over=lambda: False, ended=lambda each: ended.append(each.method)
        )
    assert ended == ["a", "dies", "b", "c", "breaks", "d"]
    records = [read_record(each) or {} for each in trials]
    assert [record["status"] for record in records] == ["done", "failed", *["done"] * 4]
    assert records[1]["error"] == f"its process ended with code 7; {trials[1].folder / LOG} has its last words"
    assert records[0]["pause"] == 5
    # One process takes one trial after the other, until it dies or says that it is broken.
    assert records[2]["process"] == records[3]["process"] == records[4]["process"]
    assert len({records[number]["process"] for number in (0, 2, 5)}) == 3
    assert (trials[2].folder / LOG).read_text(encoding="utf-8") == "log of b\n"


def test_a_process_that_dies_before_it_has_read_its_task_is_one_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give = workers._give

    def kill_first(worker: Any, task: Any) -> None:
        if task[0].method == "unread":
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        give(worker, task)

    monkeypatch.setattr(workers, "_give", kill_first)
    trials = [trial(tmp_path, method) for method in ("unread", "a")]
    ended: list[str] = []
    with Workers(1, body) as each:
        assert each.run(
            in_order((one, 5) for one in trials), is_over=lambda: False, ended=lambda one: ended.append(one.method)
        )
    assert ended == ["unread", "a"]
    assert [(read_record(one) or {})["status"] for one in trials] == ["failed", "done"]


def test_a_pipe_that_is_reset_is_that_of_a_dead_process(tmp_path: Path) -> None:
    class Reset:
        def poll(self) -> bool:
            return True

        def recv(self) -> None:
            raise ConnectionResetError

    class Dead:
        exitcode = -9

        def is_alive(self) -> bool:
            return False

        def join(self) -> None:
            pass

    one, ended = trial(tmp_path, "a"), []
    several = Workers(1, body)
    dead: Any = workers._Worker(Dead(), Reset())  # type: ignore[arg-type]
    dead.task = (one, 5)
    several._workers.append(dead)
    several._collect(dead, ended.append)
    assert ended == [one]
    assert (read_record(one) or {})["error"].startswith("its process ended with code -9")


def test_a_folder_that_another_run_holds_is_left_to_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SECONDS_TO_STOP", 0.0)
    one = trial(tmp_path, "a")
    one.folder.mkdir()
    held = hold(one.folder, "")
    assert workers._train(one, None, lambda: None)
    os.close(held)
    assert (read_record(one) or {})["status"] == "stopped"


def test_all_hear_that_the_time_is_over(tmp_path: Path) -> None:
    trials = [trial(tmp_path, method) for method in ("quick", "waits", "waits too", "never")]
    ended: list[str] = []

    def is_over() -> bool:
        # When the first has ended, one process runs a trial that waits, and so does the other.
        return "quick" in ended and all((each.folder / LOG).exists() for each in trials[:3])

    with Workers(2, body) as workers:
        tasks = [(each, None) for each in trials]
        assert not workers.run(in_order(tasks), is_over=is_over, ended=lambda each: ended.append(each.method))
    assert sorted(ended) == ["quick", "waits", "waits too"]
    assert [(read_record(each) or {"status": None})["status"] for each in trials] == [
        "done",
        "stopped",
        "stopped",
        None,
    ]


def test_a_process_that_is_told_to_stop_alone_takes_no_other_task_and_its_trial_is_left_over(tmp_path: Path) -> None:
    trials = [trial(tmp_path, method) for method in ("waits", "a", "b")]
    told: list[int] = []

    def is_over() -> bool:
        if not told and (trials[0].folder / LOG).exists():
            (worker,) = workers._workers
            assert worker.process.pid is not None
            told.append(worker.process.pid)
            os.kill(told[0], signal.SIGTERM)
        return False

    with Workers(1, body) as workers:
        tasks = [(each, None) for each in trials]
        assert not workers.run(in_order(tasks), is_over=is_over, ended=lambda each: None)
        # The next time there is nothing left over.
        assert workers.run(in_order([]), is_over=is_over, ended=lambda each: None)
    records = [read_record(each) or {} for each in trials]
    assert [record["status"] for record in records] == ["stopped", "done", "done"]
    assert told[0] not in {records[1]["process"], records[2]["process"]}


START = """
import sys
from pathlib import Path
from qa_dist.sweeping.running import in_order
from qa_dist.sweeping.workers import Workers
from tests.unit.sweeping.test_workers import body, trial
with Workers(1, body) as workers:
    each = trial(Path(sys.argv[1]), "waits")
    workers.run(in_order([(each, None)]), is_over=lambda: False, ended=lambda each: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends processes with their parent on Linux alone")
def test_a_trial_stops_when_its_sweep_is_killed(tmp_path: Path) -> None:
    each = trial(tmp_path, "waits")
    sweep = subprocess.Popen([sys.executable, "-c", START, str(tmp_path)], cwd=Path(__file__).parents[3])
    end = time.monotonic() + 120
    while not (each.folder / LOG).exists() and time.monotonic() < end:
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    while read_record(each) is None and time.monotonic() < end:
        time.sleep(0.05)
    assert (read_record(each) or {})["status"] == "stopped"
