"""The best spans of every feature, in a table: what a search finds, ranks send each other, and answers are made of.

torch is not imported, so that answers can be made where it is not installed.

Shapes: N features of a data set, K candidates of a feature.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from qa_dist.common.arrays import Float32, Int32, Int64
from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Candidate


def check_settings(search: str, known: Collection[str], num_candidates: int, max_answer_length: int) -> None:
    """Check what spans are searched for with.

    Raises:
        ValueError: The search is none of the known ones, or a number is below 1.
    """
    if search not in known:
        raise ValueError(f"search must be one of {', '.join(known)}, not {search!r}.")
    if num_candidates < 1 or max_answer_length < 1:
        raise ValueError(
            f"num_candidates and max_answer_length must be at least 1, not {num_candidates} and {max_answer_length}."
        )


def require_order(num_bad: int, num_features: int) -> None:
    """Refuse logits whose sums have no order, given how many of the features have any.

    Raises:
        ScoringError: There are some.
    """
    if num_bad:
        raise ScoringError(
            f"{num_bad} of {num_features} features have logits that are NaN or +inf; the model diverged or its "
            "number format overflowed: check the adapter, or run in float32 or bfloat16."
        )


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
