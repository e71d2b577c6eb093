"""Features as columns in memory or mapped: what batches are made of, and what turns tokens back into characters.

Shapes: N features, L tokens of a feature, C context tokens of a feature, T tokens of some features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Int8, Int32, Int64
from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Feature
from qa_dist.features.windows import FeatureColumns


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


class FeatureTable:
    """N features, wherever their columns lie.

    Attributes:
        num_features: N.
        lengths: int32 [N], tokens of each feature.
        context_length: int32 [N], context tokens of each feature.
        example_index: int32 [N]; this and the following are as in `Feature`.
        window: int32 [N].
        context_start: int32 [N].
        cls_token: int32 [N].
        start_token: int32 [N].
        end_token: int32 [N].
    """

    num_features: int
    lengths: Int32
    context_length: Int32
    example_index: Int32
    window: Int32
    context_start: Int32
    cls_token: Int32
    start_token: Int32
    end_token: Int32
    _first_token: Int64
    _first_offset: Int64
    _input_ids: Int32
    _token_type_ids: Int8
    _context_offsets: Int32

    @classmethod
    def of(cls, columns: FeatureColumns) -> "FeatureTable":
        """A table of these columns, which it keeps as they are."""
        table = FeatureTable()
        table.num_features = len(columns.lengths)
        table.lengths, table.context_length = columns.lengths, columns.context_lengths
        table.example_index, table.window = columns.example_index, columns.window
        table.context_start, table.cls_token = columns.context_start, columns.cls_token
        table.start_token, table.end_token = columns.start_token, columns.end_token
        table._input_ids, table._token_type_ids = columns.input_ids, columns.token_type_ids
        table._context_offsets = columns.context_offsets
        table._first_token = np.concatenate([[0], np.cumsum(columns.lengths, dtype=np.int64)])
        table._first_offset = np.concatenate([[0], np.cumsum(columns.context_lengths, dtype=np.int64)])
        return table

    def feature(self, feature_index: int) -> Feature:
        """A feature by its number, counted from 0; its arrays are views.

        Raises:
            IndexError: There is none of that number.
        """
        if not 0 <= feature_index < self.num_features:
            raise IndexError(f"no feature {feature_index} among {self.num_features}")
        first, end = self._first_offset[feature_index : feature_index + 2].tolist()
        return Feature(
            example_index=int(self.example_index[feature_index]),
            window=int(self.window[feature_index]),
            input_ids=self.input_ids(feature_index),
            token_type_ids=self.token_type_ids(feature_index),
            context_start=int(self.context_start[feature_index]),
            context_offsets=self._context_offsets[first:end],
            cls_token=int(self.cls_token[feature_index]),
            start_token=int(self.start_token[feature_index]),
            end_token=int(self.end_token[feature_index]),
        )

    def input_ids(self, feature_index: int) -> Int32:
        """Token ids int32 [L] of a feature, a view."""
        return self._input_ids[self._first_token[feature_index] : self._first_token[feature_index + 1]]

    def token_type_ids(self, feature_index: int) -> Int8:
        """Token types int8 [L] of a feature, a view."""
        return self._token_type_ids[self._first_token[feature_index] : self._first_token[feature_index + 1]]

    def flat(self, feature_indices: npt.NDArray[np.integer[Any]] | Sequence[int]) -> tuple[Int32, Int8]:
        """Token ids int32 [T] and token types int8 [T] of the given features, one behind the other, as copies."""
        chosen = np.asarray(feature_indices, np.int64)
        lengths = self.lengths[chosen].astype(np.int64)
        # Token j of the result is token j - (tokens of the features before it) of its feature.
        shift = self._first_token[chosen] - (np.cumsum(lengths) - lengths)
        positions = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return self._input_ids[positions], self._token_type_ids[positions]

    @cached_property
    def largest_token_id(self) -> int:
        """The largest token id of all features; reads the whole column."""
        return int(self._input_ids.max(initial=0))

    def feature_map(self) -> FeatureMap:
        """Where all features come from, for decoding; its arrays are views."""
        return FeatureMap(
            example_index_N=self.example_index,
            window_N=self.window,
            context_start_N=self.context_start,
            context_offsets_T2=self._context_offsets,
            first_offset_N1=self._first_offset,
        )
