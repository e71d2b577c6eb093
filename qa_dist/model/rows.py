"""A row of real tokens: the features one behind the other, and where each of them begins.

Legend: B features, T tokens of the row.
"""

from collections.abc import Sequence

import torch


def cumulative_lengths(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where each feature of a row begins, and where the last one ends: int32 [B + 1]."""
    cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=cumulative[1:])
    return cumulative.to(device, non_blocking=True)


def position_ids(cumulative: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Position of every token inside its feature, int64 [T], on the device of `cumulative`."""
    starts = torch.repeat_interleave(cumulative[:-1], cumulative.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=starts.device) - starts


def window_mask(length: int, reach: int, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask [length, length] that keeps tokens at most `reach` apart; None where it would mask nothing.

    Args:
        length: Tokens of the feature.
        reach: The distance; negative: any.
        like: What gives the mask its dtype and device.
    """
    if reach < 0 or length <= reach + 1:
        return None
    places = torch.arange(length, device=like.device)
    far = (places[:, None] - places[None, :]).abs() > reach
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(far, float("-inf"))
