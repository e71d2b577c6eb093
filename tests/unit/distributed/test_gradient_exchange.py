"""Gradients of two ranks: averaged in buffers that they are views of, sent while the backward pass goes on."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qa_dist.distributed.strategies import data_parallel, gradient_exchange
from qa_dist.distributed.strategies.data_parallel import DataParallel
from qa_dist.distributed.strategies.gradient_exchange import GradientExchange, neighbours
from qa_dist.distributed.watchdog import Watchdog

BUCKET = 32


class Model(nn.Module):
    """Two layers in a bucket each, and in that of the first one a tensor that no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.idle = nn.Parameter(torch.ones(2))
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())


class Work:
    """An all-reduce that is under way: nothing of it is to be seen before it is waited for."""

    def __init__(self, result: Callable[[], object]) -> None:
        self.wait = result


class OtherRank:
    """`torch.distributed` of two ranks; the other one has these gradients, bucket by bucket."""

    class ReduceOp:
        AVG = "average"

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        groups = neighbours(list(model.parameters()), BUCKET)[::-1]
        self.groups = groups
        sizes = [sum(each.numel() for each in group) for group in groups]
        self.sent = [torch.randn(size, generator=generator) for size in sizes * num_steps]
        # The idle parameter, the very first one, has no gradient there either.
        for flat in self.sent[len(groups) - 1 :: len(groups)]:
            flat[:2] = 0
        self.received: list[torch.Tensor] = []
        self.tops: list[bool] = []
        """Of each bucket, whether the first layer had no gradient yet when it was sent."""
        self.model: Any = model

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, tensor: torch.Tensor, *, op: str = "sum", async_op: bool) -> Work:
        assert async_op
        other = self.sent[len(self.received)].to(tensor.dtype)
        self.received.append(tensor.clone())
        self.tops.append(self.model.layers[0].weight.grad is None)
        return Work(lambda: tensor.add_(other).div_(2 if op == "average" else 1))


class Concatenations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "aten::cat" in func._schema.name
        return func(*args, **(kwargs or {}))


Make = Callable[..., tuple[DataParallel, OtherRank]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(gradient_exchange, "GRADIENT_BUCKET", BUCKET)

    def made(
        *, keeps_gradients: bool = False, num_steps: int = 1, dtype: torch.dtype = torch.float32
    ) -> tuple[DataParallel, OtherRank]:
        model: Any = Model()
        other = OtherRank(model, num_steps)
        assert [len(group) for group in other.groups] == [2, 3]
        for module in (data_parallel, gradient_exchange):
            monkeypatch.setattr(module, "dist", other)
        engine = DataParallel(model, adamw, 1.0, watchdog=Watchdog(math.inf), exchange_dtype=dtype)
        engine.keeps_gradients = keeps_gradients
        return engine, other

    return made


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for _, each in named], lr=0.1, weight_decay=0.1)


def loss(model: Any, number: int) -> torch.Tensor:
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    found: torch.Tensor = model.layers(features).square().sum()
    return found


def expected(other: OtherRank, numbers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Mean gradients of the first step by name: this rank's of some losses in one pass, and the other's."""
    plain = Model()
    torch.stack([loss(plain, number) for number in numbers]).sum().backward()  # type: ignore[no-untyped-call]
    # The other's go by bucket; the last one has the first parameters.
    flat = torch.cat(other.sent[1::-1])
    found = {}
    for name, parameter in plain.named_parameters():
        piece, flat = flat[: parameter.numel()], flat[parameter.numel() :]
        if parameter.grad is not None:
            found[name] = (parameter.grad + piece.view_as(parameter)) / 2
    return found


@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_gradients_are_the_mean_of_both_ranks(make: Make, keeps_gradients: bool) -> None:
    engine, other = make(keeps_gradients=keeps_gradients)
    for number, last in ((0, False), (1, True)):
        engine.backward(loss(engine.module, number), last=last)
    engine.sync_gradients()
    found = {name: each.grad for name, each in engine.module.named_parameters() if each.grad is not None}
    wanted = expected(other, (0, 1))
    assert found.keys() == wanted.keys() == {name for name, _ in Model().named_parameters()} - {"idle"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_an_exchange_in_bf16_rounds_what_is_sent_and_nothing_else(make: Make, keeps_gradients: bool) -> None:
    engine, other = make(keeps_gradients=keeps_gradients, dtype=torch.bfloat16)
    plain = Model()
    for number, last in ((0, False), (1, True)):
        loss(plain, number).backward()  # type: ignore[no-untyped-call]
        engine.backward(loss(engine.module, number), last=last)
    engine.sync_gradients()
    assert [each.dtype for each in other.received] == [torch.bfloat16] * 2
    theirs = torch.cat(other.sent[::-1])[2:].bfloat16()
    ours = torch.cat([each.grad.reshape(-1) for each in plain.layers.parameters() if each.grad is not None]).bfloat16()
    found = torch.cat([each.grad.reshape(-1) for each in engine.module.layers.parameters()])
    assert found.dtype == torch.float32
    assert torch.equal(found, (ours + theirs).float() / 2)
    assert engine.module.idle.grad is None


def test_gradients_lie_in_as_many_buffers_as_there_are_buckets(make: Make) -> None:
    engine, other = make(num_steps=2)
    buffers = set()
    for step in range(2):
        engine.backward(loss(engine.module, step), last=True)
        engine.sync_gradients()
        buffers |= {each.grad.untyped_storage().data_ptr() for each in engine.module.layers.parameters()}
        engine.optimizer_step(0.1)
        assert all(each.grad is None for each in engine.module.parameters())
    assert len(buffers) == 2, "a second step makes none"
    assert len(other.received) == 4


def test_the_last_bucket_goes_while_the_pass_goes_on(make: Make) -> None:
    engine, other = make()
    engine.backward(loss(engine.module, 0), last=False)
    assert not other.received
    # The first layer's gradient of the first pass would hide whether it has one of the second.
    engine.module.layers[0].weight.grad = None
    engine.backward(loss(engine.module, 1), last=True)
    assert other.tops == [True, False]
    engine.sync_gradients()
    assert len(other.received) == 2


def test_a_bucket_waits_for_those_before_it(make: Make) -> None:
    """The other way round: the bucket that goes first is complete last."""
    _, other = make()
    first, second = nn.Parameter(torch.ones(BUCKET)), nn.Parameter(torch.ones(BUCKET))
    exchange = GradientExchange([first, second])
    with exchange.backward_pass(sends=True):
        # `second` goes first, and is reached last.
        ((second * 2).square() + first * 3).sum().backward()  # type: ignore[no-untyped-call]
        sent_in_pass = len(other.received)
    assert sent_in_pass == 2
    assert [each[0].item() for each in other.received] == [8, 3]


def test_the_exchange_is_the_same_where_gradients_are_kept(make: Make) -> None:
    weights, sent = [], []
    for keeps_gradients in (False, True):
        engine, other = make(keeps_gradients=keeps_gradients, num_steps=3)
        for step in range(3):
            for last in (False, True):
                engine.backward(loss(engine.module, step), last=last)
            with Concatenations() as found:
                engine.sync_gradients()
            assert not found.number
            engine.optimizer_step(0.1)
        weights.append(engine.weights())
        sent.append(other.received)
    assert len(sent[0]) == 6
    assert all(torch.equal(one, two) for one, two in zip(*sent, strict=True))
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
    # Without a gradient it is not decayed, as with one rank.
    assert torch.equal(weights[0]["idle"], torch.ones(2))


@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_gives_up_sends_zeros_for_what_is_missing(make: Make, keeps_gradients: bool, at: int) -> None:
    engine, other = make(keeps_gradients=keeps_gradients, num_steps=2)

    def run_out(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("simulated")

    for number in range(at + 1):
        whole = loss(engine.module, number)
        # The bias of the first layer is reached when the second layer is done.
        handle = engine.module.layers[0].bias.register_hook(run_out) if number == at else None
        try:
            engine.backward(whole, last=number == 1)
        except torch.OutOfMemoryError:
            assert handle is not None
            handle.remove()
        else:
            assert handle is None
    engine.give_up_step()
    engine.sync_gradients()
    # What went in the pass cannot be taken back.
    went = at == 1 and not keeps_gradients
    assert [bool(each.any()) for each in other.received] == [went, False]
    before = engine.weights()
    # Another rank would have sent infinity with its losses.
    engine.optimizer_step(0.1, torch.tensor(math.inf))
    assert all(torch.equal(each, before[name]) for name, each in engine.weights().items())
    # Nothing of it is left in the step that is taken next.
    other.sent[:2] = other.sent[2:]
    engine.backward(loss(engine.module, 5), last=True)
    engine.sync_gradients()
    for name, gradient in expected(other, (5,)).items():
        torch.testing.assert_close(engine.module.get_parameter(name).grad, gradient, msg=name)


def test_a_pass_that_is_tried_out_sends_nothing(make: Make) -> None:
    engine, other = make()
    engine.dry_backward(loss(engine.module, 0))
    assert not other.received
    assert all(each.grad is None for each in engine.module.parameters())


def test_a_gradient_behind_its_bucket_is_an_error(make: Make) -> None:
    engine, _ = make()
    exchange = engine._exchange
    assert exchange is not None
    with exchange.backward_pass(sends=True):
        loss(engine.module, 0).backward()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="its bucket had been sent"):
            loss(engine.module, 1).backward()  # type: ignore[no-untyped-call]


def test_gradients_that_were_replaced_are_taken_in(make: Make) -> None:
    engine, other = make(keeps_gradients=True)
    engine.backward(loss(engine.module, 0), last=True)
    weight = engine.module.layers[0].weight
    replaced = weight.grad.clone() * 3
    weight.grad = replaced
    engine.sync_gradients()
    assert torch.equal(other.received[1], torch.cat([torch.zeros(2), replaced.reshape(-1), other.received[1][26:]]))
    assert weight.grad is not replaced
    torch.testing.assert_close(weight.grad.reshape(-1), (replaced.reshape(-1) + other.sent[1][2:26]) / 2)


def test_one_rank_alone_exchanges_nothing() -> None:
    model: Any = Model()
    made = DataParallel(model, adamw, 1.0, watchdog=Watchdog(math.inf))
    made.backward(loss(model, 0), last=True)
    own = model.layers[0].weight.grad
    made.sync_gradients()
    assert model.layers[0].weight.grad is own
    assert model.idle.grad is None


def test_neighbours_share_a_group_up_to_a_size() -> None:
    tensors = [torch.ones(size) for size in (5, 4, 2, 9, 1)]
    tensors.append(torch.ones(1, dtype=torch.float64))
    found = [[each.numel() for each in group] for group in neighbours(tensors, 8)]
    assert found == [[5], [4, 2], [9], [1], [1]]
