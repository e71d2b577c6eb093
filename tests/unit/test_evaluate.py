"""The precision of an evaluation: the run's own, or the one that was asked for, and what is said where it is slow."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist import evaluate
from qa_dist.model import precision
from tests.unit.trained import reset_accelerate, trained_folder

SLOW = "this processor has no instructions for bf16"


@pytest.fixture(scope="module")
def of_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run in bfloat16, whose layers hand on bfloat16 too."""
    folder = tmp_path_factory.mktemp("bf16")
    return trained_folder(folder, mixed_precision="bf16", residual_dtype="bf16") / "adapter"


def evaluated(adapter: Path, results: Path, *more: str) -> tuple[Any, Any]:
    """metrics.json and nbest.json of an evaluation."""
    reset_accelerate()
    assert evaluate.main(["--adapter", str(adapter), "--results_dir", str(results), *more]) == 0
    return tuple(json.loads((results / name).read_text(encoding="utf-8")) for name in ("metrics.json", "nbest.json"))


def test_an_evaluation_has_the_precision_of_its_run_unless_another_is_asked_for(of_bf16: Path, tmp_path: Path) -> None:
    as_run = evaluated(of_bf16, tmp_path / "run")
    assert as_run[0] == json.loads((of_bf16 / "metrics.json").read_text(encoding="utf-8"))
    assert as_run[1] == json.loads((of_bf16 / "nbest.json").read_text(encoding="utf-8"))
    assert evaluated(of_bf16, tmp_path / "same", "--mixed_precision", "bf16") == as_run
    in_float32 = evaluated(of_bf16, tmp_path / "float32", "--mixed_precision", "no")
    best, other = (max(answers[0]["score"] for answers in nbest.values()) for _, nbest in (as_run, in_float32))
    assert best != other
    assert best == pytest.approx(other, abs=0.2)


@pytest.mark.parametrize("has_them", [False, True])
def test_what_makes_an_evaluation_slow_is_said(
    of_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_them: bool
) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda device_type, asked: has_them or asked == "no")
    evaluated(of_bf16, tmp_path / "run")
    assert (SLOW in capsys.readouterr().err) is not has_them
    evaluated(of_bf16, tmp_path / "float32", "--mixed_precision", "no")
    assert SLOW not in capsys.readouterr().err


def test_what_makes_a_run_slow_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda device_type, asked: asked == "no")
    trained_folder(tmp_path, mixed_precision="bf16")
    shown = capsys.readouterr().err
    assert shown.count(f"note: {SLOW}") == 1
    assert "use no here" in shown
