"""Masks that cost little must still be dropout."""

import pytest
import torch
from torch import nn

from qa_dist.model.dropout import CheapDropout, seed_dropout, use_cheap_dropout


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.25])
def test_share_scale_and_gradient(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 1001, requires_grad=True)
    y = CheapDropout(probability)(x)
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.005)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.unique(y.detach()).tolist() == pytest.approx([0.0, 1 / (1 - probability)], abs=1e-4)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    # Neighbours, and elements four apart, which share a draw's position, are independent.
    for distance in (1, 2, 4):
        both = (dropped[:, :-distance] & dropped[:, distance:]).float().mean().item()
        assert both == pytest.approx(probability**2, abs=0.005)


def test_the_seed_decides_and_evaluation_does_nothing() -> None:
    layer, x = CheapDropout(0.3), torch.randn(7, 5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert layer.eval()(x) is x
    assert CheapDropout(0.0)(x) is x
    assert not CheapDropout(1.0)(x).any()
    assert CheapDropout(0.5)(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_every_dropout_layer_is_replaced_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2), nn.Dropout1d(0.3)))
    assert use_cheap_dropout(model) == 2
    assert [type(module) for module in model.modules() if hasattr(module, "p")] == [
        CheapDropout,
        CheapDropout,
        nn.Dropout1d,
    ]
    assert use_cheap_dropout(model) == 0


def test_masks_differ_between_seeds_steps_and_ranks_and_come_again() -> None:
    def mask(seed: int, step: int, rank: int) -> bytes:
        seed_dropout(seed, step, rank, torch.device("cpu"))
        return CheapDropout(0.5)(torch.ones(256)).numpy().tobytes()

    places = [(seed, step, rank) for seed in (1, 2) for step in (0, 1, 2) for rank in (0, 1)]
    masks = [mask(*place) for place in places]
    assert len(set(masks)) == len(places)
    assert [mask(*place) for place in reversed(places)] == masks[::-1]
