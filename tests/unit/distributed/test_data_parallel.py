"""Gradients that stay where they are between steps lie one behind the other, and are exchanged without a copy."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qa_dist.distributed.strategies import data_parallel
from qa_dist.distributed.strategies.data_parallel import DataParallel
from qa_dist.distributed.watchdog import Watchdog


class Model(nn.Module):
    """Two layers, and a tensor that no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.idle = nn.Parameter(torch.ones(3))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())


class OtherRank:
    """`torch.distributed` of two ranks; the other one has these gradients, bucket by bucket."""

    def __init__(self, sent: list[torch.Tensor]) -> None:
        self.sent, self.received, self.turn = sent, list[torch.Tensor](), 0

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.received.append(tensor.clone())
        tensor += self.sent[self.turn]
        self.turn += 1


class Concatenations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "aten::cat" in func._schema.name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], tuple[DataParallel, OtherRank]]:
    buckets = data_parallel._buckets
    monkeypatch.setattr(data_parallel, "_buckets", lambda tensors: buckets(tensors, most_elements=32))

    def made(keeps_gradients: bool) -> tuple[DataParallel, OtherRank]:
        model: Any = Model()
        generator = torch.Generator().manual_seed(1)
        sizes = [sum(each.numel() for each in bucket) for bucket in data_parallel._buckets(list(model.parameters()))]
        assert len(sizes) > 1
        other = OtherRank([torch.randn(size, generator=generator) for size in sizes * 3])
        # The first parameter has no gradient there either.
        for bucket in other.sent[:: len(sizes)]:
            bucket[:3] = 0
        monkeypatch.setattr(data_parallel, "dist", other)
        engine = DataParallel(
            model,
            lambda named: torch.optim.AdamW([each for _, each in named], lr=0.1),
            1.0,
            watchdog=Watchdog(math.inf),
        )
        engine.keeps_gradients = keeps_gradients
        return engine, other

    return made


def step(engine: DataParallel, number: int, *, fails: bool = False) -> int:
    """A step of two micro-batches; how often gradients were concatenated."""
    generator = torch.Generator().manual_seed(number)
    for last in (False, True):
        engine.backward(engine.module.layers(torch.randn(5, 4, generator=generator)).square().sum(), last=last)
    if fails:
        engine.zero_grad()
    with Concatenations() as found:
        engine.sync_gradients()
    # Where a rank fails, no rank updates.
    engine.optimizer_step(0.1, torch.tensor(math.inf if fails else 0.0))
    return found.number


def test_the_exchange_is_the_same_without_copies(engine: Callable[[bool], tuple[DataParallel, OtherRank]]) -> None:
    weights, sent = [], []
    for keeps_gradients in (False, True):
        made, other = engine(keeps_gradients)
        # In the second one this rank has nothing to send.
        counts = [step(made, number, fails=number == 1) for number in range(3)]
        assert counts == [0 if keeps_gradients else 2] * 3
        weights.append(made.weights())
        sent.append(other.received)
    assert all(torch.equal(one, two) for one, two in zip(*sent, strict=True))
    weights[0].pop("idle")
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


def test_gradients_that_were_replaced_are_concatenated(
    engine: Callable[[bool], tuple[DataParallel, OtherRank]],
) -> None:
    made, other = engine(True)
    weight = made.module.layers[0].weight
    made.backward(made.module.layers(torch.ones(5, 4)).sum(), last=True)
    weight.grad = weight.grad.clone()
    expected = torch.cat([torch.zeros(3), weight.grad.reshape(-1)])
    with Concatenations() as found:
        made.sync_gradients()
    assert found.number == 1
    assert torch.equal(other.received[0], expected)
    torch.testing.assert_close(weight.grad.reshape(-1), ((expected + other.sent[0]) / 2)[3:])


def test_one_rank_alone_lays_nothing_out() -> None:
    model: Any = Model()
    made = DataParallel(
        model, lambda named: torch.optim.AdamW([each for _, each in named]), 1.0, watchdog=Watchdog(math.inf)
    )
    made.keeps_gradients = True
    made.backward(model.layers(torch.ones(5, 4)).sum(), last=True)
    assert model.idle.grad is None
