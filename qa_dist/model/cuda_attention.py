"""Attention over one row of real tokens on CUDA: the fastest kernel that can compute what is asked.

torch's flash kernel takes half precision, from compute capability 8.0 (Ampere) on, and windows. Its memory-efficient
kernel takes float32 too, and older devices, but no two-sided window. Both attend between boundaries that are data, so
that rows of other lengths are no other program, and neither makes the host wait for the device. What is left, such as
ModernBERT's windows in float32, is computed feature by feature.

The kernels are called as operators of torch: the public `varlen_attn` goes through Python in both directions, which
costs more than the kernel, and has no dropout. Dropout draws from the device's default generator.

Legend: B features, H heads, T tokens of the row, D head size.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from qa_dist.common.errors import UserError
from qa_dist.features.rows import window_mask

_HALF = (torch.bfloat16, torch.float16)

_FLASH_ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
)
"""Positional arguments of torch's operator, the same from 2.10 to 2.13."""

_FLASH_OPTIONS = frozenset({"scale", "window_size_left", "window_size_right"})

_LARGEST_HEAD = 256
"""Of the flash kernel. Head sizes of both kernels are multiples of 8."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    longest: int,
    scale: float,
    reach: int,
    dropout: float,
) -> torch.Tensor:
    """Attention output [1, T, H, D] of a row of features.

    Under autocast it is computed, and comes back, in autocast's type: layers of bitsandbytes give what they get, which
    behind a norm is float32.

    Args:
        query: [1, H, T, D].
        key: [1, H, T, D].
        value: [1, H, T, D].
        cumulative: int32 [B + 1], where each feature begins, and where the last one ends.
        longest: At least the tokens of the longest feature.
        scale: Factor of the scores.
        reach: Distance up to which tokens see each other; negative: any.
        dropout: Probability with which an attention weight is dropped.

    Raises:
        UserError: Dropout was asked for, and this version of torch has the kernel without it only.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    reach = -1 if longest <= reach + 1 else reach
    # The backward pass of the memory-efficient kernel refuses more than the row has.
    longest = min(longest, query.shape[2])
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= _LARGEST_HEAD
    before_ampere = _is_before_ampere(query.device.index)
    if fits and query.dtype in _HALF and not before_ampere:
        return flash(query, key, value, cumulative, longest, scale, reach, dropout)
    if fits and reach < 0 and query.dtype != torch.float64 and not (before_ampere and query.dtype == torch.bfloat16):
        rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        output: torch.Tensor = memory_efficient(*rows, cumulative, longest, scale, dropout)[0]
        return output
    return feature_by_feature(query, key, value, cumulative, scale, reach, dropout)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_before_ampere(device_index: int | None) -> bool:
    return _capability(device_index) < (8, 0)


@lru_cache
def _capability(device_index: int | None) -> tuple[int, int]:
    # Where there is no device, tensors only pretend to be on one, as in an estimate.
    return torch.cuda.get_device_capability(device_index) if torch.cuda.is_available() else (8, 0)


def has_flash_operator(schema: Any = None) -> bool:
    """Whether torch's operator takes what `flash` gives it; `schema` is its, None: as in this version of torch."""
    arguments = (schema or torch.ops.aten._flash_attention_forward.default._schema).arguments
    positional = tuple(argument.name for argument in arguments if not argument.kwarg_only)
    return positional == _FLASH_ARGUMENTS and {each.name for each in arguments if each.kwarg_only} >= _FLASH_OPTIONS


HAS_DROPOUT = has_flash_operator()
"""Whether all kernels can drop attention weights."""


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    longest: int,
    scale: float,
    reach: int,
    dropout: float,
) -> torch.Tensor:
    """`attend` through torch's flash kernel, which takes bfloat16 and float16."""
    # Squeezed, not indexed: the backward pass of an index fills a tensor with zeros and copies.
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    places = (query, key, value, cumulative, cumulative, longest, longest)
    if HAS_DROPOUT:
        output: Any = torch.ops.aten._flash_attention_forward.default(
            *places, dropout, False, False, scale=scale, window_size_left=reach, window_size_right=reach
        )[0]
    elif dropout:
        raise UserError(
            f"attention dropout {dropout} was asked for, but torch {torch.__version__} has none for rows without "
            "padding; use a version that qa-dist doctor calls tested, or --padding sorted"
        )
    else:
        # The public function, for versions of torch whose operator takes other arguments.
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(*places, scale=scale, window_size=(reach, reach))
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


@torch.library.custom_op("qa_dist::attend_memory_efficient", mutates_args=())
def memory_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    longest: int,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [1, T, H, D] of torch's memory-efficient kernel, and what its backward pass needs.

    An operator of our own around torch's: what torch.compile asks about the backward pass of that one, it cannot answer
    (torch 2.13, `meta__efficient_attention_backward` lacks an argument).

    Args:
        query: [1, T, H, D].
        key: [1, T, H, D].
        value: [1, T, H, D].
        cumulative: int32 [B + 1].
        longest: At least the tokens of the longest feature, and at most T.
        scale: Factor of the scores.
        dropout: Probability with which an attention weight is dropped.
    """
    output, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, cumulative, cumulative, longest, longest, dropout, 0, True, scale=scale
    )
    return output, lse, seed, offset


@memory_efficient.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    longest: int,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, heads, size = query.shape
    # The kernel's blocks have 32 queries.
    lse = query.new_empty(cumulative.shape[0] - 1, heads, (longest + 31) // 32 * 32, dtype=torch.float32)
    seed, offset = (torch.empty((), dtype=torch.int64, device="cpu") for _ in range(2))
    return query.new_empty(batch, tokens, heads, size), lse, seed, offset


@torch.library.custom_op("qa_dist::attend_memory_efficient_backward", mutates_args=())
def _memory_efficient_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    cumulative: torch.Tensor,
    longest: int,
    lse: torch.Tensor,
    dropout: float,
    seed: torch.Tensor,
    offset: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each [1, T, H, D]."""
    gradients: tuple[torch.Tensor, ...] = torch.ops.aten._efficient_attention_backward(
        gradient,
        query,
        key,
        value,
        None,
        output,
        cumulative,
        cumulative,
        longest,
        longest,
        lse,
        dropout,
        seed,
        offset,
        0,
        False,
        scale=scale,
    )
    return gradients[0], gradients[1], gradients[2]


@_memory_efficient_backward.register_fake
def _(
    gradient: torch.Tensor, query: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    empty = [query.new_empty(query.shape) for _ in range(3)]
    return empty[0], empty[1], empty[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, cumulative, ctx.longest, ctx.scale, ctx.dropout = inputs
    ctx.save_for_backward(query, key, value, cumulative, *output)


def _differentiate(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    query, key, value, cumulative, output, lse, seed, offset = ctx.saved_tensors
    gradients = _memory_efficient_backward(
        gradient, query, key, value, output, cumulative, ctx.longest, lse, ctx.dropout, seed, offset, ctx.scale
    )
    return (*gradients, None, None, None, None)


memory_efficient.register_autograd(_differentiate, setup_context=_save)


def feature_by_feature(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    scale: float,
    reach: int,
    dropout: float,
) -> torch.Tensor:
    """`attend` with a kernel for each feature, whose lengths the host reads from the device."""
    # Split, not sliced: the backward pass is one concatenation.
    lengths = cumulative.diff().tolist()
    split = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    pieces = [
        scaled_dot_product_attention(
            query_piece,
            key_piece,
            value_piece,
            attn_mask=window_mask(length, reach, query),
            dropout_p=dropout,
            scale=scale,
        )
        for length, (query_piece, key_piece, value_piece) in zip(lengths, split, strict=True)
        if length
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)
