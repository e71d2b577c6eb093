"""Which evaluation is the best, whose weights are kept, and when a run has stopped improving."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.config.options import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from qa_dist.evaluation.results import Evaluation
from qa_dist.model.span_model import Weights
from qa_dist.training import best_weights
from qa_dist.training.best_weights import BestWeights, measure_of
from qa_dist.training.run_state import BestScore


def evaluation(loss: float, f1: float | None = None) -> Evaluation:
    return Evaluation({} if f1 is None else {"exact_match": f1 / 2, "f1": f1, "num_examples": 3}, loss, None)


def weights_of(step: int) -> Weights:
    return {"weight": torch.full((2,), float(step))}


def offer(best: BestWeights, *evaluations: Evaluation) -> list[bool]:
    """Which of these, after 10, 20, ... steps, are better than all before."""
    return [
        best.offer(step, each, lambda: weights_of(step))  # noqa: B023
        for step, each in zip(range(10, 100, 10), evaluations, strict=False)
    ]


def test_the_highest_metric_is_the_best_and_the_earlier_of_equals() -> None:
    best = BestWeights("f1")
    assert offer(best, *(evaluation(1.0, f1) for f1 in (10, 30, 20, 30, 31))) == [True, True, False, False, True]
    assert best.score == BestScore(31.0, 50)
    assert best.weights is not None
    assert torch.equal(best.weights["weight"], weights_of(50)["weight"])
    assert best.evaluation == evaluation(1.0, 31)


@pytest.mark.parametrize(("metric", "f1"), [("loss", 10.0), ("f1", None)], ids=["asked for", "without metrics"])
def test_by_the_loss_the_lowest_is_the_best(metric: str, f1: float | None) -> None:
    best = BestWeights(metric)
    assert offer(best, *(evaluation(loss, f1) for loss in (3.0, 4.0, 2.0))) == [True, False, True]
    assert best.score == BestScore(-2.0, 30)


def test_a_loss_that_is_no_number_is_not_the_best_and_does_not_make_the_next_one_so() -> None:
    best = BestWeights("loss", patience=3)
    losses = (float("nan"), 3.0, float("nan"), 3.5, 2.0)
    assert offer(best, *(evaluation(loss, None) for loss in losses)) == [False, True, False, False, True]
    assert best.score == BestScore(-2.0, 50)


def test_exact_match_is_compared_where_it_is_asked_for() -> None:
    best = BestWeights("exact_match")
    offer(best, evaluation(1.0, 30.0))
    assert best.score == BestScore(15.0, 10)


def test_weights_are_copied_only_where_they_are_kept() -> None:
    best = BestWeights("f1")
    offer(best, evaluation(1.0, 30))
    assert not best.offer(20, evaluation(1.0, 20), lambda: pytest.fail("it costs a copy of all that is trained"))


def test_a_run_has_stopped_improving_after_so_many_evaluations_in_a_row_without_a_new_best() -> None:
    best = BestWeights("f1", patience=2)
    stopped = []
    for step, f1 in enumerate((10, 9, 11, 10, 11, 12), 1):
        best.offer(step, evaluation(1.0, f1), lambda: {})
        stopped.append(best.has_stopped_improving)
    assert stopped == [False, False, False, False, True, False]
    endless = BestWeights("f1")
    offer(endless, *[evaluation(1.0, 10)] * 9)
    assert endless.evaluations_without_best == 8
    assert not endless.has_stopped_improving


def test_a_resumed_run_compares_with_what_the_checkpoint_holds() -> None:
    best = BestWeights("f1", patience=2)
    best.go_on_from(BestScore(30.0, 10), weights_of(10), 1)
    assert best.evaluation is None, "a checkpoint has no answers"
    assert not best.offer(20, evaluation(1.0, 30), lambda: pytest.fail("it is not better"))
    assert best.has_stopped_improving
    assert best.weights is not None
    assert torch.equal(best.weights["weight"], weights_of(10)["weight"])
    begins = BestWeights("f1")
    begins.go_on_from(None, None, 0)
    assert offer(begins, evaluation(1.0, 0)) == [True]


def test_a_best_one_of_another_measure_is_not_compared_with() -> None:
    best = BestWeights("f1", patience=1)
    best.go_on_from(BestScore(60.0, 10, "f1 of a"), weights_of(10), 1)
    assert best.measure_by("f1 of a") is None
    assert best.score == BestScore(60.0, 10)
    assert "no longer compared with" in str(best.measure_by("loss of 5 features of a"))
    assert not best.has_stopped_improving
    assert offer(best, evaluation(1.0, 3)) == [True]
    assert best.score.measure == "loss of 5 features of a"
    # Earlier versions did not say.
    best.go_on_from(BestScore(60.0, 10), weights_of(10), 1)
    assert best.measure_by("f1 of a") is None
    assert best.score == BestScore(60.0, 10)


def test_what_evaluations_are_compared_by() -> None:
    configs = [RunConfig(data=DataConfig(max_eval_features=number)) for number in (None, 5, 6)]
    of = [measure_of(config, "uvw", version_2=False) for config in configs]
    assert len({*of, measure_of(RunConfig(), "xyz", version_2=False)}) == 4


def test_scores_by_other_rules_are_not_compared_and_losses_are() -> None:
    rules: tuple[dict[str, Any], ...] = (
        {"max_answer_length": 3},
        {"null_score_diff_threshold": -5.0},
        {"decoding": "n_best"},
        {"n_best_size": 5},
        {"answer_length_penalty": 0.5},
    )
    usual, *others = (RunConfig(evaluation=EvaluationConfig(**each)) for each in ({}, *rules))
    measures = {measure_of(each, "uvw", version_2=True) for each in (usual, *others)}
    assert len({*measures, measure_of(usual, "uvw", version_2=False)}) == 2 + len(others)
    # That is what `auto` means.
    zero = RunConfig(evaluation=EvaluationConfig(null_score_diff_threshold=0.0))
    assert measure_of(zero, "uvw", version_2=True) == measure_of(usual, "uvw", version_2=True)
    by_loss = TrainingConfig(metric_for_best_model="loss")
    for each in (usual, *others):
        assert measure_of(dataclasses.replace(each, training=by_loss), "uvw", version_2=True) == "loss of uvw"


def test_a_best_one_of_an_earlier_version_which_named_no_rules_is_compared_with() -> None:
    for rules in ({}, {"max_answer_length": 3}):
        best = BestWeights("f1")
        best.go_on_from(BestScore(60.0, 10, "f1 of uvw"), weights_of(10), 1)
        measure = measure_of(RunConfig(evaluation=EvaluationConfig(**rules)), "uvw", version_2=True)
        assert best.measure_by(measure) is None
        assert best.score == BestScore(60.0, 10)
        assert best.measure_by(measure_of(RunConfig(), "xyz", version_2=True)) is not None


def test_the_best_model_gets_a_folder_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[Any, ...]] = []
    monkeypatch.setattr(best_weights, "save_trained", lambda *given: saved.append(given))
    best, model, tokenizer = BestWeights("f1"), object(), object()
    with pytest.raises(ValueError, match="nothing has been evaluated"):
        best.write(model, tokenizer, tmp_path / "best")  # type: ignore[arg-type]
    offer(best, evaluation(1.5, 30), evaluation(1.0, 20))
    best.write(model, tokenizer, tmp_path / "best")  # type: ignore[arg-type]
    assert saved == [(model, best.weights, tokenizer, tmp_path / "best")]
    figures = json.loads((tmp_path / "best" / "metrics.json").read_text(encoding="utf-8"))
    assert list(figures.items()) == [
        *{
            "step": 10,
            "loss": 1.5,
            "answer_normalization": "squad",
            "exact_match": 15.0,
            "f1": 30,
            "num_examples": 3,
        }.items()
    ]
