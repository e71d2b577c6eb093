"""From logits to candidates: the best spans of every feature, in a table.

`top_spans` runs where the logits are, on every rank, and keeps K candidates per feature. `CandidateTable` carries them
between ranks.

Shapes: B features of a batch, N features of a data set, L tokens of a feature (padded), T tokens of all features,
K candidates of a feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Candidate
from qa_dist.evaluation.searches import SEARCHES, SearchBatch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


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
) -> "CandidateTable":
    """The best `num_candidates` spans of each feature, by start logit + end logit (float32 addition).

    A span lies in the context and has at most `max_answer_length` tokens. Which spans are considered, and which of
    equal ones come first, is up to the search.

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

    Raises:
        ScoringError: a logit is NaN or +inf.
    """
    _check_settings(search, num_candidates, max_answer_length)
    num_features, num_tokens = start_logits_BL.shape
    if not num_features:
        return CandidateTable.empty(num_candidates)
    start_logits_BL, end_logits_BL = start_logits_BL.float(), end_logits_BL.float()
    context_start_B, context_end_B, null_B, lengths_B = (
        tensor.to(device=start_logits_BL.device, dtype=torch.int64)
        for tensor in (context_start_B, context_end_B, cls_token_B, lengths_B)
    )
    is_token_BL = torch.arange(num_tokens, device=lengths_B.device) < lengths_B[:, None]
    batch = SearchBatch(
        start_logits_BL, end_logits_BL, context_start_B, torch.minimum(context_end_B, lengths_B), is_token_BL
    )
    # No span is longer than the feature.
    start_BK, end_BK = SEARCHES[search](batch, num_candidates, min(max_answer_length, num_tokens))
    start_NK, end_NK, start_logit_NK, end_logit_NK, null_start, null_end, is_bad = _on_host(
        _filled_up(start_BK, num_candidates, -1),
        _filled_up(end_BK, num_candidates, -1),
        _filled_up(_logits_at(start_logits_BL, start_BK), num_candidates, float("-inf")),
        _filled_up(_logits_at(end_logits_BL, end_BK), num_candidates, float("-inf")),
        start_logits_BL.gather(1, null_B[:, None]),
        end_logits_BL.gather(1, null_B[:, None]),
        _are_bad(start_logits_BL, end_logits_BL, is_token_BL)[:, None],
    )
    if num_bad := int(is_bad.sum()):
        raise ScoringError(
            f"{num_bad} of {num_features} features have logits that are NaN or +inf; the model diverged or its "
            "number format overflowed: check the adapter, or run in float32 or bfloat16."
        )
    return CandidateTable(
        feature_index_N=np.asarray(feature_index_B, dtype=np.int64),
        start_token_NK=start_NK,
        end_token_NK=end_NK,
        start_logit_NK=start_logit_NK,
        end_logit_NK=end_logit_NK,
        null_start_logit_N=null_start[:, 0],
        null_end_logit_N=null_end[:, 0],
    )


def _check_settings(search: str, num_candidates: int, max_answer_length: int) -> None:
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, not {search!r}.")
    if num_candidates < 1 or max_answer_length < 1:
        raise ValueError(
            f"num_candidates and max_answer_length must be at least 1, not {num_candidates} and {max_answer_length}."
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
        """Candidates kept of every feature, K."""
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
