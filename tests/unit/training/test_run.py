"""What `Run` ties together, without processes, model or data: when things are due, what is saved, how it goes on."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.common.signals import Stopped
from qa_dist.config.options import DataConfig, RunConfig, TrainingConfig
from qa_dist.evaluation import loop as evaluation_loop
from qa_dist.evaluation.results import Evaluation
from qa_dist.training import checkpoints, output_folder
from qa_dist.training.checkpoints import Checkpoint, newest_checkpoint, read_checkpoint
from qa_dist.training.run import Run
from qa_dist.training.run_state import BestScore, RunState
from qa_dist.training.trainer import StepResult

NUM_STEPS, STEPS_PER_EPOCH = 10, 4
DATA: Any = SimpleNamespace(
    validation=SimpleNamespace(num_features=9, fingerprint="f"),
    is_validation_scored=True,
    version_2=False,
    tokenizer=None,
    tuning_problem=lambda config: None,
)


class FakeRanks:
    """One rank alone."""

    is_main, rank, world_size = True, 0, 1

    def __init__(self) -> None:
        self.watchdog = SimpleNamespace(start=lambda: None, stop=lambda: None)
        self.closed = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        self.closed += 1


class FakeEngine:
    """A model of one number: the steps that it has done."""

    holds_shards = forward_needs_all_ranks = False

    def __init__(self) -> None:
        self.weight = 0.0

    def weights(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.tensor([self.weight])}

    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        self.weight = float(weights["weight"])

    def scaler_state(self) -> None:
        return None


class FakeTrainer:
    """A trainer of such a model."""

    num_steps, steps_per_epoch, max_tokens = NUM_STEPS, STEPS_PER_EPOCH, 64
    inputs = SimpleNamespace(shortfall=[])
    model = evaluation_graphs = None

    def __init__(self, seed: int = 1) -> None:
        self.engine = FakeEngine()
        self.identity = {"seed": seed}
        self.shapes = {"weight": (1,)}

    def checkpoint(self, step: int, best: Any, state: RunState) -> Checkpoint:
        return Checkpoint(step, self.engine.weights(), {"exp_avg/weight": torch.zeros(1)}, best, self.identity, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.engine.restore(checkpoint.weights)


Begin = Callable[..., tuple[Any, Any]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start a run with these options; it and its trainer."""
    with ExitStack() as stack:

        def start(seed: int = 1, **options: Any) -> tuple[Any, Any]:
            # A run of the same folder before has ended.
            stack.close()
            config = RunConfig(
                data=DataConfig(max_eval_features=3),
                training=TrainingConfig(**{"eval_steps": "4", "keep": "last", "disable_tqdm": True, **options}),
            )
            ranks: Any = FakeRanks()
            trainer: Any = FakeTrainer(seed)
            run = stack.enter_context(Run(config, ranks, tmp_path / "out"))
            done = run.resume(trainer)
            run.claim(DATA, trainer.num_steps)
            run.start(trainer, done)
            return run, trainer

        yield start


def take_steps(run: Run, trainer: Any, steps: range) -> None:
    for step in steps:
        trainer.engine.weight = step + 1.0
        run.record(step, StepResult(1.0, 1.0, 8, 100, 100), 1e-3)


def let_evaluations_end_in(monkeypatch: pytest.MonkeyPatch, *f1: float) -> None:
    following = iter(f1)

    def evaluate_loss(*arguments: Any, **options: Any) -> Evaluation:
        value = next(following)
        return Evaluation({"exact_match": value, "f1": value, "num_examples": 3}, 1.0, None)

    monkeypatch.setattr(evaluation_loop, "evaluate_loss", evaluate_loss)


@pytest.mark.parametrize(
    ("wanted", "due"), [("no", []), ("epoch", [4, 8, 10]), ("3", [3, 6, 9, 10]), ("10", [10]), ("100", [10])]
)
def test_evaluations_and_checkpoints_are_due_every_so_often_and_at_the_end(
    begin: Begin, wanted: str, due: list[int]
) -> None:
    for option, name in (("eval_steps", "is_evaluation_due"), ("checkpointing_steps", "is_checkpoint_due")):
        run, trainer = begin(**{option: wanted, "overwrite_output_dir": True})
        found = []
        for step in range(NUM_STEPS):
            take_steps(run, trainer, range(step, step + 1))
            found += [step + 1] * getattr(run, name)
        assert found == due


def test_a_run_that_stops_improving_ends_with_a_checkpoint(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    let_evaluations_end_in(monkeypatch, 30, 20)
    run, trainer = begin(early_stopping_patience=1, eval_steps="2", checkpointing_steps="3")
    for step in range(4):
        take_steps(run, trainer, range(step, step + 1))
        if step % 2:
            run.evaluate(trainer, DATA)
    assert run.best.has_stopped_improving
    assert run.is_checkpoint_due
    run, _ = begin(checkpointing_steps="no", overwrite_output_dir=True)
    run.best.evaluations_without_best = 9
    assert not run.is_checkpoint_due


@pytest.mark.parametrize(
    ("change", "step_of_best"),
    [({}, 4), ({"eval_steps": "no"}, None), ({"eval_steps": "no", "max_steps": 8}, 4)],
    ids=["evaluated on", "never again", "trained to the end"],
)
def test_a_resumed_run_keeps_no_best_weights_that_later_ones_are_not_compared_with(
    begin: Begin,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    change: dict[str, Any],
    step_of_best: int | None,
) -> None:
    let_evaluations_end_in(monkeypatch, 30, 20)
    run, trainer = begin(keep="best")
    monkeypatch.setattr(run.best, "write", lambda *arguments: None)
    for until in (4, 8):
        take_steps(run, trainer, range(until - 4, until))
        run.evaluate(trainer, DATA)
    run.save_checkpoint(trainer)
    options = dict(change)
    monkeypatch.setattr(FakeTrainer, "num_steps", options.pop("max_steps", NUM_STEPS))
    again, resumed = begin(keep="best", resume_from_checkpoint="auto", **options)
    assert (again.best.score.step if again.best.score else None) == step_of_best
    assert ("the run keeps its last weights" in capsys.readouterr().err) == (step_of_best is None)
    assert again._take_final_weights(resumed)[0] == (step_of_best or 8)
    assert resumed.engine.weight == (step_of_best or 8)


def test_an_evaluation_that_was_due_is_not_without_validation_data(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_evaluations_end_in(monkeypatch, 30)
    run, trainer = begin()
    take_steps(run, trainer, range(4))
    run.is_evaluation_pending = True
    run.save_checkpoint(trainer)
    monkeypatch.setattr(DATA, "validation", None)
    monkeypatch.setattr(DATA, "is_validation_scored", False)
    run, _ = begin(resume_from_checkpoint="auto", eval_steps="no")
    assert not run.is_evaluation_pending


def test_an_evaluation_that_was_due_is_not_made_where_no_other_one_follows(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights would be the best, and the steps behind it for nothing."""
    let_evaluations_end_in(monkeypatch, 30)
    run, trainer = begin(keep="best")
    take_steps(run, trainer, range(8))
    run.is_evaluation_pending = True
    run.save_checkpoint(trainer)
    for eval_steps, is_pending in (("4", True), ("no", False)):
        again, _ = begin(keep="best", resume_from_checkpoint="auto", eval_steps=eval_steps)
        assert again.is_evaluation_pending == is_pending


def test_a_run_goes_on_with_all_that_it_knew(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    let_evaluations_end_in(monkeypatch, 30, 20)
    run, trainer = begin(early_stopping_patience=2)
    for until in (4, 8):
        take_steps(run, trainer, range(until - 4, until))
        run.evaluate(trainer, DATA)
    run.log.skipped_steps = 2
    run.save_checkpoint(trainer)
    again, resumed = begin(early_stopping_patience=2, resume_from_checkpoint="auto")
    assert "resumed after step 8 of 10" in capsys.readouterr().err
    assert resumed.engine.weight == 8.0
    assert again.best.score == BestScore(30.0, 4)
    assert torch.equal(again.best.weights["weight"], torch.tensor([4.0]))
    assert again.best.evaluations_without_best == 1
    assert [each["f1"] for each in again.log.evaluations] == [30, 20]
    assert (again.log.skipped_steps, again.log.resumed_at_steps) == (2, [8])
    assert not again.is_evaluation_pending
    take_steps(again, resumed, range(8, 9))
    again.save_checkpoint(resumed)
    again._writer.wait()
    state = read_checkpoint(tmp_path / "out" / "checkpoints" / "step-00000009").state
    assert (state.resumed_at_steps, state.world_size, state.max_tokens_per_device) == ((8,), 1, 64)
    log = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9]


def test_an_evaluation_that_was_cut_short_is_made_after_the_resume(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, trainer = begin()
    take_steps(run, trainer, range(4))

    def stopped(*arguments: Any, **options: Any) -> Evaluation:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(evaluation_loop, "evaluate_loss", stopped)
    with pytest.raises(Stopped), run.stoppable(trainer):
        run.evaluate(trainer, DATA)
    assert "stopped by SIGTERM after step 4; the same command with --resume_from_checkpoint auto" in (
        capsys.readouterr().err
    )
    again, _ = begin(resume_from_checkpoint="auto")
    assert again.is_evaluation_pending


def test_a_stop_in_the_last_evaluation_saves_the_weights_of_the_step_and_not_the_best_ones(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    let_evaluations_end_in(monkeypatch, 30, 20)
    run, trainer = begin(keep="best", early_stopping_patience=1)
    monkeypatch.setattr(run.best, "write", lambda *_: None)
    for until in (4, 8):
        take_steps(run, trainer, range(until - 4, until))
        run.evaluate(trainer, DATA)
    # As in a run that was resumed, of which nobody has the best evaluation any more.
    run.best.evaluation = None
    evaluated = []

    def stopped(*arguments: Any, **options: Any) -> Evaluation:
        evaluated.append(trainer.engine.weight)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(evaluation_loop, "evaluate", stopped)
    with pytest.raises(Stopped), run.stoppable(trainer):
        run.finish(trainer, DATA)
    assert evaluated == [4.0]
    saved = read_checkpoint(tmp_path / "out" / "checkpoints" / "step-00000008")
    assert (float(saved.weights["weight"]), saved.state.best) == (8.0, BestScore(30.0, 4))


def test_a_run_that_stops_where_it_has_just_saved_saves_nothing(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    run, trainer = begin()
    take_steps(run, trainer, range(4))
    run.save_checkpoint(trainer)
    monkeypatch.setattr(trainer, "checkpoint", lambda *_: pytest.fail("it is there"))
    with pytest.raises(Stopped), run.stoppable(trainer):
        raise Stopped(signal.SIGTERM)


def test_a_run_that_stops_and_cannot_save_is_an_error(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    run, trainer = begin()
    take_steps(run, trainer, range(4))

    def full(*arguments: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    with (
        pytest.raises(CheckpointError, match="stopped after step 4 and its last checkpoint could not be written"),
        run.stoppable(trainer),
    ):
        raise Stopped(signal.SIGTERM)


def test_a_checkpoint_of_another_run_is_refused_and_stays(begin: Begin, tmp_path: Path) -> None:
    run, trainer = begin(seed=1)
    take_steps(run, trainer, range(4))
    run.save_checkpoint(trainer)
    with pytest.raises(ConfigError, match=r"belongs to another run: seed is 2 here and 1 there; make them agree"):
        begin(seed=2, resume_from_checkpoint="auto")
    kept = newest_checkpoint(tmp_path / "out" / "checkpoints", pytest.fail)
    assert kept is not None
    assert kept.step == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": 99}, r"it is of step 99 and the run has \d+ steps"),
        ({"weights": {}}, "its weights have other names or shapes than the model's"),
        ({"weights": {"weight": torch.zeros(2)}}, "its weights have other names or shapes"),
        ({"best": {"other": torch.zeros(1)}}, "its best weights have other names or shapes"),
        ({"optimizer": {}}, "its optimiser state is empty"),
        (
            {"optimizer": {"exp_avg/other": torch.zeros(1)}},
            r"optimiser state has exp_avg/other \[1\], which fits no",
        ),
        (
            {"optimizer": {"exp_avg/weight": torch.zeros(3)}},
            r"optimiser state has exp_avg/weight \[3\], which fits",
        ),
    ],
)
def test_a_checkpoint_that_holds_something_else_is_refused(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    """Its files are as they were written, by somebody else."""
    run, trainer = begin()
    take_steps(run, trainer, range(4))
    run.save_checkpoint(trainer)
    run._writer.wait()
    found = output_folder.newest_checkpoint
    monkeypatch.setattr(output_folder, "newest_checkpoint", lambda *words: dataclasses.replace(found(*words), **change))
    with pytest.raises(CheckpointError, match=rf"checkpoint cannot be used: .*{sentence}.*; name another, or"):
        begin(resume_from_checkpoint="auto")


def test_a_run_that_would_go_on_and_cannot_says_that_it_starts_anew(begin: Begin, capsys: Any) -> None:
    begin(resume_from_checkpoint="auto")
    assert "no checkpoint in" in capsys.readouterr().err
    begin()
    assert "no checkpoint in" not in capsys.readouterr().err


def test_a_run_that_goes_back_removes_the_checkpoints_of_later_steps(begin: Begin, tmp_path: Path, capsys: Any) -> None:
    run, trainer = begin()
    for step in (4, 8):
        take_steps(run, trainer, range(step - 4, step))
        run.save_checkpoint(trainer)
    run._writer.wait()
    folder = tmp_path / "out" / "checkpoints"
    begin(resume_from_checkpoint=str(folder / "step-00000004"))
    assert os.listdir(folder) == ["step-00000004"]
    assert "step-00000008 of a later step was removed; the run writes it again" in capsys.readouterr().err


def test_the_model_before_training_is_never_the_best(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    let_evaluations_end_in(monkeypatch, 50, 10)
    run, trainer = begin(eval_on_start=True)
    assert run.is_evaluation_pending
    run.evaluate(trainer, DATA)
    assert run.best.score is None
    take_steps(run, trainer, range(4))
    run.evaluate(trainer, DATA)
    assert run.best.score == BestScore(10.0, 4)


def test_the_ranks_part_where_the_run_ended_and_not_where_it_failed(tmp_path: Path) -> None:
    for error, closed in ((None, 1), (Stopped(signal.SIGTERM), 1), (ZeroDivisionError(), 0)):
        ranks: Any = FakeRanks()
        run = Run(RunConfig(), ranks, tmp_path)
        run.__exit__(None if error is None else type(error), error, None)
        assert ranks.closed == closed
