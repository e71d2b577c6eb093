"""Memory of long runs with each allocator, and the part of a page about it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qa_dist import bench
from qa_dist.benchmarking import long_run
from qa_dist.machine import allocator

SECTION = {
    "hardware": {"cpu_count": 2, "processor": "a processor"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "git_commit": "0123456789abcdef",
}


def test_a_run_starts_with_the_allocator_that_it_is_named_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long_run, "find_jemalloc", lambda: tmp_path / "libjemalloc.so.2")
    monkeypatch.setattr(allocator, "glibc_version", lambda: (2, 36))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    by_name = long_run.environments({"HOME": "/", "LD_PRELOAD": "another.so"})
    assert {name: each["LD_PRELOAD"] for name, each in by_name.items()} == {
        "glibc": "",
        "glibc, no cache": "",
        "jemalloc": str(tmp_path / "libjemalloc.so.2"),
    }
    assert {name for name, each in by_name.items() if "GLIBC_TUNABLES" in each} == {"glibc, no cache"}
    assert {each["HOME"] for each in by_name.values()} == {"/"}
    monkeypatch.setattr(long_run, "find_jemalloc", lambda: None)
    words = ["memory", "long", str(tmp_path / "long.json"), "--train_file", "a", "--validation_file", "b"]
    assert bench.main(words) == 2
    assert "jemalloc is not installed" in capsys.readouterr().err
    assert not (tmp_path / "long.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_noted_once_for_each_step_that_was_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(long_run, "STEPS", (1, 3, 4))
    metrics = tmp_path / "metrics.jsonl"
    # It has 64 MiB at most, and 1 later; it ends when its input does.
    program = "import sys; x = bytearray(2**26); print(flush=True); x = 1; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline(), process.stdout.readline()
        looks: Iterator[Any] = long_run.samples(process, metrics)
        seen = [next(looks)]
        for lines in (1, 2, 3, 3, 5):
            metrics.write_text('{"step": 1, "loss": 2.5}\n' * lines + '{"eval_loss": 2.5}\n', encoding="utf-8")
            seen.append(next(looks))
        assert next(looks, "ended") == "ended"
        process.kill()
    assert [each and each["step"] for each in seen] == [None, 1, None, 3, None, 5]
    for each in filter(None, seen):
        assert 2**26 < each["peak_bytes"] < 2**28
        assert 2**20 < each["resident_bytes"] < each["peak_bytes"] - 2**25


def test_a_run_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        assert list(long_run.samples(process, tmp_path / "metrics.jsonl")) == []


def test_what_was_got_to_is_written_and_a_failed_run_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # In the place of training: one step, and an end with an error where it has jemalloc.
    program = tmp_path / "python"
    text = """#!/bin/sh
    while [ "$1" != --output_dir ]; do shift; done
    mkdir -p "$2"; echo '{"loss": 1.0}' > "$2"/metrics.jsonl; sleep 0.5; echo "bad luck" >&2; exit $STATUS
    """
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(long_run, "STEPS", (1, 2))
    monkeypatch.setattr(long_run, "_INTERVAL", 0.01)
    monkeypatch.setattr(long_run.sys, "executable", str(program))
    by_name = {name: {**os.environ, "STATUS": status} for name, status in (("glibc", "0"), ("jemalloc", "3"))}
    monkeypatch.setattr(long_run, "environments", lambda base: by_name)
    path = tmp_path / "long.json"
    words = ["memory", "long", str(path), "--train_file", "a", "--validation_file", "b"]
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert "the run with jemalloc ended with code 3:" in error
    assert "bad luck" in error
    runs = json.loads(path.read_text(encoding="utf-8"))["long_run"]["allocators"]
    assert {name: [each["step"] for each in run] for name, run in runs.items()} == {"glibc": [1], "jemalloc": [1]}
    assert "allocator" not in json.loads(path.read_text(encoding="utf-8"))["hardware"], "that of the process that looks"


def test_a_page_is_made_of_both_kinds_of_files_and_one_is_not_taken_for_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "long.json", tmp_path / "memory.md"
    runs = {"glibc": [{"step": 2000, "resident_bytes": 2**30, "peak_bytes": 2**30}], "jemalloc": []}
    whole = {**SECTION, "long_run": {"options": [], "allocators": runs}}
    path.write_text(json.dumps(whole), encoding="utf-8")
    compared = Path(__file__).parents[3] / "docs" / "memory" / "cpu.json"
    assert bench.main(["memory", "report", str(compared), str(path), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| full, FSDP2 | fsdp2, 2 |" in text
    assert "| 2,000 | 1,024 (1,024) |  |" in text
    assert bench.main(["memory", "estimate", str(path)]) == 2
    assert f"{path} holds no measured memory ('compared' is missing)" in capsys.readouterr().err


def test_the_part_of_the_page_has_what_was_reached_and_nothing_else() -> None:
    assert "How much the two take over 2,000 steps: not yet measured." in long_run.section([])
    mib = 2**20
    runs = {
        "glibc": [{"step": 5, "resident_bytes": 700 * mib, "peak_bytes": 710 * mib}],
        "jemalloc": [
            {"step": 6, "resident_bytes": 600 * mib, "peak_bytes": 1610 * mib},
            {"step": 20, "resident_bytes": 601 * mib, "peak_bytes": 1611 * mib},
        ],
    }
    lines = long_run.section([{**SECTION, "long_run": {"options": ["--config", "x"], "allocators": runs}}])
    table = [line for line in lines if line.startswith("|")]
    # Of steps that neither came to there is no row.
    assert table == [
        "| steps | glibc | jemalloc |",
        "| ---: | ---: | ---: |",
        "| 5 | 700 (710) | 600 (1,610) |",
        "| 20 |  | 601 (1,611) |",
    ]
    assert not any("not yet measured" in line for line in lines)
    stopped = "These runs were stopped after 5 with glibc and 20 with jemalloc: of more, nothing is measured yet."
    assert stopped in " ".join(lines)
    # Of several files with the same options, these are said once.
    same = [{**SECTION, "long_run": {"options": ["--config", "x"], "allocators": runs}}] * 2
    assert " ".join(long_run.section(same)).count("of `--config x`") == 1
    alike = {name: [{"step": 20, "resident_bytes": mib, "peak_bytes": mib}] for name in runs}
    lines = long_run.section([{**SECTION, "long_run": {"options": [], "allocators": alike}}])
    assert "These runs were stopped after 20 steps: of more, nothing is measured yet." in " ".join(lines)
    whole = {name: [{"step": 2000, "resident_bytes": mib, "peak_bytes": mib}] for name in runs}
    lines = long_run.section([{**SECTION, "long_run": {"options": [], "allocators": whole}}])
    assert "| 2,000 | 1 (1) | 1 (1) |" in lines
    assert "stopped" not in " ".join(lines)
