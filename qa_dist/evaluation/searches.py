"""Searches: which spans of a feature are candidates, and in what order.

Every order is total, so that candidates depend on the logits alone: not on the batch a feature was in, on the padding,
or on the rank that computed it.

Shapes: B features of a batch, L tokens of a feature (padded), K candidates of a feature, M longest answer, S starts or
ends kept, P spans ranked.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class SearchBatch(NamedTuple):
    """What a search looks at.

    Attributes:
        start_logits_BL: float32; what stands behind a feature's tokens may be anything.
        end_logits_BL: likewise.
        context_start_B: int64, first token of the context.
        context_end_B: int64, one past its last token; not beyond the feature's tokens.
        is_token_BL: bool, whether there is a token and not padding.
    """

    start_logits_BL: Tensor
    end_logits_BL: Tensor
    context_start_B: Tensor
    context_end_B: Tensor
    is_token_BL: Tensor

    def in_context(self, token_BX: Tensor) -> Tensor:
        """Whether tokens lie in the contexts of their features, bool [B, X]."""
        return (token_BX >= self.context_start_B[:, None]) & (token_BX < self.context_end_B[:, None])


Search = Callable[[SearchBatch, int, int], tuple[Tensor, Tensor]]
"""The starts and ends (inclusive) of the best spans, best first, int64 [B, up to K], -1 where a feature has fewer.

Takes the batch (B and L at least 1), K, and M, which is at most L.
"""

# Sort keys are 64-bit integers: the score above, the tie-break below. Equal keys cannot occur, so a top-k that is not
# stable (torch.topk is not) still has one answer.
_TIE_LIMIT = 2**31 - 1
_LOW_BITS = 2**32 - 1
_ABSENT = -(2**63)


def _sort_keys(score: Tensor, tie: Tensor, is_present: Tensor) -> Tensor:
    """int64 keys, larger for higher scores, then for smaller ties; the smallest int64 where nothing is present.

    The bits of a float32, read as an integer, order positive numbers; flipping all but the sign orders negative ones.
    Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0.
    """
    bits = (score + 0.0).view(torch.int32)
    key = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    key.bitwise_left_shift_(32).add_(_TIE_LIMIT - tie)
    return key.masked_fill_(~is_present, _ABSENT)


def _best(key: Tensor, count: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The tie-breaks of the best `count` keys of each row, and which of them are present."""
    best = key.topk(min(count, key.shape[1]), dim=1, sorted=ordered).values
    return _TIE_LIMIT - (best & _LOW_BITS), best != _ABSENT


def _forward_maximum(values_BL: Tensor, window: int) -> Tensor:
    """The maximum of values[i : i + window] at each i, with O(log window) operations on the whole tensor."""
    width = 1
    while width < window:
        shift = min(width, window - width)
        shifted_BL = torch.nn.functional.pad(values_BL[:, shift:], (0, shift), value=float("-inf"))
        values_BL = torch.maximum(values_BL, shifted_BL)
        width += shift
    return values_BL


def all_spans(batch: SearchBatch, num_candidates: int, max_answer_length: int) -> tuple[Tensor, Tensor]:
    """The best of all spans in the context. Ties: earlier start first, then the shorter span.

    Looking at the ends of K starts only is exact, ties included. Order spans by (score, start, length) and starts by
    (score of their best span, start). Let a start s' precede s in the order of starts. Then the best span of s'
    precedes every span of s: either its score is higher than all of theirs, or it equals the best of theirs and
    s' < s. So a span whose start is not among the first K starts has at least K spans before it. And the best score of
    a start is the start logit plus the largest end logit in reach, also after rounding, because float addition of a
    constant never reverses an order.
    """
    start_logits_BL = batch.start_logits_BL
    num_tokens = start_logits_BL.shape[1]
    position_L = torch.arange(num_tokens, device=start_logits_BL.device)
    in_context_BL = batch.in_context(position_L)
    end_logits_BL = batch.end_logits_BL.masked_fill(~in_context_BL, float("-inf"))

    best_score_BL = start_logits_BL + _forward_maximum(end_logits_BL, max_answer_length)
    start_BS, is_start_BS = _best(_sort_keys(best_score_BL, position_L, in_context_BL), num_candidates, ordered=False)
    # In the order of their positions, so that a span's place in [S, M] breaks ties by start, then length. Absent
    # starts come last, as the position after the last.
    start_BS = start_BS.masked_fill_(~is_start_BS, num_tokens).sort(dim=1).values
    num_ends_BS = batch.context_end_B[:, None] - start_BS
    start_BS = start_BS.clamp_(max=num_tokens - 1)

    # [B, S, M]: the ends in reach of each of the S <= K starts kept. The view is not copied, its rows are.
    step_M = torch.arange(max_answer_length, device=start_BS.device)
    reach_BLM = torch.nn.functional.pad(end_logits_BL, (0, max_answer_length - 1)).unfold(1, max_answer_length, 1)
    row_B1 = torch.arange(len(start_BS), device=start_BS.device)[:, None]
    score_BSM = reach_BLM[row_B1, start_BS].add_(start_logits_BL.gather(1, start_BS)[:, :, None])
    is_span_BSM = step_M < num_ends_BS[:, :, None]
    place_P = torch.arange(start_BS.shape[1] * max_answer_length, device=start_BS.device)
    place_BK, is_span_BK = _best(_sort_keys(score_BSM.flatten(1), place_P, is_span_BSM.flatten(1)), num_candidates)
    place_BK = place_BK.masked_fill_(~is_span_BK, 0)
    start_BK = start_BS.gather(1, place_BK // max_answer_length)
    end_BK = (start_BK + place_BK % max_answer_length).masked_fill_(~is_span_BK, -1)
    return start_BK.masked_fill_(~is_span_BK, -1), end_BK


def paired_shortlists(batch: SearchBatch, num_candidates: int, max_answer_length: int) -> tuple[Tensor, Tensor]:
    """The best of what `postprocess_qa_predictions` of the Hugging Face examples considers.

    These are the pairs of one of the `num_candidates` best start tokens and one of the `num_candidates` best end
    tokens, both taken from the whole feature, question and special tokens included, so that a feature may be left with
    few candidates or none. That code ranks tokens by `np.argsort(logits)[-1 : -n - 1 : -1]`, whose order among equal
    logits numpy leaves open. Here it is the order of the stable sort: of equal logits the later token ranks first. Ties
    between pairs: the better ranked start first, then the better ranked end, which is the order in which that code
    lists them.
    """
    num_tokens = batch.start_logits_BL.shape[1]
    later_first_L = torch.arange(num_tokens - 1, -1, -1, device=batch.start_logits_BL.device)
    sides = []
    for logits_BL in (batch.start_logits_BL, batch.end_logits_BL):
        tie_BS, is_kept_BS = _best(_sort_keys(logits_BL, later_first_L, batch.is_token_BL), num_candidates)
        token_BS = num_tokens - 1 - tie_BS.masked_fill_(~is_kept_BS, 0)
        sides.append((token_BS, batch.in_context(token_BS) & is_kept_BS, logits_BL.gather(1, token_BS)))
    (start_BS, starts_in_BS, start_logit_BS), (end_BS, ends_in_BS, end_logit_BS) = sides

    num_kept = start_BS.shape[1]
    length_BSS = end_BS[:, None, :] - start_BS[:, :, None] + 1
    is_span_BSS = (length_BSS >= 1) & (length_BSS <= max_answer_length)
    is_span_BSS &= starts_in_BS[:, :, None] & ends_in_BS[:, None, :]
    score_BSS = start_logit_BS[:, :, None] + end_logit_BS[:, None, :]
    pair_P = torch.arange(num_kept * num_kept, device=start_BS.device)
    key_BP = _sort_keys(score_BSS.flatten(1), pair_P, is_span_BSS.flatten(1))
    pair_BK, is_pair_BK = _best(key_BP, num_candidates)
    pair_BK = pair_BK.masked_fill_(~is_pair_BK, 0)
    start_BK = start_BS.gather(1, pair_BK // num_kept).masked_fill_(~is_pair_BK, -1)
    end_BK = end_BS.gather(1, pair_BK % num_kept).masked_fill_(~is_pair_BK, -1)
    return start_BK, end_BK


SEARCHES: Mapping[str, Search] = {
    # Reads logits of the context alone.
    "span": all_spans,
    # Reads those of the question and the special tokens too.
    "n_best": paired_shortlists,
}
"""How candidates are found, by the name that `--decoding` has for it. A search needs a row here, the same in numpy
(`numpy_searches`), its name among the values of `EvaluationConfig.decoding` with a clause in the help, and an oracle in
its test."""
