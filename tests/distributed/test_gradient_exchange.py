"""Buckets of gradients that ranks send during their last backward pass: right sums, and no rank waits for ever."""

import itertools
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.forking import start_ranks

pytestmark = pytest.mark.distributed

BUCKET = 40
MICRO_BATCHES = 3
PLACES = ("forward", "backward")


class Model(nn.Module):
    """Three layers in as many buckets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)])

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())

    def loss(self, features: torch.Tensor, fault: Any = None) -> torch.Tensor:
        """Mean over the features; `fault` is called in a backward pass when only the first layer is left of it."""
        hidden = self.layers[0](features)
        if fault is not None:
            hidden.register_hook(fault)
        found: torch.Tensor = self.layers[2](self.layers[1](hidden.tanh()).tanh()).square().mean()
        return found


def features(step: int, rank: int, micro_batch: int) -> torch.Tensor:
    seed = 1000 * step + 10 * rank + micro_batch
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for _, each in named], lr=0.1)


def joined() -> tuple[Any, Any]:
    """Ranks that have met, and an engine with small buckets."""
    from qa_dist.distributed.ranks import Ranks
    from qa_dist.distributed.strategies import gradient_exchange
    from qa_dist.distributed.strategies.data_parallel import DataParallel

    gradient_exchange.GRADIENT_BUCKET = BUCKET
    ranks = Ranks()
    return ranks, DataParallel(Model(), adamw, 1.0, watchdog=ranks.watchdog)


def run_out(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("simulated")


def attempt(ranks: Any, engine: Any, step: int, failing: tuple[int, int, str] | None) -> Any:
    """A step as the trainer takes it; a rank runs out of memory at a micro-batch, in its forward or backward pass."""
    from qa_dist.training.step_report import StepReport

    report = StepReport(1, ranks.device)
    try:
        for number in range(MICRO_BATCHES):
            fault = None
            if failing is not None and failing[:2] == (ranks.rank, number):
                if failing[2] == "forward":
                    run_out(torch.ones(()))
                fault = run_out
            loss = engine.module.loss(features(step, ranks.rank, number), fault)
            engine.backward(loss / MICRO_BATCHES, last=number == MICRO_BATCHES - 1)
    except torch.OutOfMemoryError:
        engine.give_up_step()
        report.note_out_of_memory()
    report.exchange(ranks)
    engine.sync_gradients()
    report.note_norm(engine.optimizer_step(0.05, report.check()))
    return report.read()


def take_steps_with_faults(rank: int) -> int:
    """Every rank runs out of memory in every micro-batch at both places; each of these steps is taken again."""
    from qa_dist.distributed.strategies.gradient_exchange import neighbours

    ranks, engine = joined()
    single = Model()
    optimizer = adamw(single.named_parameters())
    assert len(neighbours(list(single.parameters()), BUCKET)) == 3
    cases = list(itertools.product(range(ranks.world_size), range(MICRO_BATCHES), PLACES))
    for step, failing in enumerate(cases):
        before = engine.weights()
        assert attempt(ranks, engine, step, failing).is_out_of_memory
        assert all(torch.equal(each, before[name]) for name, each in engine.weights().items())
        outcome = attempt(ranks, engine, step, None)
        assert not outcome.is_out_of_memory
        every = itertools.product(range(ranks.world_size), range(MICRO_BATCHES))
        loss = torch.stack([single.loss(features(step, *place)) for place in every]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        assert math.isclose(outcome.grad_norm, norm, rel_tol=1e-4), (outcome.grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in single.named_parameters():
        torch.testing.assert_close(engine.weights()[name], weight.detach(), rtol=1e-4, atol=1e-5, msg=name)
    require_same_bits(ranks, engine)
    return 0


def require_same_bits(ranks: Any, engine: Any) -> None:
    """The mean is that of sums over the neighbours in their order, one bucket after the other."""
    from qa_dist.distributed.strategies.gradient_exchange import neighbours

    plain = Model()
    plain.load_state_dict(engine.module.state_dict())
    for number in range(MICRO_BATCHES):
        given = features(99, ranks.rank, number)
        plain.loss(given).backward()  # type: ignore[no-untyped-call]
        engine.backward(engine.module.loss(given), last=number == MICRO_BATCHES - 1)
    engine.sync_gradients()
    found = torch.cat([parameter.grad.reshape(-1) for parameter in engine.module.parameters()])
    flats = [
        torch.cat([each.grad.reshape(-1) for each in group]) for group in neighbours(list(plain.parameters()), BUCKET)
    ]
    assert torch.equal(found, torch.cat([ranks.sum(flat) / ranks.world_size for flat in flats]))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_out_of_memory_in_any_micro_batch_makes_no_rank_wait(tmp_path: Path, num_processes: int) -> None:
    group = start_ranks(take_steps_with_faults, tmp_path / "log", num_processes=num_processes)
    assert group.wait(120) == [0] * num_processes, group.text()[-6000:]


def meet_another_fault(rank: int, *, failing: int) -> int:
    """One rank has another fault than out of memory in its last backward pass, with a bucket under way."""
    from qa_dist.distributed.failures import failures_named

    def break_down(_: torch.Tensor) -> None:
        raise RuntimeError("the memory of this node has gone")

    with failures_named():
        ranks, engine = joined()
        ranks.watchdog.beat("step 1, micro-batch 1")
        loss = engine.module.loss(features(0, rank, 0), break_down if rank == failing else None)
        engine.backward(loss, last=True)
        engine.sync_gradients()
    sys.stdout.write("went on\n")
    return 0


def test_another_fault_in_a_pass_ends_all_ranks_and_is_named(tmp_path: Path) -> None:
    group = start_ranks(partial(meet_another_fault, failing=1), tmp_path / "log", num_processes=2)
    assert group.wait(120) == [1, 1], group.text()
    assert "[rank 1] failed: RuntimeError: the memory of this node has gone" in group.text()
    assert "[rank 0] stops: another rank has gone; it was in step 1, micro-batch 1" in group.text()
    assert "went on" not in group.text()
