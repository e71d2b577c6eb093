"""Which parameters learn slower, and that the optimiser does as it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.config.options import ModelConfig, TrainingConfig
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel
from qa_dist.training.lr_multipliers import lr_multipliers
from qa_dist.training.optimizer import make_optimizer
from tests.tiny import tiny_model


def model(folder: Path, family: str = "bert", **options: Any) -> SpanModel:
    config = ModelConfig(model_name_or_path=str(tiny_model(family, folder / family)), **options)
    return build_model(config, seed=1, max_seq_length=64)[0]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_layers_learn_slower_from_the_head_down(tmp_path: Path, family: str) -> None:
    made = model(tmp_path, family, tuning="full")
    factors = lr_multipliers(made, TrainingConfig(layer_decay=0.5))
    found: dict[float, set[str]] = {}
    for name, _ in made.trainable():
        found.setdefault(factors.get(name, 1.0), set()).add(name)
    assert sorted(found) == [0.125, 0.25, 0.5, 1.0]
    assert all("embeddings" in name for name in found[0.125])
    assert all(".0." in name for name in found[0.25])
    # What follows the layers (ModernBERT's last norm) is behind them.
    assert all(".1." in name or "final_norm" in name for name in found[0.5])
    assert not any("layer" in name or "embeddings" in name for name in found[1.0])


def test_adapters_learn_as_their_layers_do(tmp_path: Path) -> None:
    made = model(tmp_path)
    factors = lr_multipliers(made, TrainingConfig(layer_decay=0.5))
    assert factors == {
        name: 0.25 if ".layer.0." in name else 0.5 for name, _ in made.trainable() if "qa_outputs" not in name
    }
    for same in (None, 1.0):
        assert lr_multipliers(made, TrainingConfig(layer_decay=same)) == {}


def test_a_step_is_as_long_as_the_factor_says(tmp_path: Path) -> None:
    """Adam's first step is the learning rate in every element, whatever the gradient."""
    made = model(tmp_path)
    training = TrainingConfig(layer_decay=0.5, learning_rate=1e-3, weight_decay=0.0)
    named = made.trainable()
    optimizer = make_optimizer(training, named, lr_multipliers=lr_multipliers(made, training))
    before = {name: weight.detach().clone() for name, weight in named}
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group.get("lr_factor", 1.0)
    for _, weight in named:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for name, weight in named:
        moved = (before[name] - weight.detach()).abs().mean().item()
        expected = 1e-3 if "qa_outputs" in name else 2.5e-4 if ".layer.0." in name else 5e-4
        assert moved == pytest.approx(expected, rel=1e-3), name
