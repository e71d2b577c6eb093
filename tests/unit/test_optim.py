"""Learning rates against the Hugging Face schedules, and what decays."""

import pytest
import torch
from torch import nn
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from qa_dist.optim import learning_rate, parameter_groups


def rates(shape: str, num_steps: int, warmup_ratio: float) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, peak=0.5, warmup_ratio=warmup_ratio, shape=shape)  # type: ignore[arg-type]
        for step in range(num_steps)
    ]


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
