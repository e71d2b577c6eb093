"""Learning rates against the Hugging Face schedules, what decays, and moments in 8 bits against those in 32."""

import dataclasses
import importlib.util
import math
import typing
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from qa_dist.common.errors import ConfigError
from qa_dist.config.optimizers import OPTIMIZERS, Optimizer, OptimizerName
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.distributed.launch_config import Strategy, recipe_problems
from qa_dist.distributed.strategies import zero
from qa_dist.distributed.strategies.data_parallel import DataParallel
from qa_dist.distributed.strategies.optimizer_state import load_optimizer_tensors, optimizer_tensors
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.training.optimizer import (
    is_fused,
    learning_rate,
    make_optimizer,
    parameter_groups,
    require_optimizer,
    step_bytes,
)
from tests.waiting import reads


def rates(shape: str, num_steps: int, warmup_ratio: float) -> list[float]:
    training = TrainingConfig(learning_rate=0.5, warmup_ratio=warmup_ratio, lr_scheduler_type=shape)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, training) for step in range(num_steps)]


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_without_warmup_the_rates_are_those_of_the_hugging_face_schedules(shape: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, 0, 20),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, 0, 20),
        "constant": lambda: get_constant_schedule(optimizer),
    }[shape]()
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(shape, 20, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_warmup_rises_to_the_peak_and_spends_no_step_at_zero(shape: str) -> None:
    found = rates(shape, 40, 0.25)
    assert found[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert max(found) == found[9] == found[10] == 0.5
    assert all(rate > 0 for rate in found)
    assert found[10:] == sorted(found[10:], reverse=True)


@pytest.mark.parametrize(("ratio", "num_steps", "warmup"), [(0.07, 100, 7), (0.14, 50, 7), (0.1, 101, 11)])
def test_steps_of_warmup_are_counted_in_decimals(ratio: float, num_steps: int, warmup: int) -> None:
    assert rates("constant", num_steps, ratio).index(0.5) == warmup - 1


def test_one_step_runs_at_the_peak() -> None:
    for warmup_ratio in (0.0, 0.5):
        assert rates("linear", 1, warmup_ratio) == [0.5]


def test_biases_norms_and_frozen_parameters_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(3, 2)], [(3,), (3,), (3,)]]
    only_vectors = parameter_groups(nn.LayerNorm(3).named_parameters(), 0.1)
    assert [group["weight_decay"] for group in only_vectors] == [0.0]


class Net(nn.Module):
    """A matrix of 96 x 64, whose moments go into 8 bits, and smaller tensors, whose moments do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(96, 64), nn.Linear(64, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(inputs).tanh())
        return found

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())

    def blocks(self) -> list[nn.Module]:
        return []

    def shift_invariant_biases(self) -> dict[str, nn.Parameter]:
        return {}


def held(
    kind: OptimizerName, weight_decay: float = 0.1, *, fused: bool = False, max_grad_norm: float | None = 0.5
) -> tuple[Net, DataParallel]:
    pytest.importorskip(OPTIMIZERS[kind].package, reason="an extra is not installed")
    net = Net()

    def make(parameters: Any) -> torch.optim.Optimizer:
        training = TrainingConfig(optim=kind, learning_rate=1.0, adam_beta2=0.99, weight_decay=weight_decay)
        return make_optimizer(training, parameters, fused=fused)

    return net, DataParallel(net, make, max_grad_norm, watchdog=Watchdog(math.inf))


def take_step(net: Net, strategy: DataParallel, number: int, rate: float) -> tuple[float, float]:
    """Loss and gradient norm of a step."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(32, 96, generator=generator)
    loss = (net(inputs) - inputs[:, :2].sign()).square().mean()
    strategy.backward(loss, last=True)
    strategy.sync_gradients()
    return float(loss.detach()), float(strategy.optimizer_step(rate))


def test_moments_in_8_bits_train_as_those_in_32_do() -> None:
    (net, strategy), (other, plain) = held("adamw_8bit"), held("adamw")
    start = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    steps = []
    for number in range(30):
        rate = 2e-2 * (number + 1) / 30
        steps.append((take_step(net, strategy, number, rate), take_step(other, plain, number, rate)))
    # In the first step there is nothing to round yet; what follows stays within a part of the way.
    assert steps[0][0] == steps[0][1]
    assert steps[-1][0][0] < 0.7 * steps[0][0][0]
    assert max(norm for (_, norm), _ in steps) > 0.5, "nothing was clipped"
    for name, weight in other.named_parameters():
        way = (weight - start[name]).norm()
        distance = (dict(net.named_parameters())[name] - weight).norm()
        assert 0 < distance < 0.1 * way, name


def test_learning_rate_and_decay_reach_the_8_bit_update() -> None:
    net, strategy = held("adamw_8bit")
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    for rate in (0.5, 0.25):
        strategy.backward(sum((weight * 0).sum() for weight in net.parameters()), last=True)  # type: ignore[arg-type]
        strategy.optimizer_step(rate)
    for name, weight in net.named_parameters():
        factor = (1 - 0.5 * 0.1) * (1 - 0.25 * 0.1) if weight.ndim == 2 else 1.0
        torch.testing.assert_close(weight.detach(), before[name] * factor, msg=name)


def test_every_optimiser_of_the_option_has_a_row_and_every_row_is_in_the_option() -> None:
    choices = set(typing.get_args(typing.get_type_hints(TrainingConfig)["optim"]))
    needed = ", ".join(field.name for field in dataclasses.fields(Optimizer))
    missing, strange = sorted(choices - OPTIMIZERS.keys()), sorted(OPTIMIZERS.keys() - choices)
    assert not missing, f"give {missing} a row in qa_dist/config/optimizers.py: {needed}"
    assert not strange, f"name {strange} in OptimizerName, beside the table in qa_dist/config/optimizers.py"


# On a CPU bitsandbytes pages nothing, and says so: which is why `require_optimizer` refuses it there.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_a_row_says_of_an_optimiser_is_so(kind: OptimizerName) -> None:
    row = OPTIMIZERS[kind]
    net, strategy = held(kind)
    take_step(net, strategy, 0, 0.1)
    kinds = set()
    for name, weight in net.named_parameters():
        tensors = optimizer_tensors(strategy.optimizer, [(name, weight)])
        state = {key.partition("/")[0]: tensor for key, tensor in tensors.items()}
        kinds |= state.keys()
        in_8_bits = row.quantisation is not None and weight.numel() >= row.quantisation.least
        for moment in row.moments:
            assert state[moment].shape == weight.shape, f"{moment} is no moment: it has another shape than its tensor"
            assert state[moment].dtype == (torch.uint8 if in_8_bits else torch.float32), moment
        held_bytes = sum(tensor.nbytes for kind, tensor in state.items() if kind != "step")
        assert held_bytes == row.moment_bytes(weight.numel()), f"moment_bytes of {name}"
    assert kinds == set(row.state), "what a checkpoint holds of the state"
    assert (row.unpaged is None) == (not getattr(strategy.optimizer, "is_paged", False))
    assert row.unpaged is None or OPTIMIZERS[row.unpaged].unpaged is None
    assert not row.is_shardable or row.moments == zero._MOMENTS, "ZeRO looks for its moments by name"


def test_moments_in_8_bits_are_counted_by_whole_blocks_from_the_least_size_on() -> None:
    assert [OPTIMIZERS["adamw"].moment_bytes(number) for number in (4095, 4097)] == [8 * 4095, 8 * 4097]
    assert [OPTIMIZERS["adamw_8bit"].moment_bytes(number) for number in (4095, 4097)] == [
        8 * 4095,
        2 * (4097 + 4 * 17),
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_only_what_is_shardable_goes_with_a_strategy_that_shards(kind: OptimizerName) -> None:
    config = RunConfig(training=TrainingConfig(optim=kind))
    for strategy in typing.get_args(Strategy):
        problems = list(recipe_problems(strategy, config))
        assert bool(problems) == (strategy != "ddp" and not OPTIMIZERS[kind].is_shardable), strategy
        assert all(f"--optim {kind} does not work with {strategy}" in problem for problem in problems)


def test_moments_are_put_back_into_the_memory_that_bitsandbytes_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is paged stays so."""
    net, strategy = held("adamw_8bit")
    take_step(net, strategy, 0, 0.1)
    tensors = strategy.optimizer_tensors()
    again, fresh = held("adamw_8bit")
    optimizer: Any = fresh.optimizer
    taken, take = [], optimizer.get_state_buffer

    def buffer(*arguments: Any, **options: Any) -> torch.Tensor:
        taken.append(take(*arguments, **options))
        found: torch.Tensor = taken[-1]
        return found

    monkeypatch.setattr(optimizer, "get_state_buffer", buffer)
    load_optimizer_tensors(optimizer, again.named_parameters(), tensors)
    kept = [state[kind] for state in optimizer.state.values() for kind in ("state1", "state2")]
    assert len(kept) == len(taken) == 8
    assert all(one is other for one, other in zip(kept, taken, strict=True))
    assert any(bool(moment.any()) for moment in kept)


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    with pytest.raises(ConfigError, match=r"is for GPUs, .* use --optim adamw_8bit"):
        require_optimizer("paged_adamw_8bit", "cpu")
    require_optimizer("paged_adamw_8bit", "cuda")
    require_optimizer("adamw_8bit", "cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match=r"--optim adamw_8bit needs bitsandbytes; .* 'qa-dist\[quant\]'"):
        require_optimizer("adamw_8bit", "cpu")
    require_optimizer("adamw", "cpu")


@pytest.mark.parametrize("max_grad_norm", [1.6, None])
def test_a_fused_step_clips_and_moves_as_one_that_is_not_fused(max_grad_norm: float | None) -> None:
    (net, strategy), (other, plain) = (
        held("adamw", fused=fused, max_grad_norm=max_grad_norm) for fused in (True, False)
    )
    norms = []
    for number in range(20):
        taken = take_step(net, strategy, number, 1e-2), take_step(other, plain, number, 1e-2)
        assert taken[0] == pytest.approx(taken[1], rel=1e-5)
        norms.append(taken[0][1])
    assert max(norms) > 1.6 > min(norms), "some are clipped and some are not"
    for name, weight in other.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name], weight, rtol=1e-5, atol=1e-6)
    states = strategy.optimizer_tensors(), plain.optimizer_tensors()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[1].items():
        assert states[0][key].dtype == tensor.dtype
        torch.testing.assert_close(states[0][key], tensor, rtol=1e-4, atol=1e-7, msg=key)
    # A checkpoint of either goes on as the other.
    strategy.load_optimizer_tensors(states[1])
    plain.load_optimizer_tensors(states[0])
    again = take_step(net, strategy, 30, 1e-2), take_step(other, plain, 30, 1e-2)
    assert again[0] == pytest.approx(again[1], rel=1e-5)
    assert float(strategy.optimizer_tensors()["step/first.weight"]) == 21


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("why", ["spoiled", "not finite", "no gradient here"])
def test_a_step_that_must_not_be_taken_changes_nothing(fused: bool, why: str) -> None:
    net, strategy = held("adamw", fused=fused)
    take_step(net, strategy, 0, 1e-2)
    weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    state = strategy.optimizer_tensors()
    if why != "no gradient here":
        loss = net(torch.ones(1, 96)).square().sum() * (math.nan if why == "not finite" else 1.0)
        strategy.backward(loss, last=True)
    norm = strategy.optimizer_step(1e-2, torch.tensor(1.0 if why == "not finite" else math.inf))
    assert math.isfinite(float(norm)) == (why != "not finite")
    assert all(torch.equal(weight, weights[name]) for name, weight in net.named_parameters())
    assert all(torch.equal(tensor, state[key]) for key, tensor in strategy.optimizer_tensors().items())
    assert all(weight.grad is None for weight in net.parameters())
    # What comes next is as if it had not been.
    other, plain = held("adamw", fused=fused)
    take_step(other, plain, 0, 1e-2)
    assert take_step(net, strategy, 1, 1e-2) == take_step(other, plain, 1, 1e-2)


def test_a_fused_step_waits_for_nothing() -> None:
    net, strategy = held("adamw", fused=True)
    for _ in range(2):
        strategy.backward(net(torch.ones(1, 96)).square().sum(), last=True)
        strategy.sync_gradients()
        with reads() as found:
            strategy.optimizer_step(1e-2, torch.tensor(1.0))
        assert found == []
    assert strategy.have_gradients(["first.weight"]) == [False]


def test_one_look_tells_which_tensors_have_gradients() -> None:
    net, strategy = held("adamw")
    (net.first.weight * 0).sum().backward()
    net.second.weight.sum().backward()
    with reads() as found:
        assert strategy.have_gradients(["second.weight", "first.weight", "first.bias"]) == [True, False, False]
    assert len(found) <= 1


def test_only_gpus_that_hold_whole_tensors_or_fsdp2_step_fused() -> None:
    assert is_fused("adamw", "ddp", "cuda")
    assert is_fused("adamw", "fsdp2", "cuda")
    assert not is_fused("adamw", "zero2", "cuda")
    assert not is_fused("adamw", "ddp", "cpu")
    assert is_fused("adamw_8bit", "ddp", "cpu")
    # 100 and 50 float32 gradients, two moments of each, and the roots of the second ones.
    assert step_bytes("adamw", [100, 50], fused=True) == 150 * 4 * 3
    assert step_bytes("adamw", [100, 50], fused=False) == 150 * 4 * 4
