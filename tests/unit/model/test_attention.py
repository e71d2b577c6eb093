"""Attention inside the features of a row, against torch's own, feature by feature and with a mask."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qa_dist.common.errors import UserError
from qa_dist.features.rows import Row
from qa_dist.model.attention import unpadded_attention

LENGTHS = [5, 1, 40, 17, 3]
HEADS, SIZE = 3, 8


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, sum(LENGTHS), HEADS, SIZE)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def attend(tensors: list[torch.Tensor], **options: object) -> torch.Tensor:
    cumulative = Row.of(LENGTHS, torch.device("cpu")).cumulative
    query, key, value = tensors
    output, weights = unpadded_attention(
        torch.nn.Identity(), query, key, value, None, cumulative=cumulative, longest=40, **options
    )
    assert weights is None
    return output


def expected(tensors: list[torch.Tensor], reach: int, scale: float | None) -> torch.Tensor:
    """One attention over the whole row with a mask of blocks: slow and plain."""
    feature = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    places = torch.arange(len(feature))
    mask = (feature[:, None] == feature[None]) & ((places[:, None] - places[None]).abs() <= reach)
    return scaled_dot_product_attention(*tensors, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("sliding_window", [None, 5, 1])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_equals_one_attention_with_a_block_mask(sliding_window: int | None, scaling: float | None) -> None:
    ours, plain = inputs(), inputs()
    found = attend(ours, sliding_window=sliding_window, scaling=scaling)
    wanted = expected(plain, 1000 if sliding_window is None else sliding_window - 1, scaling)
    # Kernels of other processors add up in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-6)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=3e-6)


def test_half_precision_stays_half() -> None:
    found = attend(inputs(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attend(inputs()), rtol=0.05, atol=0.05)


def test_the_operators_keep_torch_s_rules() -> None:
    from qa_dist.model.attention import _attend

    cumulative = Row.of(LENGTHS, torch.device("cpu")).cumulative
    torch.library.opcheck(_attend, (*inputs(), cumulative, 0.3, -1))


def test_what_it_cannot_do_is_an_error() -> None:
    with pytest.raises(UserError, match="use --padding sorted"):
        attend(inputs(), dropout=0.1)
    with pytest.raises(AssertionError, match="through SpanModel"):
        unpadded_attention(torch.nn.Identity(), *inputs(), None)
