"""Items one after another: limits, failures, what is not reached, and the file that is whole after every line."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qa_dist import bench
from qa_dist.benchmarking.gpu import page
from qa_dist.benchmarking.gpu.items import Failed, Item, Log, Skipped, run_items, table
from qa_dist.benchmarking.gpu.packing import strip_bitsandbytes
from qa_dist.benchmarking.gpu.page import BEGIN, END, PREDICTIONS, read, results_text
from qa_dist.common.errors import UserError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def item(name: str, work: Any, *, seconds: float = 60, least: float = 0) -> Item:
    return Item(name, "a", seconds, work, least)


def endless() -> None:
    # As a library that catches whatever comes.
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


def test_an_item_that_only_the_time_for_everything_cut_short_has_not_failed(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def run(seconds: float | None, limit: float) -> str:
        items = [item("slow", lambda: time.sleep(30), seconds=limit)]
        (found,) = run_items(items, Log(path), seconds=seconds, started=time.monotonic(), notice=lambda line: None)
        return found.status

    assert run(0.3, 60) == "not reached"
    assert run(None, 0.3) == "failed"
    assert "that were left" in lines(path)[0]["reason"]


def test_every_item_is_a_line_at_once(tmp_path: Path) -> None:
    path, seen = tmp_path / "log", []

    def fail() -> None:
        seen.append(len(lines(path)))
        raise Failed("too much", {"error": float("inf")})

    def skip() -> None:
        seen.append(len(lines(path)))
        raise Skipped("not here")

    outcomes = run_items(
        [
            item("one", lambda: {"value": 1.23456789, "nested": {"a": [1, None]}}),
            item("two", fail),
            item("three", skip),
        ],
        Log(path),
        seconds=None,
        started=time.monotonic(),
        notice=lambda line: None,
    )
    assert seen == [1, 2]
    one, two, three = lines(path)
    assert one["figures"] == {"value": 1.23457, "nested": {"a": [1, None]}}
    assert (two["status"], two["reason"], two["figures"]) == ("failed", "Failed: too much", {"error": "inf"})
    assert two["traceback"][-1].endswith("Failed: too much")
    assert (three["status"], three["reason"]) == ("skipped", "not here")
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "skipped"]
    assert "1 passed, 1 failed, 1 skipped, 0 not reached" in table(outcomes)


def test_an_item_that_takes_too_long_ends_and_the_next_one_runs(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGALRM)
    items = [item("endless", endless, seconds=0.2), item("next", lambda: {"x": 1})]
    run_items(items, Log(tmp_path / "log"), seconds=None, started=time.monotonic(), notice=lambda line: None)
    first, second = lines(tmp_path / "log")
    assert (first["status"], first["reason"]) == ("failed", "not done after 0 s")
    assert any("endless" in line for line in first["traceback"])
    assert second["status"] == "passed"
    assert signal.getsignal(signal.SIGALRM) == before


def test_what_does_not_fit_is_not_reached(tmp_path: Path) -> None:
    items = [item("long", lambda: {}, least=30), item("short", lambda: {})]
    run_items(items, Log(tmp_path / "log"), seconds=10, started=time.monotonic(), notice=lambda line: None)
    long, short = lines(tmp_path / "log")
    assert (long["status"], short["status"]) == ("not reached", "passed")
    assert "s were left" in long["reason"]


def test_what_no_exception_reaches_ends_the_process_and_loses_nothing(tmp_path: Path) -> None:
    program = """
import sys, time
from qa_dist.benchmarking.gpu import items as gpu_items
gpu_items._GRACE_SECONDS = 0.3

class Deaf:
    # The alarm's exception is swallowed, as in C.
    def __enter__(self): return self
    def __exit__(self, *_): return True

def deaf():
    while True:
        with Deaf():
            time.sleep(60)

works = {"well": dict, "deaf": deaf, "later": dict}
items = [gpu_items.Item(name, "a", 0.2, work, 0) for name, work in works.items()]
log = gpu_items.Log(__import__("pathlib").Path(sys.argv[1]))
gpu_items.run_items(items, log, seconds=None, started=time.monotonic(), notice=print)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(bench.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log")], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 1
    assert [(line["item"], line["status"]) for line in lines(tmp_path / "log")] == [
        ("well", "passed"),
        ("deaf", "failed"),
        ("later", "not reached"),
    ]
    assert any("deaf" in text for text in lines(tmp_path / "log")[1]["traceback"])
    # As every other line, or the page could not be made of it.
    later = {"part": "a", "seconds": 0, "figures": {}, "reason": "deaf hung"}
    assert lines(tmp_path / "log")[2] == {"item": "later", "status": "not reached", **later}
    assert b"1 passed, 1 failed" in done.stderr


# ------------------------------------------------------------------------------------------------------------ the page


def gpu_file(path: Path, *, rehearsal: bool = False, devices: tuple[str, ...] = ("NVIDIA H100",)) -> Path:
    origin = {
        "format": 1,
        "started": "2026-01-02T03:04:05+00:00",
        "rehearsal": rehearsal,
        "note": "first",
        "commit": "abc",
        "machine": {"devices": list(devices)},
        "versions": {"torch": "2.11", "cuda": "13.0", "driver": "580", "transformers": "5.17"},
    }
    speed = {"ms_per_step": 9.5, "tokens_per_second": 570_000.0, "fraction_of_989": 0.21, "launches_per_step": 1150}
    entries = [
        origin,
        {"item": "attention", "part": "a", "status": "failed", "seconds": 1, "figures": {}, "reason": "a | b"},
        {"item": "train q, v, batch 32", "part": "b", "status": "passed", "seconds": 5, "figures": speed},
        origin,
        {"item": "attention", "part": "a", "status": "passed", "seconds": 2, "figures": {"cases": 108}},
        {"item": "train q, v, batch 32", "part": "b", "status": "not reached", "seconds": 0, "figures": {}},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_the_page_shows_predictions_beside_what_was_measured(tmp_path: Path) -> None:
    target = tmp_path / "gpu.md"
    target.write_text(f"# Title\n{BEGIN}\nold\n{END}\nrest\n", encoding="utf-8")
    assert bench.main(["gpu", "report", "--output", str(target)]) == 0
    assert target.read_text(encoding="utf-8").count("not yet measured") == len(PREDICTIONS)
    assert bench.main(["gpu", "report", str(gpu_file(tmp_path / "h100.jsonl")), "--output", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n{BEGIN}\n### 1 x NVIDIA H100\n")
    assert text.endswith(f"{END}\nrest\n")
    assert "| ms a step with LoRA layers in groups | at most 35 | 9.5 |" in text
    assert "| seconds an epoch of the same | at most 30 | not yet measured |" in text
    assert "| attention | passed | cases 108 | 2.0 |" in text, "the last run in which it was reached"
    assert "| train q, v, batch 32 | 9.5 | 570,000 |" in text


def test_the_page_of_the_repository_is_what_its_files_make() -> None:
    docs = Path(bench.__file__).parents[1] / "docs"
    part = (docs / "gpu.md").read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(END)[0]
    assert part == results_text([read(path) for path in sorted((docs / "gpu").glob("*.jsonl"))])


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}\n", encoding="utf-8")
    for path in (tmp_path / "bad", tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot be read as results"):
            read(path)
    for path in (gpu_file(tmp_path / "a", rehearsal=True), gpu_file(tmp_path / "b", devices=())):
        with pytest.raises(UserError, match="is of a rehearsal"):
            read(path)
    with pytest.raises(UserError, match="has no lines"):
        page.main(["--output", str(tmp_path / "bad")], "report")


# --------------------------------------------------------------------------------------------------------- the archive


def test_a_wheel_keeps_the_library_of_one_version_of_cuda(tmp_path: Path) -> None:
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda121", "cuda130", "rocm62")]
    names += ["bitsandbytes/__init__.py"]
    record = "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(tmp_path / "all.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, name)
        wheel.writestr(record, "".join(f"{name},sha256=x,1\n" for name in [*names, record]))
    strip_bitsandbytes(tmp_path / "all.whl", tmp_path / "one.whl", "130")
    with zipfile.ZipFile(tmp_path / "one.whl") as wheel:
        kept = wheel.namelist()
        listed = [line.split(",")[0] for line in wheel.read(record).decode().splitlines()]
        assert wheel.read(names[2]).decode() == names[2]
    assert kept == [names[0], names[2], names[4], record]
    assert listed == kept
    with pytest.raises(UserError, match="no library for CUDA 999, only for 121, 130"):
        strip_bitsandbytes(tmp_path / "all.whl", tmp_path / "none.whl", "999")
