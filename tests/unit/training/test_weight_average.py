"""The average of the weights against a sum written out, and where it is used."""

import pytest
import torch
from torch import nn

from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.distributed.launch_config import recipe_problems
from qa_dist.training.weight_average import WeightAverage


def test_it_is_the_sum_that_the_formula_gives() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    average = WeightAverage([("w", weight)], 0.5)
    expected = weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            weight.add_(0.1 * (step + 1))
        average.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight.detach()
    assert torch.allclose(average.tensors()["average/w"], expected, atol=1e-12)


def test_it_is_in_place_for_a_while_and_a_stop_inside_puts_the_weights_back() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 3.0]))
    average = WeightAverage([("w", weight)], 0.9)
    with torch.no_grad():
        weight.add_(1.0)
    own = weight.detach().clone()

    def stop_inside() -> None:
        with average.in_place():
            assert weight.tolist() == [1.0, 3.0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_inside()
    assert torch.equal(weight, own)
    average.take_over()
    assert weight.tolist() == [1.0, 3.0]


def test_it_goes_on_from_what_a_checkpoint_holds() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs = WeightAverage([("w", first)], 0.7), WeightAverage([("w", second)], 0.7)
    with torch.no_grad():
        first.mul_(3.0)
    ours.update(0)
    theirs.restore(ours.tensors())
    with torch.no_grad():
        second.copy_(first)
    ours.update(1)
    theirs.update(1)
    assert torch.equal(ours.tensors()["average/w"], theirs.tensors()["average/w"])


def test_strategies_that_hold_shards_refuse_it() -> None:
    config = RunConfig(training=TrainingConfig(ema_decay=0.99))
    assert list(recipe_problems("ddp", config)) == []
    for strategy in ("zero2", "fsdp2"):
        assert "--ema_decay does not work with" in next(iter(recipe_problems(strategy, config)))  # type: ignore[arg-type]
