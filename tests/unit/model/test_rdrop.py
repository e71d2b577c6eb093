"""R-Drop against its formula, feature by feature."""

import pytest
import torch

from qa_dist.model.rdrop import rdrop_loss
from qa_dist.model.span_model import span_loss
from tests.unit.model.test_span_loss import example


def by_the_formula(
    logits: torch.Tensor, again: torch.Tensor, lengths: tuple[int, ...], labels: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Equation 4 of the paper, halved, for start and end on average; float [B]."""
    found = []
    for number, (one, other) in enumerate(zip(logits.split(lengths, 1), again.split(lengths, 1), strict=True)):
        losses = []
        for side in range(2):
            p, q = torch.softmax(one[side], 0), torch.softmax(other[side], 0)
            answer = labels[number, side]
            divergence = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
            losses.append((-p[answer].log() - q[answer].log() + alpha / 2 * divergence) / 2)
        found.append(sum(losses) / 2)
    return torch.stack(found)


def twice(seed: int, num_features: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], torch.Tensor]:
    """Logits of both copies, float64 [2, T] each, lengths and labels of one."""
    logits, lengths, labels = example(seed, num_features, torch.float64)
    noise = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits, logits + noise, lengths, labels


@pytest.mark.parametrize("alpha", [0.5, 4.0])
@pytest.mark.parametrize("num_features", [1, 2, 9])
def test_is_the_loss_of_the_paper(num_features: int, alpha: float) -> None:
    for seed in range(3):
        logits, again, lengths, labels = twice(seed, num_features)
        row = torch.cat([logits, again], 1).requires_grad_()
        plain, plain_again = logits.clone().requires_grad_(), again.clone().requires_grad_()
        found = rdrop_loss(*row, lengths * 2, labels.repeat(2, 1), alpha=alpha)
        wanted = by_the_formula(plain, plain_again, lengths, labels, alpha)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        found.sum().backward()  # type: ignore[no-untyped-call]
        wanted.sum().backward()  # type: ignore[no-untyped-call]
        assert row.grad is not None
        assert plain.grad is not None
        assert plain_again.grad is not None
        torch.testing.assert_close(row.grad, torch.cat([plain.grad, plain_again.grad], 1), rtol=0, atol=1e-10)


def test_without_a_weight_it_is_the_mean_and_of_equal_copies_the_loss() -> None:
    logits, again, lengths, labels = twice(1, 5)
    each = [span_loss(*copy, lengths, labels) for copy in (logits, again)]
    row, doubled = torch.cat([logits, again], 1), labels.repeat(2, 1)
    torch.testing.assert_close(rdrop_loss(*row, lengths * 2, doubled, alpha=0.0), sum(each) / 2)
    same = rdrop_loss(*logits.repeat(1, 2), lengths * 2, doubled, alpha=7.0)
    torch.testing.assert_close(same, each[0])


def test_logits_that_leave_no_doubt_have_a_finite_gradient() -> None:
    # In float32 a softmax of such logits is exactly 0 and 1.
    row = torch.tensor([[300.0, -300.0, -300.0, 300.0], [0.0, 1.0, 1.0, 0.0]]).requires_grad_()
    rdrop_loss(*row, (2, 2), torch.tensor([[0, 1], [0, 1]]), alpha=1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert row.grad is not None
    assert row.grad.isfinite().all()
