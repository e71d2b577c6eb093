"""Losses scaled for float16: gradients are those without scaling, and what overflows is skipped, not applied."""

import math

import pytest
import torch
from torch import nn

from qa_dist.config.options import TrainingConfig
from qa_dist.distributed.engine import NamedParameters
from qa_dist.distributed.strategies.data_parallel import DataParallel
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.training.optimizer import make_optimizer


class Line(nn.Module):
    """One tensor of weights, in a form that a strategy takes."""

    def __init__(self, num_weights: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_weights,), 3.0))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())

    def blocks(self) -> list[nn.Module]:
        return []

    def shift_invariant_biases(self) -> dict[str, nn.Parameter]:
        return {}


def strategy(scaler: torch.amp.GradScaler | None) -> tuple[Line, DataParallel]:
    model = Line()

    def make(named: NamedParameters) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for _, weight in named], lr=1.0)

    return model, DataParallel(model, make, 0.5, watchdog=Watchdog(math.inf), scaler=scaler)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_step_does_not_depend_on_the_scale(scale: float) -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        model, held = strategy(scaler)
        held.backward((model.weight * 2).sum(), last=True)
        held.sync_gradients()
        # The norm from before clipping, of gradients as they are without a scale.
        assert float(held.optimizer_step(0.1)) == pytest.approx(2.0)
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)
    assert float(found[0]) == pytest.approx(3.0 - 0.1 * 0.5)


def test_moments_in_8_bits_do_not_see_what_overflowed() -> None:
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = Line(4096)

    def make(named: NamedParameters) -> torch.optim.Optimizer:
        training = TrainingConfig(optim="adamw_8bit", learning_rate=1.0, adam_beta2=0.99, weight_decay=0.0)
        return make_optimizer(training, named)

    held = DataParallel(model, make, None, watchdog=Watchdog(math.inf), scaler=scaler)
    for factor in (2.0, math.inf):
        before = {key: tensor.clone() for key, tensor in held.optimizer_tensors().items()}
        weight = model.weight.detach().clone()
        held.backward((model.weight * factor).sum(), last=True)
        norm = float(held.optimizer_step(0.1))
        held.conclude_step(is_whole=True)
        assert (norm == pytest.approx(2.0 * 64)) == math.isfinite(norm) == (factor == 2.0)
    found = held.optimizer_tensors()
    assert found["state1/weight"].dtype == torch.uint8
    assert found.keys() == before.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in before.items())
    assert torch.equal(model.weight, weight)
    assert float(weight[0]) == pytest.approx(3.0 - 0.1, abs=1e-3)
    assert scaler.get_scale() == 512.0


def test_an_overflow_is_skipped_and_halves_the_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, held = strategy(scaler)
    held.backward((model.weight * math.inf).sum(), last=True)
    held.sync_gradients()
    assert not math.isfinite(held.optimizer_step(0.1))
    held.conclude_step(is_whole=True)
    assert float(model.weight.detach()) == 3.0
    assert scaler.get_scale() == 512.0
    assert model.weight.grad is None


def test_the_first_pass_of_a_run_may_be_out_of_memory() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, held = strategy(scaler)
    # As after a resume.
    held.load_scaler_state(
        {"scale": 256.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1, "_growth_tracker": 0}
    )
    held.give_up_step()
    held.sync_gradients()
    held.optimizer_step(0.1, torch.tensor(math.nan))
    held.conclude_step(is_whole=False)
    assert (float(model.weight.detach()), scaler.get_scale()) == (3.0, 256.0)
    held.backward((model.weight * 2).sum(), last=True)
    assert float(held.optimizer_step(0.1)) == pytest.approx(2.0)
    held.conclude_step(is_whole=True)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("has_gradient", [True, False], ids=["whole", "out of memory"])
def test_a_step_that_another_rank_could_not_take_leaves_the_scale_and_its_growth(has_gradient: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model, held = strategy(scaler)
    for spoiled in (False, True, True, False):
        if has_gradient or not spoiled:
            held.backward((model.weight * 2).sum(), last=True)
        before = float(model.weight.detach())
        held.optimizer_step(0.1, torch.tensor(math.nan if spoiled else 1.0))
        assert (float(model.weight.detach()) == before) == spoiled
        assert scaler.get_scale() == 1024.0
        held.conclude_step(is_whole=not spoiled)
    assert scaler.get_scale() == 2048.0, "two whole steps in a row"
