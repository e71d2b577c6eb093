"""Which parameters learn faster or slower, and that the optimiser does as it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import ModelConfig, TrainingConfig
from qa_dist.config.parsing import parse
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel
from qa_dist.training.optimizer import make_optimizer
from qa_dist.training.rate_factors import rate_factors
from tests.tiny import tiny_model


def model(folder: Path, family: str = "bert", **options: Any) -> SpanModel:
    config = ModelConfig(model_name_or_path=str(tiny_model(family, folder / family)), **options)
    return build_model(config, seed=1, max_seq_length=64)[0]


def test_lora_plus_is_for_b_and_the_heads_ratio_for_the_head(tmp_path: Path) -> None:
    made = model(tmp_path)
    factors = rate_factors(made, TrainingConfig(loraplus_lr_ratio=16, head_lr_ratio=0.5))
    names = [name for name, _ in made.trainable()]
    assert {name: factor for name, factor in factors.items() if factor == 16} == {
        name: 16 for name in names if "lora_B" in name
    }
    assert sorted(name for name, factor in factors.items() if factor == 0.5) == sorted(
        name for name in names if "qa_outputs" in name
    )
    assert all("lora_A" in name for name in names if name not in factors)
    assert rate_factors(made, TrainingConfig()) == {}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_layers_learn_slower_from_the_head_down(tmp_path: Path, family: str) -> None:
    made = model(tmp_path, family, tuning="full")
    factors = rate_factors(made, TrainingConfig(layer_decay=0.5))
    found: dict[float, set[str]] = {}
    for name, _ in made.trainable():
        found.setdefault(factors.get(name, 1.0), set()).add(name)
    assert sorted(found) == [0.125, 0.25, 0.5, 1.0]
    assert all("embeddings" in name for name in found[0.125])
    assert all(".0." in name for name in found[0.25])
    # What follows the layers (ModernBERT's last norm) is behind them.
    assert all(".1." in name or "final_norm" in name for name in found[0.5])
    assert not any("layer" in name or "embeddings" in name for name in found[1.0])


def test_adapters_learn_as_their_layers_do_and_the_factors_are_multiplied(tmp_path: Path) -> None:
    made = model(tmp_path)
    factors = rate_factors(made, TrainingConfig(layer_decay=0.5, loraplus_lr_ratio=16, head_lr_ratio=3))
    expected = {("0", "lora_A"): 0.25, ("0", "lora_B"): 4, ("1", "lora_A"): 0.5, ("1", "lora_B"): 8}
    for name, _ in made.trainable():
        kind = "lora_A" if "lora_A" in name else "lora_B"
        place = "0" if ".layer.0." in name else "1"
        assert factors[name] == (3 if "qa_outputs" in name else expected[place, kind]), name


def test_a_step_is_as_long_as_the_factor_says(tmp_path: Path) -> None:
    """Adam's first step is the learning rate in every element, whatever the gradient."""
    made = model(tmp_path)
    training = TrainingConfig(loraplus_lr_ratio=4, learning_rate=1e-3, weight_decay=0.0)
    named = made.trainable()
    optimizer = make_optimizer(training, named, rate_factors=rate_factors(made, training))
    before = {name: weight.detach().clone() for name, weight in named}
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group.get("lr_factor", 1.0)
    for _, weight in named:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for name, weight in named:
        moved = (before[name] - weight.detach()).abs().mean().item()
        assert moved == pytest.approx(4e-3 if "lora_B" in name else 1e-3, rel=1e-3), name


def test_what_does_not_fit_the_tuning_is_refused() -> None:
    for base, sentence in (
        ({"tuning": "full", "loraplus_lr_ratio": 4}, "--loraplus_lr_ratio is about LoRA adapters but --tuning is full"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            parse(["--output_dir", "x"], prog="test", description="", base=base)
    # A flag takes back what it makes meaningless in a recipe.
    config, _ = parse(
        ["--output_dir", "x", "--tuning", "full"], prog="t", description="", base={"loraplus_lr_ratio": 4}
    )
    assert config.training.loraplus_lr_ratio is None
