"""From logits to candidate spans, and from candidate spans to answers.

`top_spans` runs where the logits are, on every rank, and keeps K candidates per feature. `CandidateTable` carries them
between ranks. `decode` runs once, on the table of the whole data set, and chooses one answer per example.

Every order in this file is total, so that results depend on the logits alone: not on the batch a feature was in, on
the padding, or on the rank that computed it.

Shapes: B features of a batch, N features of a data set, L tokens of a feature (padded), T tokens of all features,
K candidates of a feature, M longest answer, E examples, W entries of an n-best list.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Candidate, Feature, Prediction

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Mode = Literal["span", "n_best"]
MODES: tuple[Mode, ...] = ("span", "n_best")

# Sort keys are 64-bit integers: the score above, the tie-break below. Equal keys cannot occur, so a top-k that is not
# stable (torch.topk is not) still has one answer.
_TIE_LIMIT = 2**31 - 1
_LOW_BITS = 2**32 - 1
_ABSENT = -(2**63)
_LARGEST = float(np.finfo(np.float32).max)


# ---------------------------------------------------------------------------------------------------------------------
# Logits to candidates
# ---------------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True, eq=False)
class TopSpans:
    """The best K candidates of each feature of a batch, best first, on the device of the logits.

    Attributes:
        start_token_BK: int32, from the start of the feature; -1 where a feature has fewer than K candidates.
        end_token_BK: int32, inclusive; -1 where absent.
        start_logit_BK: float32; -inf where absent.
        end_logit_BK: float32; -inf where absent.
        null_start_logit_B: float32: the start logit of the token that stands for "no answer".
        null_end_logit_B: float32: its end logit.
    """

    start_token_BK: Tensor
    end_token_BK: Tensor
    start_logit_BK: Tensor
    end_logit_BK: Tensor
    null_start_logit_B: Tensor
    null_end_logit_B: Tensor

    def to_table(self, feature_index_B: Tensor | Int64 | Sequence[int]) -> "CandidateTable":
        """These candidates as numpy arrays, each row named by its position in the data set."""
        if isinstance(feature_index_B, Tensor):
            feature_index_B = feature_index_B.cpu().numpy()
        return CandidateTable(
            feature_index_N=np.asarray(feature_index_B, dtype=np.int64),
            start_token_NK=self.start_token_BK.cpu().numpy(),
            end_token_NK=self.end_token_BK.cpu().numpy(),
            start_logit_NK=self.start_logit_BK.cpu().numpy(),
            end_logit_NK=self.end_logit_BK.cpu().numpy(),
            null_start_logit_N=self.null_start_logit_B.cpu().numpy(),
            null_end_logit_N=self.null_end_logit_B.cpu().numpy(),
        )


def top_spans(
    start_logits_BL: Tensor,
    end_logits_BL: Tensor,
    context_start_B: Tensor,
    context_end_B: Tensor,
    cls_token_B: Tensor,
    *,
    num_candidates: int,
    max_answer_length: int,
    mode: Mode = "span",
    lengths_B: Tensor | None = None,
) -> TopSpans:
    """The best `num_candidates` spans of each feature, by start logit + end logit (float32 addition).

    A span lies in the context and has at most `max_answer_length` tokens.

    Mode "span" considers all such spans. Ties: earlier start first, then the shorter span.

    Mode "n_best" considers what `postprocess_qa_predictions` of the Hugging Face examples considers: pairs of one of
    the `num_candidates` best start tokens and one of the `num_candidates` best end tokens, both taken from the whole
    feature, question and special tokens included, so that a feature may be left with few candidates or none. That code
    ranks tokens by `np.argsort(logits)[-1 : -n - 1 : -1]`, whose order among equal logits numpy leaves open. Here it
    is the order of the stable sort: of equal logits the later token ranks first. Ties between pairs: the better ranked
    start first, then the better ranked end, which is the order in which that code lists them.

    Args:
        start_logits_BL: logits of any floating type; values at or beyond `lengths_B` are never read.
        end_logits_BL: likewise.
        context_start_B: first token of the context.
        context_end_B: one past the last token of the context.
        cls_token_B: the token that stands for "no answer".
        num_candidates: K.
        max_answer_length: M, in tokens.
        mode: which spans are considered.
        lengths_B: real tokens of each feature; by default all L.

    Raises:
        ScoringError: a logit is NaN or +inf.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
    if num_candidates < 1 or max_answer_length < 1:
        raise ValueError(
            f"num_candidates and max_answer_length must be at least 1, not {num_candidates} and {max_answer_length}."
        )
    num_features, num_tokens = start_logits_BL.shape
    device = start_logits_BL.device
    start_logits_BL, end_logits_BL = start_logits_BL.float(), end_logits_BL.float()
    context_start_B, context_end_B, cls_token_B = (
        tensor.to(device=device, dtype=torch.int64) for tensor in (context_start_B, context_end_B, cls_token_B)
    )
    if lengths_B is None:
        lengths_B = context_end_B.new_full((num_features,), num_tokens)
    lengths_B = lengths_B.to(device=device, dtype=torch.int64)
    context_end_B = torch.minimum(context_end_B, lengths_B)

    position_L = torch.arange(num_tokens, device=device)
    is_token_BL = position_L < lengths_B[:, None]
    _refuse_bad_logits(start_logits_BL, end_logits_BL, is_token_BL)

    max_answer_length = min(max_answer_length, max(num_tokens, 1))  # No span is longer than the feature.
    logits = (start_logits_BL, end_logits_BL)
    context = (context_start_B, context_end_B)
    if not num_features:
        start_BK = end_BK = position_L.new_full((0, num_candidates), -1)
    elif mode == "span":
        start_BK, end_BK = _all_spans(*logits, *context, num_candidates, max_answer_length)
    else:
        start_BK, end_BK = _paired_shortlists(*logits, *context, is_token_BL, num_candidates, max_answer_length)

    num_missing = num_candidates - start_BK.shape[1]
    if num_missing > 0:
        start_BK = torch.nn.functional.pad(start_BK, (0, num_missing), value=-1)
        end_BK = torch.nn.functional.pad(end_BK, (0, num_missing), value=-1)
    null_B1 = cls_token_B[:, None]
    return TopSpans(
        start_token_BK=start_BK.int(),
        end_token_BK=end_BK.int(),
        start_logit_BK=_logits_at(start_logits_BL, start_BK),
        end_logit_BK=_logits_at(end_logits_BL, end_BK),
        null_start_logit_B=start_logits_BL.gather(1, null_B1)[:, 0],
        null_end_logit_B=end_logits_BL.gather(1, null_B1)[:, 0],
    )


def _refuse_bad_logits(start_logits_BL: Tensor, end_logits_BL: Tensor, is_token_BL: Tensor) -> None:
    # Of values below +inf no sum is NaN, so that past this check scores have an order.
    inf = float("inf")
    is_good_BL = ((start_logits_BL < inf) & (end_logits_BL < inf)) | ~is_token_BL
    if not bool(is_good_BL.all()):
        num_bad = int((~is_good_BL.all(dim=1)).sum())
        raise ScoringError(
            f"{num_bad} of {len(is_good_BL)} features have logits that are NaN or +inf; the model diverged or its "
            "number format overflowed: check the adapter, or run in float32 or bfloat16."
        )


def _logits_at(logits_BL: Tensor, token_BK: Tensor) -> Tensor:
    if not logits_BL.shape[1]:
        return logits_BL.new_full(token_BK.shape, float("-inf"))
    return logits_BL.gather(1, token_BK.clamp(min=0)).masked_fill_(token_BK < 0, float("-inf"))


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


def _all_spans(
    start_logits_BL: Tensor,
    end_logits_BL: Tensor,
    context_start_B: Tensor,
    context_end_B: Tensor,
    num_candidates: int,
    max_answer_length: int,
) -> tuple[Tensor, Tensor]:
    """Starts and ends (inclusive) of the best spans of all, best first.

    Looking at the ends of K starts only is exact, ties included. Order spans by (score, start, length) and starts by
    (score of their best span, start). Let a start s' precede s in the order of starts. Then the best span of s'
    precedes every span of s: either its score is higher than all of theirs, or it equals the best of theirs and
    s' < s. So a span whose start is not among the first K starts has at least K spans before it. And the best score of
    a start is the start logit plus the largest end logit in reach, also after rounding, because float addition of a
    constant never reverses an order.
    """
    num_tokens = start_logits_BL.shape[1]
    position_L = torch.arange(num_tokens, device=start_logits_BL.device)
    in_context_BL = (position_L >= context_start_B[:, None]) & (position_L < context_end_B[:, None])
    end_logits_BL = end_logits_BL.masked_fill(~in_context_BL, float("-inf"))

    best_score_BL = start_logits_BL + _forward_maximum(end_logits_BL, max_answer_length)
    start_BS, is_start_BS = _best(_sort_keys(best_score_BL, position_L, in_context_BL), num_candidates, ordered=False)
    # In the order of their positions, so that a span's place in [S, M] breaks ties by start, then length. Absent
    # starts come last, as the position after the last.
    start_BS = start_BS.masked_fill_(~is_start_BS, num_tokens).sort(dim=1).values
    num_ends_BS = context_end_B[:, None] - start_BS
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


def _paired_shortlists(
    start_logits_BL: Tensor,
    end_logits_BL: Tensor,
    context_start_B: Tensor,
    context_end_B: Tensor,
    is_token_BL: Tensor,
    num_candidates: int,
    max_answer_length: int,
) -> tuple[Tensor, Tensor]:
    """Starts and ends (inclusive) of the best pairs of the two shortlists, best first."""
    num_tokens = start_logits_BL.shape[1]
    later_first_L = torch.arange(num_tokens - 1, -1, -1, device=start_logits_BL.device)
    sides = []
    for logits_BL in (start_logits_BL, end_logits_BL):
        tie_BS, is_kept_BS = _best(_sort_keys(logits_BL, later_first_L, is_token_BL), num_candidates)
        token_BS = num_tokens - 1 - tie_BS.masked_fill_(~is_kept_BS, 0)
        in_context_BS = (token_BS >= context_start_B[:, None]) & (token_BS < context_end_B[:, None]) & is_kept_BS
        sides.append((token_BS, in_context_BS, logits_BL.gather(1, token_BS)))
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


# ---------------------------------------------------------------------------------------------------------------------
# Candidates on their way between ranks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class CandidateTable:
    """Candidates of N features in any order, best first within a feature: what ranks send each other.

    Attributes:
        feature_index_N: int64: the position of each feature in the data set.
        start_token_NK: int32, from the start of the feature; -1 where a feature has fewer than K candidates.
        end_token_NK: int32, inclusive; -1 where absent.
        start_logit_NK: float32; -inf where absent.
        end_logit_NK: float32; -inf where absent.
        null_start_logit_N: float32: the start logit of the token that stands for "no answer".
        null_end_logit_N: float32: its end logit.
    """

    feature_index_N: Int64
    start_token_NK: Int32
    end_token_NK: Int32
    start_logit_NK: Float32
    end_logit_NK: Float32
    null_start_logit_N: Float32
    null_end_logit_N: Float32

    def __post_init__(self) -> None:
        rows = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(rows.values())) > 1:
            raise ValueError(f"the columns of a candidate table must have the same length, not {rows}.")

    def __len__(self) -> int:
        return len(self.feature_index_N)

    @property
    def num_candidates(self) -> int:
        """K."""
        return int(self.start_token_NK.shape[1])

    def candidates(self, row: int) -> list[Candidate]:
        """The candidates of one feature, best first."""
        return [
            Candidate(int(self.feature_index_N[row]), int(start), int(end), float(start_logit), float(end_logit))
            for start, end, start_logit, end_logit in zip(
                self.start_token_NK[row],
                self.end_token_NK[row],
                self.start_logit_NK[row],
                self.end_logit_NK[row],
                strict=True,
            )
            if start >= 0
        ]

    @classmethod
    def empty(cls, num_candidates: int) -> Self:
        """A table without features: what a rank with nothing to evaluate sends."""
        return cls(
            feature_index_N=np.zeros(0, np.int64),
            start_token_NK=np.zeros((0, num_candidates), np.int32),
            end_token_NK=np.zeros((0, num_candidates), np.int32),
            start_logit_NK=np.zeros((0, num_candidates), np.float32),
            end_logit_NK=np.zeros((0, num_candidates), np.float32),
            null_start_logit_N=np.zeros(0, np.float32),
            null_end_logit_N=np.zeros(0, np.float32),
        )

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        """One table of all the rows, in the order given.

        Raises:
            ValueError: no table, or tables of different K.
        """
        widths = sorted({table.num_candidates for table in tables})
        if len(widths) != 1:
            raise ValueError(f"tables to concatenate must have one number of candidates, not {widths}.")
        return cls(
            **{field.name: np.concatenate([getattr(table, field.name) for table in tables]) for field in fields(cls)}
        )

    def ordered(self, num_features: int) -> Self:
        """The table whose row i is feature i, for i in 0 .. num_features - 1.

        Raises:
            ScoringError: a feature is missing, appears twice, or is not of this data set.
        """
        index_N = self.feature_index_N
        strange = index_N[(index_N < 0) | (index_N >= num_features)]
        if len(strange):
            raise ScoringError(
                f"{len(strange)} rows name features outside 0 .. {num_features - 1} (first: {_some(strange)}); "
                "the candidates belong to another data set."
            )
        counts = np.bincount(index_N, minlength=num_features)
        missing, repeated = np.flatnonzero(counts == 0), np.flatnonzero(counts > 1)
        if len(missing) or len(repeated):
            raise ScoringError(
                f"every one of {num_features} features must be evaluated once: {len(missing)} missing "
                f"(first: {_some(missing)}), {len(repeated)} more than once (first: {_some(repeated)}); "
                "check how features are dealt to ranks."
            )
        row_N = np.argsort(index_N)
        return type(self)(**{field.name: getattr(self, field.name)[row_N] for field in fields(self)})


def _some(values: Int64) -> str:
    return ", ".join(str(value) for value in values[:5].tolist()) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Candidates to answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """Where the N features of a data set come from: what turns tokens back into characters.

    Attributes:
        example_index_N: int32: the example of each feature.
        window_N: int32: the position of each feature among the features of its example.
        context_start_N: int32: the first context token of each feature.
        context_offsets_T2: int32: start and end character of the context tokens of all features, one after the other.
        first_offset_N1: int64 [N + 1]: feature i owns rows first_offset[i] .. first_offset[i + 1] - 1 of those.
    """

    example_index_N: Int32
    window_N: Int32
    context_start_N: Int32
    context_offsets_T2: Int32
    first_offset_N1: Int64

    @classmethod
    def from_features(cls, features: Iterable[Feature]) -> Self:
        """The map of features at hand, in their order."""
        rows = list(features)
        lengths = [len(feature.context_offsets) for feature in rows]
        no_offsets = np.zeros((0, 2), np.int32)
        return cls(
            example_index_N=np.array([feature.example_index for feature in rows], np.int32),
            window_N=np.array([feature.window for feature in rows], np.int32),
            context_start_N=np.array([feature.context_start for feature in rows], np.int32),
            context_offsets_T2=np.concatenate([no_offsets, *(feature.context_offsets for feature in rows)]),
            first_offset_N1=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.example_index_N)

    def start_chars(self, feature: Int64, token: Int32) -> Int32:
        """The first character of the given tokens of the given features."""
        starts_T: Int32 = self.context_offsets_T2[:, 0]
        return starts_T[self._rows(feature, token)]

    def end_chars(self, feature: Int64, token: Int32) -> Int32:
        """One past the last character of the given tokens of the given features."""
        ends_T: Int32 = self.context_offsets_T2[:, 1]
        return ends_T[self._rows(feature, token)]

    def _rows(self, feature: Int64, token: Int32) -> Int64:
        row = self.first_offset_N1[feature] + token - self.context_start_N[feature]
        if np.any((row < self.first_offset_N1[feature]) | (row >= self.first_offset_N1[feature + 1])):
            raise ScoringError(
                "candidates lie outside their contexts; they were computed from other features than these."
            )
        return row


@dataclass(frozen=True, slots=True)
class ExampleAnswer:
    """The answer to one example.

    Attributes:
        id: the example's id.
        prediction: the answer chosen.
        nbest: the n-best list it was chosen from, best first, the null answer included where it was considered.
        null_odds: score of the null answer minus score of the best non-null answer; None without unanswerables.
    """

    id: str
    prediction: Prediction
    nbest: tuple[Prediction, ...]
    null_odds: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers to E examples: texts at once, n-best lists when asked for.

    A list of 20 predictions for each of 10,570 examples costs more to build than all the rest of decoding, and most
    callers want the texts alone.

    Attributes:
        example_ids: the ids, in the order of the examples.
        contexts: their contexts.
        texts: the answer chosen for each example; "" is no answer.
        chosen_E: the entry of the n-best list that was chosen.
        num_entries_E: number of entries of each n-best list.
        start_char_EW: int32; -1 for the null answer.
        end_char_EW: int32, exclusive; -1 for the null answer.
        score_EW: float32, descending, except that a null answer below the list stands at its end.
        probability_EW: float64: softmax of the scores of the list; 0 beyond it.
        null_odds_E: float32, or None without unanswerables.
    """

    example_ids: Sequence[str]
    contexts: Sequence[str]
    texts: list[str]
    chosen_E: Int64
    num_entries_E: Int64
    start_char_EW: Int32
    end_char_EW: Int32
    score_EW: Float32
    probability_EW: Float64
    null_odds_E: Float32 | None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> ExampleAnswer:
        if not 0 <= index < len(self):
            raise IndexError(f"no answer {index} among {len(self)}")
        nbest = tuple(self.nbest(index))
        return ExampleAnswer(
            id=self.example_ids[index],
            prediction=nbest[self.chosen_E[index]],
            nbest=nbest,
            null_odds=None if self.null_odds_E is None else float(self.null_odds_E[index]),
        )

    def __iter__(self) -> Iterator[ExampleAnswer]:
        return (self[index] for index in range(len(self)))

    def nbest(self, index: int) -> list[Prediction]:
        """The n-best list of an example, best first."""
        context = self.contexts[index]
        count = self.num_entries_E[index]
        return [
            Prediction(context[start:end] if start >= 0 else "", score, probability, start, end)
            for start, end, score, probability in zip(
                self.start_char_EW[index, :count].tolist(),
                self.end_char_EW[index, :count].tolist(),
                self.score_EW[index, :count].tolist(),
                self.probability_EW[index, :count].tolist(),
                strict=True,
            )
        ]

    def predictions(self) -> dict[str, str]:
        """The text of each example by id: the official predictions file."""
        return dict(zip(self.example_ids, self.texts, strict=True))

    def null_odds(self) -> dict[str, float] | None:
        """The null odds of each example by id: the official scripts' no-answer file; None without unanswerables."""
        if self.null_odds_E is None:
            return None
        return dict(zip(self.example_ids, self.null_odds_E.tolist(), strict=True))


def decode(
    table: CandidateTable,
    features: FeatureMap,
    contexts: Sequence[str],
    example_ids: Sequence[str],
    *,
    n_best_size: int,
    version_2: bool,
    null_score_diff_threshold: float = 0.0,
) -> Answers:
    """One answer per example, chosen from the candidates of all its windows.

    Candidates are ordered by score, then window, then their order within the feature (see `top_spans`); the best
    `n_best_size` make the n-best list. With candidates of mode "n_best" the texts are those of
    `postprocess_qa_predictions` of the Hugging Face examples, except where that code invents the answer "empty", takes
    a zero-width token at character 0 for the null answer, or (`n_best_size` 1) drops the best span from its list.

    Without unanswerables (`version_2` false) the answer is the best candidate. An example without any, such as one
    whose context has no tokens, gets the null answer: text "", characters -1.

    With unanswerables the null answer of an example scores the minimum over its windows of the summed logits of the
    "no answer" token, since each window has to agree that it holds no answer. It joins the n-best list after
    candidates of equal score, and at the end if it is not among the best. Null odds are its score minus the start
    logit minus the end logit of the best candidate with a text, in float32 from left to right; the null answer is
    chosen if they exceed `null_score_diff_threshold`. Where there is no such candidate it is chosen always, and the
    odds are the largest float32, so that files of them stay valid JSON.

    Args:
        table: candidates; row i is feature i (`CandidateTable.ordered`).
        features: where the features come from.
        contexts: the context of each example.
        example_ids: the id of each example.
        n_best_size: length of the n-best list, at most the K of the table: more could miss a candidate.
        version_2: whether the null answer is a choice.
        null_score_diff_threshold: how much better than the best candidate the null answer must be.

    Raises:
        ScoringError: table, features and examples do not belong together.
    """
    num_examples = len(example_ids)
    _check_parts(table, features, contexts, example_ids, n_best_size)

    # Features in the order (example, window), which data sets usually have already.
    row_N = np.lexsort((features.window_N, features.example_index_N))
    example_N = features.example_index_N[row_N].astype(np.int64)
    _check_windows(example_N, features.window_N[row_N], example_ids)
    first_row_E = np.searchsorted(example_N, np.arange(num_examples))

    null_score_N = _add(table.null_start_logit_N, table.null_end_logit_N)[row_N]
    null_score_E = np.minimum.reduceat(null_score_N, first_row_E) if num_examples else null_score_N

    # All entries flat: candidates in the order (example, window, rank), then null answers.
    start_token_NK = table.start_token_NK[row_N]
    order_C, rank_C = np.nonzero(start_token_NK >= 0)
    feature_C = row_N[order_C]
    start_logit_C, end_logit_C = table.start_logit_NK[feature_C, rank_C], table.end_logit_NK[feature_C, rank_C]
    candidate_example_C = example_N[order_C]
    is_null_choice_E = np.ones(num_examples, bool)
    if not version_2:
        is_null_choice_E[candidate_example_C] = False
    null_example = np.flatnonzero(is_null_choice_E)

    num_candidates = len(order_C)
    example = np.concatenate([candidate_example_C, null_example])
    score = np.concatenate([_add(start_logit_C, end_logit_C), null_score_E[null_example]])
    # Stable: of equal scores, candidates keep their order and the null answer comes last.
    by_rank = np.argsort((example << 32) - _ordered_bits(score), kind="stable")
    example_F = example[by_rank]
    is_null_F = by_rank >= num_candidates
    column_F = np.arange(len(by_rank)) - np.searchsorted(example_F, np.arange(num_examples))[example_F]
    keep_F = (column_F < n_best_size) | is_null_F
    column_F = np.minimum(column_F, n_best_size)

    width = n_best_size + int(version_2)
    start_char_EW = np.full((num_examples, width), -1, np.int32)
    end_char_EW = np.full((num_examples, width), -1, np.int32)
    score_EW = np.full((num_examples, width), -np.inf, np.float32)
    num_entries_E = np.bincount(example_F[keep_F], minlength=num_examples)
    score_EW[example_F[keep_F], column_F[keep_F]] = score[by_rank[keep_F]]

    is_span_F = keep_F & ~is_null_F
    candidate = by_rank[is_span_F]
    place = (example_F[is_span_F], column_F[is_span_F])
    feature, rank = feature_C[candidate], rank_C[candidate]
    start_char_EW[place] = features.start_chars(feature, table.start_token_NK[feature, rank])
    end_char_EW[place] = features.end_chars(feature, table.end_token_NK[feature, rank])

    chosen_E = np.zeros(num_examples, np.int64)
    null_odds_E = None
    if version_2:
        candidate_EW = np.zeros((num_examples, width), np.int64)
        candidate_EW[place] = candidate
        has_text_EW = end_char_EW > start_char_EW
        best_E = has_text_EW.argmax(axis=1)
        has_text_E = has_text_EW.any(axis=1)
        best_candidate = candidate_EW[np.flatnonzero(has_text_E), best_E[has_text_E]]
        with np.errstate(over="ignore", invalid="ignore"):
            odds = null_score_E[has_text_E] - start_logit_C[best_candidate] - end_logit_C[best_candidate]
        null_odds_E = np.full(num_examples, _LARGEST, np.float32)
        null_odds_E[has_text_E] = np.nan_to_num(odds, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
        null_column_E = np.zeros(num_examples, np.int64)
        null_column_E[example_F[is_null_F]] = column_F[is_null_F]
        chosen_E = np.where((null_odds_E > null_score_diff_threshold) | ~has_text_E, null_column_E, best_E)

    each_E = np.arange(num_examples)
    texts = [
        context[start:end] if start >= 0 else ""
        for context, start, end in zip(
            contexts, start_char_EW[each_E, chosen_E].tolist(), end_char_EW[each_E, chosen_E].tolist(), strict=True
        )
    ]
    return Answers(
        example_ids=example_ids,
        contexts=contexts,
        texts=texts,
        chosen_E=chosen_E,
        num_entries_E=num_entries_E,
        start_char_EW=start_char_EW,
        end_char_EW=end_char_EW,
        score_EW=score_EW,
        probability_EW=_softmax(score_EW, num_entries_E),
        null_odds_E=null_odds_E,
    )


def _check_parts(
    table: CandidateTable, features: FeatureMap, contexts: Sequence[str], example_ids: Sequence[str], n_best_size: int
) -> None:
    if not 1 <= n_best_size <= table.num_candidates:
        raise ScoringError(
            f"n_best_size is {n_best_size}, but {table.num_candidates} candidates of each feature were kept; "
            f"choose 1 to {table.num_candidates}, or keep more candidates."
        )
    if len(table) != len(features) or not np.array_equal(table.feature_index_N, np.arange(len(features))):
        raise ScoringError(
            f"the candidates are not those of features 0 .. {len(features) - 1} in this order; "
            "put them in order with CandidateTable.ordered first."
        )
    if len(contexts) != len(example_ids):
        raise ScoringError(f"{len(contexts)} contexts were given for {len(example_ids)} examples.")
    if len(set(example_ids)) != len(example_ids):
        raise ScoringError(f"{len(example_ids) - len(set(example_ids))} example ids occur more than once.")


def _check_windows(example_N: Int64, window_N: Int32, example_ids: Sequence[str]) -> None:
    """Checks features sorted by (example, window)."""
    if len(example_N) and not (example_N[0] >= 0 and example_N[-1] < len(example_ids)):
        raise ScoringError(
            f"features name the examples {example_N[0]} .. {example_N[-1]}, but there are {len(example_ids)} examples."
        )
    without = np.flatnonzero(np.bincount(example_N, minlength=len(example_ids)) == 0)
    if len(without):
        raise ScoringError(
            f"{len(without)} examples have no feature (first: {example_ids[without[0]]!r}); "
            "the features were made from other examples."
        )
    is_repeated = (example_N[1:] == example_N[:-1]) & (window_N[1:] == window_N[:-1])
    if is_repeated.any():
        first = int(np.flatnonzero(is_repeated)[0])
        raise ScoringError(
            f"window {window_N[first]} of example {example_ids[example_N[first]]!r} occurs more than once; "
            "every window has to be its own feature."
        )


def _add(start_logit: Float32, end_logit: Float32) -> Float32:
    # Sums beyond float32 become infinite, as in torch, and keep their order: no reason for a warning.
    with np.errstate(over="ignore"):
        return start_logit + end_logit


def _ordered_bits(score: Float32) -> Int64:
    """Integers in the order of the scores; see `_sort_keys`."""
    bits = (score + np.float32(0.0)).view(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)


def _softmax(score_EW: Float32, num_entries_E: Int64) -> Float64:
    """Softmax over the entries of each row, in float64; 0 beyond them."""
    is_entry_EW = np.arange(score_EW.shape[1]) < num_entries_E[:, None]
    finite_EW = np.clip(score_EW.astype(np.float64), -_LARGEST, _LARGEST)
    largest_E1 = np.where(is_entry_EW, finite_EW, -_LARGEST).max(axis=1, keepdims=True, initial=-_LARGEST)
    power_EW = np.where(is_entry_EW, np.exp(finite_EW - largest_E1), 0.0)
    total_E1 = power_EW.sum(axis=1, keepdims=True)
    return np.asarray(power_EW / total_E1, dtype=np.float64)
