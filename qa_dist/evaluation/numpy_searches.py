"""The searches in numpy, for logits that never were torch's: the same candidates where torch is not installed.

What each search finds, how it breaks ties, and why that is exact, is said in `searches`. A test holds both to the same
bytes.

Shapes: B features of a batch, L tokens of a feature (padded), K candidates of a feature, M longest answer, S starts or
ends kept, P spans ranked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Bools, Float32, Int64
from qa_dist.evaluation.candidates import CandidateTable, check_settings, require_order

Integers = npt.NDArray[np.integer[Any]]

_TIE_LIMIT = 2**31 - 1
_LOW_BITS = 2**32 - 1
_ABSENT = -(2**63)


class Batch(NamedTuple):
    """What a search looks at; see `searches.SearchBatch`.

    Attributes:
        start_logits_BL: float32; what stands behind a feature's tokens may be anything.
        end_logits_BL: likewise.
        context_start_B: int64, first token of the context.
        context_end_B: int64, one past its last token; not beyond the feature's tokens.
        is_token_BL: whether there is a token and not padding.
    """

    start_logits_BL: Float32
    end_logits_BL: Float32
    context_start_B: Int64
    context_end_B: Int64
    is_token_BL: Bools

    def in_context(self, token_BX: Int64) -> Bools:
        """Whether tokens lie in the contexts of their features, [B, X]."""
        return (token_BX >= self.context_start_B[:, None]) & (token_BX < self.context_end_B[:, None])


def top_spans(
    feature_index_B: Int64 | Sequence[int],
    start_logits_BL: Float32,
    end_logits_BL: Float32,
    context_start_B: Integers,
    context_end_B: Integers,
    cls_token_B: Integers,
    lengths_B: Integers,
    *,
    num_candidates: int,
    max_answer_length: int,
    search: str = "span",
    length_penalty: float = 0.0,
) -> CandidateTable:
    """What `top_spans.top_spans` gives for the same logits, float32, as tensors; see there.

    Raises:
        ScoringError: a logit is NaN or +inf.
    """
    check_settings(search, SEARCHES, num_candidates, max_answer_length)
    num_features, num_tokens = start_logits_BL.shape
    if not num_features:
        return CandidateTable.empty(num_candidates)
    context_start_B, context_end_B, null_B, lengths_B = (
        np.asarray(values, np.int64) for values in (context_start_B, context_end_B, cls_token_B, lengths_B)
    )
    is_token_BL = np.arange(num_tokens) < lengths_B[:, None]
    is_ordered_BL = (start_logits_BL < np.inf) & (end_logits_BL < np.inf)
    require_order(int((~(is_ordered_BL | ~is_token_BL)).any(axis=1).sum()), num_features)
    row_N = np.arange(num_features)
    null_start_logit_N, null_end_logit_N = start_logits_BL[row_N, null_B], end_logits_BL[row_N, null_B]
    if length_penalty:
        taken_L = np.arange(num_tokens, dtype=np.float32) * np.float32(length_penalty)
        start_logits_BL, end_logits_BL = start_logits_BL + taken_L, end_logits_BL - taken_L
    batch = Batch(start_logits_BL, end_logits_BL, context_start_B, np.minimum(context_end_B, lengths_B), is_token_BL)
    # What stands in the padding is added up as well, and left out.
    with np.errstate(over="ignore", invalid="ignore"):
        start_BK, end_BK = SEARCHES[search](batch, num_candidates, min(max_answer_length, num_tokens))
    start_NK, end_NK = (_filled_up(token_BK, num_candidates) for token_BK in (start_BK, end_BK))
    return CandidateTable(
        feature_index_N=np.asarray(feature_index_B, dtype=np.int64),
        start_token_NK=start_NK.astype(np.int32),
        end_token_NK=end_NK.astype(np.int32),
        start_logit_NK=_logits_at(start_logits_BL, start_NK),
        end_logit_NK=_logits_at(end_logits_BL, end_NK),
        null_start_logit_N=null_start_logit_N,
        null_end_logit_N=null_end_logit_N,
    )


def _logits_at(logits_BL: Float32, token_BX: Int64) -> Float32:
    """The logits of tokens; -inf where there is none."""
    found = np.take_along_axis(logits_BL, np.maximum(token_BX, 0), axis=1)
    return np.where(token_BX < 0, np.float32(-np.inf), found)


def _filled_up(token_BX: Int64, num_candidates: int) -> Int64:
    """The same with K columns: a search of short features finds fewer."""
    return np.pad(token_BX, ((0, 0), (0, num_candidates - token_BX.shape[1])), constant_values=-1)


def _sort_keys(score: Float32, tie: Int64, is_present: Bools) -> Int64:
    """int64 keys, larger for higher scores, then for smaller ties; the smallest int64 where nothing is present."""
    bits = (score + np.float32(0.0)).view(np.int32)
    key = (((bits >> 31) & 0x7FFFFFFF) ^ bits).astype(np.int64)
    return np.where(is_present, (key << 32) + (_TIE_LIMIT - tie), _ABSENT)


def _best(key: Int64, count: int) -> tuple[Int64, Bools]:
    """The tie-breaks of the best `count` keys of each row, best first, and which of them are present."""
    num_left_out = key.shape[1] - min(count, key.shape[1])
    if num_left_out:
        key = np.partition(key, num_left_out, axis=1)[:, num_left_out:]
    best = np.sort(key, axis=1)[:, ::-1]
    return _TIE_LIMIT - (best & _LOW_BITS), best != _ABSENT


def _padded(values_BL: Float32, count: int) -> Float32:
    return np.pad(values_BL, ((0, 0), (0, count)), constant_values=-np.inf)


def _forward_maximum(values_BL: Float32, window: int) -> Float32:
    """The maximum of values[i : i + window] at each i, with O(log window) operations on the whole array."""
    width = 1
    while width < window:
        shift = min(width, window - width)
        values_BL = np.maximum(values_BL, _padded(values_BL[:, shift:], shift))
        width += shift
    return values_BL


def all_spans(batch: Batch, num_candidates: int, max_answer_length: int) -> tuple[Int64, Int64]:
    """`searches.all_spans`: starts and ends, int64 [B, up to K], -1 where a feature has fewer spans."""
    num_features, num_tokens = batch.start_logits_BL.shape
    position_L = np.arange(num_tokens)
    in_context_BL = batch.in_context(position_L)
    end_logits_BL = np.where(in_context_BL, batch.end_logits_BL, np.float32(-np.inf))

    best_score_BL = batch.start_logits_BL + _forward_maximum(end_logits_BL, max_answer_length)
    start_BS, is_start_BS = _best(_sort_keys(best_score_BL, position_L, in_context_BL), num_candidates)
    # In the order of their positions, so that a span's place in [S, M] breaks ties by start, then length.
    start_BS = np.sort(np.where(is_start_BS, start_BS, num_tokens), axis=1)
    num_ends_BS = batch.context_end_B[:, None] - start_BS
    start_BS = np.minimum(start_BS, num_tokens - 1)

    reach = _padded(end_logits_BL, max_answer_length - 1)
    reach_BLM = np.lib.stride_tricks.sliding_window_view(reach, max_answer_length, axis=1)
    start_logit_BS = np.take_along_axis(batch.start_logits_BL, start_BS, axis=1)
    score_BSM = reach_BLM[np.arange(num_features)[:, None], start_BS] + start_logit_BS[:, :, None]
    is_span_BSM = np.arange(max_answer_length) < num_ends_BS[:, :, None]
    place_P = np.arange(start_BS.shape[1] * max_answer_length)
    key_BP = _sort_keys(score_BSM.reshape(num_features, -1), place_P, is_span_BSM.reshape(num_features, -1))
    place_BK, is_span_BK = _best(key_BP, num_candidates)
    place_BK = np.where(is_span_BK, place_BK, 0)
    start_BK = np.take_along_axis(start_BS, place_BK // max_answer_length, axis=1)
    end_BK = start_BK + place_BK % max_answer_length
    return np.where(is_span_BK, start_BK, -1), np.where(is_span_BK, end_BK, -1)


def paired_shortlists(batch: Batch, num_candidates: int, max_answer_length: int) -> tuple[Int64, Int64]:
    """`searches.paired_shortlists`: starts and ends, int64 [B, up to K], -1 where a feature has fewer spans."""
    num_features, num_tokens = batch.start_logits_BL.shape
    later_first_L = np.arange(num_tokens - 1, -1, -1)
    sides = []
    for logits_BL in (batch.start_logits_BL, batch.end_logits_BL):
        tie_BS, is_kept_BS = _best(_sort_keys(logits_BL, later_first_L, batch.is_token_BL), num_candidates)
        token_BS = num_tokens - 1 - np.where(is_kept_BS, tie_BS, 0)
        logit_BS = np.take_along_axis(logits_BL, token_BS, axis=1)
        sides.append((token_BS, batch.in_context(token_BS) & is_kept_BS, logit_BS))
    (start_BS, starts_in_BS, start_logit_BS), (end_BS, ends_in_BS, end_logit_BS) = sides

    num_kept = start_BS.shape[1]
    length_BSS = end_BS[:, None, :] - start_BS[:, :, None] + 1
    is_span_BSS = (length_BSS >= 1) & (length_BSS <= max_answer_length)
    is_span_BSS &= starts_in_BS[:, :, None] & ends_in_BS[:, None, :]
    score_BSS = start_logit_BS[:, :, None] + end_logit_BS[:, None, :]
    pair_P = np.arange(num_kept * num_kept)
    key_BP = _sort_keys(score_BSS.reshape(num_features, -1), pair_P, is_span_BSS.reshape(num_features, -1))
    pair_BK, is_pair_BK = _best(key_BP, num_candidates)
    pair_BK = np.where(is_pair_BK, pair_BK, 0)
    start_BK = np.take_along_axis(start_BS, pair_BK // num_kept, axis=1)
    end_BK = np.take_along_axis(end_BS, pair_BK % num_kept, axis=1)
    return np.where(is_pair_BK, start_BK, -1), np.where(is_pair_BK, end_BK, -1)


SEARCHES: Mapping[str, Callable[[Batch, int, int], tuple[Int64, Int64]]] = {
    "span": all_spans,
    "n_best": paired_shortlists,
}
"""The rows of `searches.SEARCHES`, in numpy: each takes the batch (B and L at least 1), K, and M, at most L."""
