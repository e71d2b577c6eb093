"""From logits to candidates: the best spans of every feature, searched for where the logits are, on every rank.

Shapes: B features of a batch, L tokens of a feature (padded), T tokens of all features, K candidates of a feature.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.common.arrays import Int64
from qa_dist.evaluation.candidates import CandidateTable, check_settings, require_order
from qa_dist.evaluation.searches import SEARCHES, SearchBatch


def pad_rows(values_T: Tensor, lengths_B: Tensor, fill: float = float("-inf"), num_tokens: int | None = None) -> Tensor:
    """Rows cut from a flat tensor and padded on the right: [B, L].

    Args:
        values_T: the rows one after the other, without padding.
        lengths_B: number of values of each row; they sum to T.
        fill: value of the padding.
        num_tokens: L; by default the longest row, which costs a transfer from the device.
    """
    lengths_B = lengths_B.to(device=values_T.device, dtype=torch.int64)
    if num_tokens is None:
        num_tokens = int(lengths_B.max()) if lengths_B.numel() else 0
    if not values_T.numel():
        return values_T.new_full((lengths_B.numel(), num_tokens), fill)
    position_L = torch.arange(num_tokens, device=values_T.device)
    first_B = lengths_B.cumsum(0) - lengths_B
    flat_BL = (first_B[:, None] + position_L).clamp_(max=values_T.numel() - 1)
    return values_T[flat_BL].masked_fill_(position_L >= lengths_B[:, None], fill)


def top_spans(
    feature_index_B: Int64 | Sequence[int],
    start_logits_BL: Tensor,
    end_logits_BL: Tensor,
    context_start_B: Tensor,
    context_end_B: Tensor,
    cls_token_B: Tensor,
    lengths_B: Tensor,
    *,
    num_candidates: int,
    max_answer_length: int,
    search: str = "span",
    length_penalty: float = 0.0,
) -> CandidateTable:
    """The best `num_candidates` spans of each feature, by start logit + end logit (float32 addition).

    A span lies in the context and has at most `max_answer_length` tokens. Which spans are considered, and which of
    equal ones come first, is up to the search. Each token of a span behind its first takes `length_penalty` off its
    score: it is added to start logits, and taken off end logits, once for each token before them, so that a search
    looks at other logits and needs no other way. The table has the logits that were searched; those of "no answer" are
    as they were.

    Args:
        feature_index_B: the position of each feature in the data set.
        start_logits_BL: logits of any floating type; values at or beyond `lengths_B` are never read.
        end_logits_BL: likewise.
        context_start_B: first token of the context.
        context_end_B: one past the last token of the context.
        cls_token_B: the token that stands for "no answer".
        lengths_B: tokens of each feature, without padding.
        num_candidates: K.
        max_answer_length: M, in tokens.
        search: a name of `SEARCHES`.
        length_penalty: in logits.

    Raises:
        ScoringError: a logit is NaN or +inf.
    """
    check_settings(search, SEARCHES, num_candidates, max_answer_length)
    num_features, num_tokens = start_logits_BL.shape
    if not num_features:
        return CandidateTable.empty(num_candidates)
    start_logits_BL, end_logits_BL = start_logits_BL.float(), end_logits_BL.float()
    context_start_B, context_end_B, null_B, lengths_B = (
        tensor.to(device=start_logits_BL.device, dtype=torch.int64)
        for tensor in (context_start_B, context_end_B, cls_token_B, lengths_B)
    )
    is_token_BL = torch.arange(num_tokens, device=lengths_B.device) < lengths_B[:, None]
    nulls = start_logits_BL.gather(1, null_B[:, None]), end_logits_BL.gather(1, null_B[:, None])
    if length_penalty:
        taken_L = torch.arange(num_tokens, device=lengths_B.device, dtype=torch.float32) * length_penalty
        start_logits_BL, end_logits_BL = start_logits_BL + taken_L, end_logits_BL - taken_L
    batch = SearchBatch(
        start_logits_BL, end_logits_BL, context_start_B, torch.minimum(context_end_B, lengths_B), is_token_BL
    )
    # No span is longer than the feature.
    start_BK, end_BK = SEARCHES[search](batch, num_candidates, min(max_answer_length, num_tokens))
    return _table(feature_index_B, batch, start_BK, end_BK, nulls, num_candidates)


def _table(
    feature_index_B: Int64 | Sequence[int],
    batch: SearchBatch,
    start_BK: Tensor,
    end_BK: Tensor,
    nulls: tuple[Tensor, Tensor],
    num_candidates: int,
) -> CandidateTable:
    """The spans that a search found, with their logits and those of "no answer", each [B, 1], on the host.

    Raises:
        ScoringError: a logit is NaN or +inf.
    """
    start_logits_BL, end_logits_BL = batch.start_logits_BL, batch.end_logits_BL
    start_NK, end_NK, start_logit_NK, end_logit_NK, null_start, null_end, is_bad = _on_host(
        _filled_up(start_BK, num_candidates, -1),
        _filled_up(end_BK, num_candidates, -1),
        _filled_up(_logits_at(start_logits_BL, start_BK), num_candidates, float("-inf")),
        _filled_up(_logits_at(end_logits_BL, end_BK), num_candidates, float("-inf")),
        *nulls,
        _are_bad(start_logits_BL, end_logits_BL, batch.is_token_BL)[:, None],
    )
    require_order(int(is_bad.sum()), len(is_bad))
    return CandidateTable(
        feature_index_N=np.asarray(feature_index_B, dtype=np.int64),
        start_token_NK=start_NK,
        end_token_NK=end_NK,
        start_logit_NK=start_logit_NK,
        end_logit_NK=end_logit_NK,
        null_start_logit_N=null_start[:, 0],
        null_end_logit_N=null_end[:, 0],
    )


def _are_bad(start_logits_BL: Tensor, end_logits_BL: Tensor, is_token_BL: Tensor) -> Tensor:
    """Whether features have logits whose sums have no order, bool [B]; of values below +inf no sum is NaN."""
    inf = float("inf")
    return ~(((start_logits_BL < inf) & (end_logits_BL < inf)) | ~is_token_BL).all(dim=1)


def _logits_at(logits_BL: Tensor, token_BX: Tensor) -> Tensor:
    """The logits of tokens; -inf where there is none."""
    return logits_BL.gather(1, token_BX.clamp(min=0)).masked_fill_(token_BX < 0, float("-inf"))


def _filled_up(values_BX: Tensor, num_candidates: int, fill: float) -> Tensor:
    """The same with K columns: a search of short features finds fewer."""
    return torch.nn.functional.pad(values_BX, (0, num_candidates - values_BX.shape[1]), value=fill)


def _on_host(*tables: Tensor) -> list[npt.NDArray[Any]]:
    """Tables of float32, or of integers as int32, with a row for each feature: through one copy from the device."""
    bits = [table.view(torch.int32) if table.is_floating_point() else table.int() for table in tables]
    packed = torch.cat(bits, dim=1).cpu().numpy()
    columns = np.split(packed, np.cumsum([table.shape[1] for table in tables])[:-1], axis=1)
    return [
        np.ascontiguousarray(column).view(np.float32 if table.is_floating_point() else np.int32)
        for column, table in zip(columns, tables, strict=True)
    ]
