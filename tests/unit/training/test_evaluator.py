"""Which evaluation a run makes when, and what it is given."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest

from qa_dist.config.options import DataConfig, RunConfig, TrainingConfig
from qa_dist.evaluation import loop as evaluation_loop
from qa_dist.training.evaluator import Evaluator

RANKS: Any = SimpleNamespace(is_main=False)
ENGINE = SimpleNamespace(forward_needs_all_ranks=True)
TRAINER: Any = SimpleNamespace(model="model", engine=ENGINE, evaluation_graphs="graphs")
DATA: Any = SimpleNamespace(validation=SimpleNamespace(num_features=20), version_2=True)
Called = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """The evaluations that are made: by which function, and with what, by the names of its parameters."""
    calls: Called = []

    def noting(name: str) -> Any:
        signature = inspect.signature(getattr(evaluation_loop, name))

        def note(*given: Any, **options: Any) -> None:
            calls.append((name, signature.bind(*given, **options).arguments))

        # With the real signature: what the loop does not take, nobody may give it.
        return create_autospec(getattr(evaluation_loop, name), side_effect=note)

    for name in ("evaluate", "evaluate_loss"):
        monkeypatch.setattr(evaluation_loop, name, noting(name))
    return calls


def evaluator(config: RunConfig) -> Evaluator:
    return Evaluator(config, RANKS, Path("logits.npy"))


def configured(**options: Any) -> RunConfig:
    return RunConfig(data=DataConfig(**options), training=TrainingConfig(disable_tqdm=True))


def test_without_a_limit_every_evaluation_is_whole(called: Called) -> None:
    config = configured()
    for evaluate in (evaluator(config).during_training, evaluator(config).whole):
        evaluate(TRAINER, DATA)
        name, given = called.pop()
        assert name == "evaluate"
        assert callable(given.pop("advance"))
        assert given == {
            **{"model": "model", "store": DATA.validation, "ranks": RANKS, "config": config.evaluation},
            **{"version_2": True, "forward_needs_all_ranks": True, "graphs": "graphs"},
            "logits_path": Path("logits.npy"),
        }
    assert not called


def test_with_a_limit_training_sees_the_loss_of_some_features_and_the_end_is_whole(called: Called) -> None:
    config = configured(max_eval_features=6, subset_seed=3)
    limited = evaluator(config)
    for _ in range(2):
        limited.during_training(TRAINER, DATA)
    (name, given), (_, again) = called
    assert name == "evaluate_loss"
    features = given.pop("features")
    assert len(set(features.tolist())) == 6
    assert features.max() < 20
    assert np.array_equal(features, again["features"]), "evaluations are compared with each other"
    assert given == {
        **{"model": "model", "store": DATA.validation, "ranks": RANKS, "config": config.evaluation},
        **{"forward_needs_all_ranks": True, "graphs": "graphs"},
    }
    limited.whole(TRAINER, DATA)
    assert [name for name, _ in called] == ["evaluate_loss", "evaluate_loss", "evaluate"]


@pytest.mark.parametrize("limit", [None, 6])
def test_without_data_there_is_nothing_to_evaluate_on(called: Called, limit: int | None) -> None:
    none: Any = SimpleNamespace(validation=None, version_2=False)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluator(configured(max_eval_features=limit)).during_training(TRAINER, none)
    assert not called
