"""Losses scaled for float16: gradients are those without scaling, and what overflows is skipped, not applied."""

import math

import pytest
import torch
from torch import nn

from qa_dist.strategies import DataParallel


class Line(nn.Module):
    """One weight, in a form that a strategy takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0]))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())

    def blocks(self) -> list[nn.Module]:
        return []

    def unmoved(self) -> list[str]:
        return []


def strategy(scaler: torch.amp.GradScaler | None) -> tuple[Line, DataParallel]:
    model = Line()
    return model, DataParallel(
        model, model, lambda named: torch.optim.SGD([weight for _, weight in named], lr=1.0), 0.5, scaler
    )


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_step_does_not_depend_on_the_scale(scale: float) -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        model, held = strategy(scaler)
        held.backward((model.weight * 2).sum(), last=True)
        held.exchange()
        # The norm from before clipping, of gradients as they are without a scale.
        assert held.update(0.1) == pytest.approx(2.0)
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)
    assert float(found[0]) == pytest.approx(3.0 - 0.1 * 0.5)


def test_an_overflow_is_skipped_and_halves_the_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, held = strategy(scaler)
    held.backward((model.weight * math.inf).sum(), last=True)
    held.exchange()
    assert not math.isfinite(held.update(0.1))
    assert float(model.weight.detach()) == 3.0
    assert scaler.get_scale() == 512.0
    assert model.weight.grad is None
