"""Which evaluation a run makes when, and what it is given."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qa_dist.config.options import DataConfig, RunConfig, TrainingConfig
from qa_dist.evaluation import loop as evaluation_loop
from qa_dist.training.evaluator import Evaluator

RANKS: Any = SimpleNamespace(is_main=False)
ENGINE = SimpleNamespace(forward_needs_all_ranks=True)
TRAINER: Any = SimpleNamespace(model="model", engine=ENGINE, evaluation_graphs="graphs")
DATA: Any = SimpleNamespace(validation=SimpleNamespace(num_features=20), version_2=True)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The evaluations that are made: by which function, and with what."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("evaluate", "evaluate_loss"):
        monkeypatch.setattr(
            evaluation_loop, name, lambda *given, name=name, **options: calls.append((name, given, options))
        )
    return calls


def evaluator(**options: Any) -> Evaluator:
    config = RunConfig(data=DataConfig(**options), training=TrainingConfig(disable_tqdm=True))
    return Evaluator(config, RANKS, Path("logits.npy"))


def test_without_a_limit_every_evaluation_is_whole(called: Any) -> None:
    for evaluate in (evaluator().during_training, evaluator().whole):
        evaluate(TRAINER, DATA)
        name, given, options = called.pop()
        assert (name, given[:3]) == ("evaluate", ("model", DATA.validation, RANKS))
        assert options.pop("advance")
        assert options.pop("logits_path") == Path("logits.npy")
        assert options == {"version_2": True, "forward_needs_all_ranks": True, "graphs": "graphs"}


def test_with_a_limit_training_sees_the_loss_of_some_features_and_the_end_is_whole(called: Any) -> None:
    limited = evaluator(max_eval_features=6, subset_seed=3)
    for _ in range(2):
        limited.during_training(TRAINER, DATA)
    (name, given, options), (_, again, _) = called
    assert (name, given[:3]) == ("evaluate_loss", ("model", DATA.validation, RANKS))
    assert len(set(given[4].tolist())) == 6
    assert given[4].max() < 20
    assert np.array_equal(given[4], again[4]), "evaluations are compared with each other"
    assert options == {"forward_needs_all_ranks": True, "graphs": "graphs"}
    limited.whole(TRAINER, DATA)
    assert called[-1][0] == "evaluate"


@pytest.mark.parametrize("limit", [None, 6])
def test_without_data_there_is_nothing_to_evaluate_on(called: Any, limit: int | None) -> None:
    none: Any = SimpleNamespace(validation=None, version_2=False)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluator(max_eval_features=limit).during_training(TRAINER, none)
    assert not called
