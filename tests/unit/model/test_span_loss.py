"""The loss of a row of features against the plain padded one; the layout it is computed with."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qa_dist.features.rows import Row
from qa_dist.model.span_model import span_loss

CPU = torch.device("cpu")


def padded_loss(
    start_T: torch.Tensor, end_T: torch.Tensor, lengths: tuple[int, ...], labels_B2: torch.Tensor
) -> torch.Tensor:
    """Features cut out of the row one by one, padded, and handed to torch's cross-entropy."""
    losses = []
    for logits_T, labels_B in ((start_T, labels_B2[:, 0]), (end_T, labels_B2[:, 1])):
        pieces = list(torch.split(logits_T, lengths))
        logits_BL = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=-math.inf)
        losses.append(nn.functional.cross_entropy(logits_BL, labels_B, reduction="none"))
    return (losses[0] + losses[1]) / 2


def example(seed: int, num_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[int, ...], torch.Tensor]:
    """Logits [2, T], lengths and labels [B, 2]."""
    rng = np.random.default_rng(seed)
    lengths = tuple(int(length) for length in rng.integers(1, 60, num_features))
    labels = torch.tensor([[int(rng.integers(length)), int(rng.integers(length))] for length in lengths])
    return torch.from_numpy(rng.normal(0, 8, (2, sum(lengths)))).to(dtype), lengths, labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_features", [1, 2, 33])
def test_equals_the_padded_loss(num_features: int, dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(5):
        logits, lengths, labels = example(seed, num_features, dtype)
        ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        weights = torch.rand(num_features, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        found, wanted = span_loss(*ours, lengths, labels), padded_loss(*plain, lengths, labels)
        (found * weights).sum().backward()
        (wanted * weights).sum().backward()
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=tolerance)


def test_a_feature_far_below_the_others_keeps_its_gradient() -> None:
    # With one maximum for all features, the small one's exponentials would all be zero.
    start_T = torch.tensor([900.0, 901.0, -900.0, -901.0, -902.0]).requires_grad_()
    span_loss(start_T, torch.zeros(5), (2, 3), torch.zeros(2, 2, dtype=torch.long)).sum().backward()
    wanted = torch.cat([torch.softmax(start_T.detach()[:2], 0), torch.softmax(start_T.detach()[2:], 0)])
    wanted[[0, 2]] -= 1
    torch.testing.assert_close(start_T.grad, wanted / 2)


class Operators(TorchDispatchMode):
    """Counts what is called below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(num_features: int) -> Counter[str]:
    logits, lengths, labels = example(0, num_features, torch.float32)
    logits.requires_grad_()
    with Operators() as mode:
        span_loss(*logits, lengths, labels).sum().backward()
    return mode.counts


def test_operators_do_not_grow_with_the_number_of_features() -> None:
    few, many = operators(2), operators(64)
    assert few == many
    # Sums of gradients in an order of the device's own.
    assert not {name for name in many if "index_put" in name or "scatter" in name or "index_add" in name}
    assert sum(many.values()) <= 45


def test_the_layout_of_a_row() -> None:
    row = Row.of((2, 1, 4), CPU)
    assert row.cumulative.dtype == torch.int32
    assert row.cumulative.tolist() == [0, 2, 3, 7]
    assert row.positions_T.tolist() == [0, 1, 0, 0, 1, 2, 3]
    assert row.places_BL.tolist() == [[0, 1, 7, 7], [2, 7, 7, 7], [3, 4, 5, 6]]
    assert row.padded_T.tolist() == [0, 1, 4, 8, 9, 10, 11]
    assert row.lengths == (2, 1, 4)


@pytest.mark.parametrize("num_features", [0, 1, 2, 3, 4])
def test_a_layout_within_other_numbers(num_features: int) -> None:
    # Boundaries are pairs in the array: even and odd numbers of them.
    lengths = (3, 1, 4, 2)[:num_features]
    alone = Row.of(lengths, CPU)
    assert alone.cumulative.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert alone.cumulative.is_contiguous()
    there_and_back = torch.cat([torch.arange(sum(lengths)), torch.tensor([-1])])[alone.places_BL].flatten()
    assert there_and_back[alone.padded_T].tolist() == list(range(sum(lengths)))
