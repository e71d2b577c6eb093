"""Attention over one row of real tokens, registered with transformers under a name of our own.

A micro-batch is one row of T tokens: the features one behind the other, without padding. Everything in an encoder but
attention works token by token and needs no change; attention must stay inside each feature. The model hands our
function the `segments` that it was called with, and the function attends segment by segment: on CUDA with one
variable-length kernel, on CPU with one `scaled_dot_product_attention` per feature.

Legend: H heads, T tokens of the row, D head size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from qa_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNPADDED = "qa_dist_unpadded"
"""Name of the attention implementation, for transformers' `attn_implementation`."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the features of a row begin and end.

    Attributes:
        lengths: tokens of each feature, as Python integers (the CPU path slices with them).
        cumulative: int32 [B + 1] on the model's device (the CUDA kernel reads it).
        longest: the longest feature.
    """

    lengths: tuple[int, ...]
    cumulative: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: "Sequence[int]", device: torch.device) -> "Segments":
        """Segments of features with these lengths, one behind the other."""
        cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=cumulative[1:])
        return cls(tuple(lengths), cumulative.to(device, non_blocking=True), max(lengths))

    def position_ids(self) -> torch.Tensor:
        """Position of every token inside its feature, int64 [T], on the device of `cumulative`."""
        starts = torch.repeat_interleave(self.cumulative[:-1], self.cumulative.diff(), output_size=sum(self.lengths))
        return torch.arange(len(starts), device=starts.device) - starts


def unpadded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output [1, T, H, D] of a row of features, and None for the weights.

    Args:
        module: The attention layer (unused; part of transformers' interface).
        query: [1, H, T, D].
        key: [1, H, T, D].
        value: [1, H, T, D].
        attention_mask: Must be None: segments say who attends to whom.
        scaling: Factor of the scores; None: 1/sqrt(D).
        dropout: Must be 0: the variable-length kernel has none.
        sliding_window: As ModernBERT passes it: one more than the distance up to which tokens see each other.
        segments: The features of the row.

    Raises:
        UserError: Attention dropout was asked for.
    """
    if segments is None or attention_mask is not None:
        raise AssertionError("unpadded attention needs segments and no mask: call the model through SpanModel")
    if dropout:
        raise UserError(
            f"attention dropout {dropout} was asked for, but unpadded attention has none; use --padding sorted"
        )
    reach = None if sliding_window is None else sliding_window - 1
    if query.is_cuda:
        return _attend_cuda(query, key, value, scaling, reach, segments), None
    return _attend_segments(query, key, value, scaling, reach, segments), None


def _attend_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    reach: int | None,
    segments: Segments,
) -> torch.Tensor:
    outputs = []
    pieces = zip(*(torch.split(tensor, list(segments.lengths), dim=2) for tensor in (query, key, value)), strict=True)
    for query_piece, key_piece, value_piece in pieces:
        length = query_piece.shape[2]
        mask = None
        if reach is not None and length > reach + 1:
            places = torch.arange(length, device=query.device)
            mask = (places[:, None] - places[None, :]).abs() <= reach
        outputs.append(scaled_dot_product_attention(query_piece, key_piece, value_piece, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    reach: int | None,
    segments: Segments,
) -> torch.Tensor:
    if query.dtype not in (torch.bfloat16, torch.float16):
        # The variable-length kernel computes in half precision only; float32 runs stay exact, feature by feature.
        return _attend_segments(query, key, value, scaling, reach, segments)
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, -1) if reach is None else (reach, reach)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments.cumulative,
        segments.cumulative,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=window,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def register() -> None:
    """Make `attn_implementation=UNPADDED` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    # No mask function goes with it: for a name without one, transformers builds no mask at all.
    AttentionInterface.register(UNPADDED, unpadded_attention)
