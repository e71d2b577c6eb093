"""The doctor's command line and what it prints."""

import json
import subprocess
import sys
from typing import Any

import pytest

from qa_dist import doctor
from qa_dist.machine.checks import Check

OK = Check("python", "ok", "3.11.7")
WARNING = Check("hub", "warning", "offline", "use local files")
FAILURE = Check("GPU 0", "failure", "does not compute", "update the driver")
MEASURED: dict[str, Any] = {
    "world_size": 4,
    "device": "cuda",
    "places": "a, b (ranks 0-3)",
    "rates": [{"num_bytes": 1 << 20, "num_rounds": 9, "seconds": 0.002, "bus_bytes_per_second": 7.5e9}],
}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the doctor finds; tests add to it."""
    checks = [OK, WARNING]
    monkeypatch.setattr(doctor, "examine", lambda output_dir, store_dir: list(checks))
    monkeypatch.delenv("RANK", raising=False)
    return checks


def test_the_table(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0, "a warning is no failure"
    assert capsys.readouterr().out.splitlines() == [
        "ok       python  3.11.7",
        "warning  hub     offline -> use local files",
        "ok: 1, warning: 1, failure: 0",
    ]


def test_one_process_has_nobody_to_exchange_data_with(
    found: list[Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine with one GPU, where two processes could not share it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert doctor.main(["--launch"]) == 0
    assert "all-reduce  one process, which has nobody to exchange data with" in capsys.readouterr().out


def test_a_failure_is_exit_code_1(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    found.append(FAILURE)
    assert doctor.main([]) == 1
    assert "failure  GPU 0   does not compute -> update the driver\n" in capsys.readouterr().out


def test_json_says_the_same(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    found.append(FAILURE)
    assert doctor.main(["--json"]) == 1
    whole = json.loads(capsys.readouterr().out)
    assert [Check(**entry) for entry in whole["checks"]] == [OK, WARNING, FAILURE]
    assert whole["all_reduce"] is None
    assert whole["host"]


def test_launching(found: list[Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def launch(num_processes: int, seconds: float) -> tuple[list[Check], dict[str, Any]]:
        asked.append((num_processes, seconds))
        return doctor.rate_checks(MEASURED), MEASURED

    monkeypatch.setattr(doctor, "launch", launch)
    assert doctor.main(["--launch", "--num_processes", "4", "--seconds", "2"]) == 0
    assert asked == [(4, 2.0)]
    output = capsys.readouterr().out
    assert "all-reduce 1 MiB  7.50 GB/s, 2.00 ms; 4 processes (cuda) on a, b (ranks 0-3)" in output
    assert "bytes * 2 (n - 1) / n / seconds" in output
    assert doctor.main(["--launch", "--num_processes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all_reduce"] == MEASURED


def test_what_the_measuring_processes_say() -> None:
    checks, measured = doctor.launched(4, 0, json.dumps({"all_reduce": MEASURED}), "noise")
    assert measured == MEASURED
    assert [check.status for check in checks] == ["ok"]
    errors = "W1123 noise\nqa_dist.doctor: error: rank 1 on b cannot exchange data\nChildFailedError\n"
    (check,), measured = doctor.launched(4, 1, "", errors)
    assert measured is None
    assert (check.status, check.found) == (
        "failure",
        "4 processes: qa_dist.doctor: error: rank 1 on b cannot exchange data",
    )
    assert "--nproc_per_node 4 -m qa_dist.doctor --launch" in check.remedy
    (check,), _ = doctor.launched(2, 1, "", "")
    assert "exit code 1" in check.found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_processes", "2"], "--num_processes is for --launch"),
        (["--seconds", "2"], "--seconds is for --launch"),
        (["--launch", "--num_processes", "1"], "--num_processes 1 is out of range; it must be at least 2"),
        (["--launch", "--seconds", "0"], "--seconds 0 is out of range"),
        (["--lunch"], "did you mean --launch?"),
    ],
)
def test_mistakes(found: list[Check], words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(words) == 2
    assert said in capsys.readouterr().err


def test_help_needs_no_heavy_library() -> None:
    code = "import sys, qa_dist.doctor; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
