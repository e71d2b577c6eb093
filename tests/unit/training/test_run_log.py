"""What a run says, shows, sends to trackers and writes: on rank 0, and nowhere else."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qa_dist.common.errors import LocalTrainingError
from qa_dist.evaluation.results import Evaluation
from qa_dist.model.trainable import ParameterReport
from qa_dist.training.output_folder import OutputFolder
from qa_dist.training.run_log import RunLog
from qa_dist.training.run_state import RunState
from qa_dist.training.trainer import StepResult

METRICS: dict[str, float | int] = {"exact_match": 50.0, "f1": 62.5, "num_examples": 12}
SCORED, LOSS_ONLY = Evaluation(METRICS, 1.25, None), Evaluation({}, 2.5, None)


def result(loss: float = 0.5, grad_norm: float = 2.0) -> StepResult:
    return StepResult(loss=loss, grad_norm=grad_norm, num_features=8, num_tokens=100, most_tokens=60)


def record(log: RunLog, folder: Path, final: Evaluation | None = SCORED) -> dict[str, Any]:
    """run.json, as the run's end writes it."""
    log.write_record(
        world_size=2,
        strategy="ddp",
        num_steps=4,
        weights_of_step=2,
        final=final,
        seconds={"train": 1.23456},
        peak_memory_bytes_per_rank=[7, 8],
    )
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def test_every_step_and_evaluation_is_a_line_of_metrics_jsonl(tmp_path: Path, capsys: Any) -> None:
    log = RunLog(OutputFolder(tmp_path))
    log.evaluation(0, LOSS_ONLY)
    log.start(4, 2, done=0, shown=False)
    log.step(1, result(), 1e-3)
    log.step(2, result(grad_norm=math.inf), 5e-4)
    log.evaluation(2, SCORED)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == (
        '{"step": 0, "epoch": 0.0, "eval_loss": 2.5}\n'
        '{"step": 1, "epoch": 0.5, "loss": 0.5, "learning_rate": 0.001, "grad_norm": 2.0, "num_features": 8, '
        '"num_tokens": 100}\n'
        '{"step": 2, "epoch": 1.0, "loss": 0.5, "learning_rate": 0.0005, "grad_norm": null, "num_features": 8, '
        '"num_tokens": 100}\n'
        '{"step": 2, "epoch": 1.0, "eval_loss": 1.25, "eval_exact_match": 50.0, "eval_f1": 62.5, '
        '"eval_num_examples": 12}\n'
    )
    assert capsys.readouterr().err.splitlines() == [
        "before training: validation loss 2.5000",
        "step 2: validation loss 1.2500, EM 50.00, F1 62.50",
    ]
    assert log.skipped_steps == 1
    assert log.evaluations == [{"step": 0, "loss": 2.5}, {"step": 2, "loss": 1.25, **METRICS}]


def test_an_evaluation_that_is_made_again_has_one_line(tmp_path: Path) -> None:
    for life in range(2):
        log = RunLog(OutputFolder(tmp_path))
        log.start(4, 2, done=2 * life, shown=False)
        if life:
            log.go_on_after(2, RunState(world_size=1, max_tokens_per_device=64, evaluation_pending=True))
        else:
            log.step(1, result(), 1e-3)
            log.step(2, result(), 1e-3)
        log.evaluation(2, SCORED)
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (2, False)]


def test_other_ranks_count_but_say_and_write_nothing(tmp_path: Path, capsys: Any) -> None:
    log = RunLog(OutputFolder(tmp_path), is_main=False)
    log.start(4, 2, done=0, shown=True)
    log.notice("a word")
    log.step(1, result(grad_norm=math.nan), 1e-3)
    log.evaluation(1, SCORED)
    log.go_on_after(1, RunState(world_size=2, max_tokens_per_device=64, skipped_steps=5))
    log.close()
    assert log.skipped_steps == 5
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_trackers_get_the_figures_every_so_many_steps(tmp_path: Path) -> None:
    sent: list[Any] = []
    log = RunLog(OutputFolder(tmp_path), track=lambda figures, step: sent.append((step, figures)), logging_steps=2)
    log.start(4, 2, done=0, shown=False)
    log.step(1, result(), 1e-3)
    log.step(2, result(grad_norm=math.inf), 1e-3)
    log.evaluation(3, LOSS_ONLY)
    log.close()
    shown = {"epoch": 1.0, "loss": 0.5, "learning_rate": 1e-3, "num_features": 8, "num_tokens": 100}
    assert sent == [(2, {f"train/{name}": value for name, value in shown.items()}), (3, {"eval/loss": 2.5})]


def test_a_resumed_run_goes_on_with_the_log(tmp_path: Path) -> None:
    earlier = RunLog(OutputFolder(tmp_path))
    for step in (1, 2, 3):
        earlier.step(step, result(loss=step), 1e-3)
    earlier.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    state = RunState(
        world_size=1,
        max_tokens_per_device=64,
        evaluations=({"step": 1, "loss": 3.0},),
        resumed_at_steps=(1,),
        skipped_steps=2,
    )
    log = RunLog(OutputFolder(tmp_path))
    log.go_on_after(2, state)
    log.step(3, result(loss=7), 1e-3)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(line["step"], line["loss"]) for line in map(json.loads, lines)] == [(1, 1), (2, 2), (3, 7)]
    found = record(log, tmp_path)
    assert found["evaluations"] == [{"step": 1, "loss": 3.0}]
    assert found["skipped_steps"] == 2
    assert found["resumed_at_steps"] == [1, 2]


def test_times_of_steps_are_in_a_file_of_their_own_and_go_on_too(tmp_path: Path) -> None:
    earlier = RunLog(OutputFolder(tmp_path))
    for step in (1, 2, 3):
        earlier.step(step, result(), 1e-3, seconds=step / 8, world_size=2)
    earlier.close()
    log = RunLog(OutputFolder(tmp_path))
    log.go_on_after(2, RunState(world_size=2, max_tokens_per_device=64))
    log.step(3, result(), 1e-3, seconds=7, world_size=3)
    log.close()
    RunLog(OutputFolder(tmp_path), is_main=False).step(4, result(), 1e-3, seconds=1)
    found = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found == [
        {"step": 1, "step_seconds": 0.125, "most_tokens": 60, "world_size": 2},
        {"step": 2, "step_seconds": 0.25, "most_tokens": 60, "world_size": 2},
        {"step": 3, "step_seconds": 7, "most_tokens": 60, "world_size": 3},
    ]
    assert "seconds" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_the_record_holds_what_was_described_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--model_name_or_path", "hf_" + "a" * 34])
    store: Any = SimpleNamespace(
        fingerprint="f" * 64, num_examples=1234, num_unanswerable=5, num_features=2345, lengths=np.array([10, 21, 22])
    )
    model: Any = SimpleNamespace(padding="sorted", notes=("it pads",))
    log = RunLog(OutputFolder(tmp_path))
    log.describe_data({"train": store})
    log.describe_model(model, ParameterReport(10, 100, 90, (("head", (2, 5)),)), structure=True)
    log.step(1, result(), 1e-3)
    found = record(log, tmp_path)
    log.close()
    said = capsys.readouterr().err
    assert "train: 1,234 examples, 5 of them unanswerable; 2,345 features of 17.7 tokens on average" in said
    assert "head  2x5" in said
    assert "note: it pads" in said
    keys = (
        "started finished command world_size strategy num_steps weights_of_step data parameters padding final seconds"
    )
    assert list(found) == [*keys.split(), "peak_memory_bytes_per_rank", "hardware", "versions", "git_commit"]
    assert found["command"][:2] == ["train", "--model_name_or_path"]
    assert "aaa" not in found["command"][2], "no secret is written"
    assert found["data"]["train"] == {
        "fingerprint": "f" * 64,
        "num_examples": 1234,
        "num_unanswerable": 5,
        "num_features": 2345,
        "mean_tokens": 17.67,
    }
    assert found["parameters"] == {"trainable": 10, "total": 100, "before": 90}
    assert (found["padding"], found["num_steps"], found["weights_of_step"]) == ("sorted", 4, 2)
    assert (found["world_size"], found["strategy"]) == (2, "ddp")
    assert found["final"] == {"loss": 1.25, **METRICS, "answer_normalization": "squad"}
    assert found["seconds"] == {"train": 1.235}
    assert found["peak_memory_bytes_per_rank"] == [7, 8]
    assert record(log, tmp_path, final=None)["final"] is None


def test_the_end_says_what_training_brought_where_that_is_known(tmp_path: Path, capsys: Any) -> None:
    for first, shown in (((0, SCORED), True), ((0, LOSS_ONLY), False), ((2, SCORED), False)):
        log = RunLog(OutputFolder(tmp_path))
        log.evaluation(*first)
        capsys.readouterr()
        log.conclude(Evaluation({**METRICS, "f1": 80.0}, 1.0, None), [tmp_path / "b", tmp_path / "a"])
        said = capsys.readouterr().err.splitlines()
        assert said[-3:] == ["written:", f"  {tmp_path / 'a'}", f"  {tmp_path / 'b'}"]
        assert [line.split() for line in said[:-3]] == (
            [["EM", "F1"], ["before", "training", "50.00", "62.50"], ["after", "training", "50.00", "80.00"]]
            if shown
            else []
        )
        log.close()


def test_the_end_compares_with_nothing_where_the_final_questions_are_not_scored(tmp_path: Path, capsys: Any) -> None:
    log = RunLog(OutputFolder(tmp_path))
    log.evaluation(0, SCORED)
    capsys.readouterr()
    log.conclude(Evaluation({"num_unlabelled": 3}, None, None), [tmp_path / "a"])
    assert capsys.readouterr().err.splitlines() == ["written:", f"  {tmp_path / 'a'}"]
    log.close()


def test_a_line_that_the_disk_refuses_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    log = RunLog(OutputFolder(tmp_path))
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LocalTrainingError, match=r"what belongs to step 7 cannot be written to .*: Is a directory"):
        log.step(7, result(), 1e-3)
    log.close()


def test_lines_are_on_the_disk_before_the_checkpoint_that_goes_on_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(OutputFolder(tmp_path))
    log.start(8, 8, done=0, shown=False)
    log.step(1, result(), 1e-3)
    synchronised = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    log.synchronise(1)
    assert sorted(Path(name).name for name in synchronised) == ["metrics.jsonl", "timings.jsonl"]
    log.close()


def test_the_bar_shows_how_far_the_run_is(tmp_path: Path, capsys: Any) -> None:
    log = RunLog(OutputFolder(tmp_path))
    log.start(4, 2, done=1, shown=True)
    log.step(2, result(), 1e-3)
    log.notice("above the bar")
    log.close_bar()
    log.notice("below it")
    log.close()
    said = capsys.readouterr().err
    assert "2/4" in said
    assert "loss 0.500, lr 1.0e-03" in said
    assert "above the bar\n" in said
    assert said.endswith("below it\n")
