"""Attention over one row of real tokens, registered with transformers under a name of our own.

A micro-batch is one row of T tokens: the features one behind the other, without padding. Everything in an encoder but
attention works token by token and needs no change; attention must stay inside each feature. The model hands our
function the boundaries that it was called with: on CUDA one variable-length kernel attends between them
(`qa_dist.model.cuda_attention`), on CPU one operator that calls torch's flash kernel feature by feature.

Legend: B features, H heads, T tokens of the row, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from qa_dist.common.errors import UserError
from qa_dist.features.rows import window_mask
from qa_dist.model import cuda_attention

UNPADDED = "qa_dist_unpadded"
"""Name of the attention implementation, for transformers' `attn_implementation`."""


_uses_cuda_kernels = False


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Context in which attention calls CUDA's kernels wherever its tensors are: on fake ones, to see what they make."""
    global _uses_cuda_kernels
    _uses_cuda_kernels = True
    try:
        yield
    finally:
        _uses_cuda_kernels = False


def drops_weights(device: torch.device) -> bool:
    """Whether unpadded attention can drop attention weights on this device."""
    return device.type != "cpu" and cuda_attention.HAS_DROPOUT


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
    cumulative: torch.Tensor | None = None,
    longest: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output [1, T, H, D] of a row of features, and None for the weights.

    Args:
        module: The attention layer (unused; part of transformers' interface).
        query: [1, H, T, D].
        key: [1, H, T, D].
        value: [1, H, T, D].
        attention_mask: Must be None: the boundaries say who attends to whom.
        scaling: Factor of the scores; None: 1/sqrt(D).
        dropout: Probability with which an attention weight is dropped; must be 0 on the CPU, whose kernel has none.
        sliding_window: As ModernBERT passes it: one more than the distance up to which tokens see each other.
        cumulative: int32 [B + 1], as in a `qa_dist.features.rows.Row`.
        longest: At least the tokens of the longest feature.

    Raises:
        UserError: Attention dropout was asked for, and there is none.
    """
    if cumulative is None or attention_mask is not None:
        raise AssertionError("unpadded attention needs boundaries and no mask: call the model through SpanModel")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    reach = -1 if sliding_window is None else sliding_window - 1
    if query.device.type != "cpu" or _uses_cuda_kernels:
        return cuda_attention.attend(query, key, value, cumulative, longest, scale, reach, dropout), None
    if dropout:
        raise UserError(
            f"attention dropout {dropout} was asked for, but unpadded attention on a CPU has none; use --padding sorted"
        )
    return _attend(query, key, value, cumulative, scale, reach)[0], None


def _segments(cumulative: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First token, and one past the last, of every feature that has any."""
    return ((start, end) for start, end in pairwise(cumulative.tolist()) if end > start)


@torch.library.custom_op("qa_dist::attend", mutates_args=(), device_types="cpu")
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, scale: float, reach: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, T, H, D], and the log-sum-exp of the scores [1, T, H] in float32 for the backward pass.

    One operator instead of a slice, a kernel and a concatenation per feature: the autograd graph stays small, results
    are written where they belong, and torch.compile sees nothing that depends on the lengths.
    """
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    lse = torch.empty(output.shape[:3], dtype=torch.float32)
    for start, end in _segments(cumulative):
        piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(tensor[:, :, start:end] for tensor in (query, key, value)),
            attn_mask=window_mask(end - start, reach, query),
            scale=scale,
        )
        output[:, start:end] = piece.transpose(1, 2)
        lse[:, start:end] = piece_lse.view(1, query.shape[1], -1).transpose(1, 2)
    return output, lse


@_attend.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, scale: float, reach: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size), query.new_empty(batch, tokens, heads, dtype=torch.float32)


@torch.library.custom_op("qa_dist::attend_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    cumulative: torch.Tensor,
    scale: float,
    reach: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each [1, H, T, D] over the memory of a [1, T, H, D]."""
    batch, heads, tokens, size = query.shape
    gradients = [query.new_empty(batch, tokens, heads, size) for _ in range(3)]
    for start, end in _segments(cumulative):
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient[:, start:end].transpose(1, 2),
            *(tensor[:, :, start:end] for tensor in (query, key, value)),
            output[:, start:end].transpose(1, 2),
            lse[:, start:end].transpose(1, 2).contiguous(),
            0.0,
            False,
            attn_mask=window_mask(end - start, reach, query),
            scale=scale,
        )
        for whole, piece in zip(gradients, pieces, strict=True):
            whole[:, start:end] = piece.transpose(1, 2)
    return gradients[0].transpose(1, 2), gradients[1].transpose(1, 2), gradients[2].transpose(1, 2)


@_attend_backward.register_fake
def _(
    gradient: torch.Tensor, query: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, size = query.shape
    empty = [query.new_empty(batch, tokens, heads, size).transpose(1, 2) for _ in range(3)]
    return empty[0], empty[1], empty[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, cumulative, ctx.scale, ctx.reach = inputs
    ctx.save_for_backward(query, key, value, *output, cumulative)


def _differentiate(context: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, output, lse, cumulative = context.saved_tensors
    gradients = _attend_backward(
        gradient.contiguous(), query, key, value, output, lse, cumulative, context.scale, context.reach
    )
    return (*gradients, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save)


def register() -> None:
    """Make `attn_implementation=UNPADDED` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    # No mask function goes with it: for a name without one, transformers builds no mask at all.
    AttentionInterface.register(UNPADDED, unpadded_attention)
