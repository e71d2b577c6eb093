"""Batches of few sizes, for what must be the same size each time: the rest of a row is features that count for nothing.

A row of T tokens goes into the smallest bucket that holds it. What is left of the bucket is one or more dummy features
of weight 0, and slots without a feature have no tokens: no feature sees them, and neither losses nor gradients change
but for rounding. Everything that a pass reads is one tensor of the device, whose size its bucket alone decides.

Legend: B features, S slots for features, T tokens of the bucket, L the most tokens of a feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qa_dist.common.arrays import Indices
from qa_dist.features.collate import on_device
from qa_dist.features.rows import Row, num_row_numbers, row_numbers
from qa_dist.features.table import FeatureTable

TOKEN_STEP = 256
"""Tokens between neighbouring buckets of up to 16,384: half of it is computed for nothing, on average."""

_FINEST = 32
"""Larger buckets are at least this share of the largest power of two in them apart, so that there are not many."""

_MIN_SLOTS = 8


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size of batch: tokens, slots for features, and the most tokens that a feature may have."""

    tokens: int
    slots: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, longest: int, max_tokens: int) -> "Bucket":
        """The bucket of features of these lengths; it has no more than `max_tokens`, unless they have."""
        num_tokens = sum(lengths)
        step = max(TOKEN_STEP, (1 << (num_tokens.bit_length() - 1)) // _FINEST)
        tokens = min(-(-num_tokens // step) * step, max(max_tokens, num_tokens))
        taken = len(lengths) + -(-(tokens - num_tokens) // longest)
        return cls(tokens, max(_MIN_SLOTS, 1 << (taken - 1).bit_length()), longest)

    def fill(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each slot: the features', the dummy features', and none."""
        rest = self.tokens - sum(lengths)
        dummies = [min(self.longest, rest - done) for done in range(0, rest, self.longest)]
        return (*lengths, *dummies, *[0] * (self.slots - len(lengths) - len(dummies)))

    @property
    def sizes(self) -> list[int]:
        """Numbers of each part of a `BucketBatch`: ids, types, layout of the row, labels, weights."""
        row = num_row_numbers(self.slots, self.tokens, self.longest)
        return [self.tokens, self.tokens, row, 2 * self.slots, self.slots]


@dataclass(frozen=True, slots=True, eq=False)
class BucketInputs:
    """What a pass reads: views of a `BucketBatch`'s numbers, wherever they are.

    Attributes:
        input_ids_T: int64 [T].
        token_type_ids_T: int64 [T].
        row: the layout of all slots.
        labels_S2: int64 [S, 2].
        weights_S: float64 [S], what the gradient of each loss is multiplied with.
    """

    input_ids_T: torch.Tensor
    token_type_ids_T: torch.Tensor
    row: Row
    labels_S2: torch.Tensor
    weights_S: torch.Tensor

    @classmethod
    def within(cls, numbers: torch.Tensor, bucket: Bucket) -> "BucketInputs":
        """The inputs whose numbers these are."""
        ids_T, types_T, row, labels, weights = torch.split(numbers, bucket.sizes)
        return cls(
            input_ids_T=ids_T,
            token_type_ids_T=types_T,
            row=Row.at(row, num_features=bucket.slots, num_tokens=bucket.tokens, longest=bucket.longest),
            labels_S2=labels.view(-1, 2),
            weights_S=weights.view(torch.float64),
        )


@dataclass(frozen=True, slots=True, eq=False)
class BucketBatch:
    """Features of a pass, in a bucket.

    Attributes:
        bucket: its size.
        num_features: B, the slots that count, which are the first.
        numbers: int64 [sum of `bucket.sizes`] on the device.
        places_B: int64 [B] on the device, the features' places in the global batch.
    """

    bucket: Bucket
    num_features: int
    numbers: torch.Tensor
    places_B: torch.Tensor

    @classmethod
    def several(
        cls,
        store: FeatureTable,
        groups: Sequence[tuple[Indices, Indices]],
        weights: Sequence[float],
        device: torch.device,
        *,
        longest: int,
        max_tokens: int,
    ) -> list["BucketBatch"]:
        """A batch of each group of features; all of them go to the device together.

        Args:
            store: The features.
            groups: For each batch the features' places in the store, and in their global batch, both int64 [B].
            weights: What the gradient of each feature's loss is multiplied with, for each batch.
            device: Where the tensors are to be.
            longest: The most tokens that a feature may have.
            max_tokens: The most that a bucket may have.
        """
        buckets = [
            Bucket.of(store.lengths[indices].tolist(), longest=longest, max_tokens=max_tokens) for indices, _ in groups
        ]
        columns: list[npt.NDArray[Any]] = []
        for bucket, (indices, places), weight in zip(buckets, groups, weights, strict=True):
            columns += [_numbers(store, indices, weight, bucket), places]
        tensors = iter(on_device(columns, device))
        return [
            cls(bucket, len(indices), next(tensors), next(tensors))
            for bucket, (indices, _) in zip(buckets, groups, strict=True)
        ]


def _numbers(store: FeatureTable, indices: Indices, weight: float, bucket: Bucket) -> npt.NDArray[np.int64]:
    """All numbers of a batch, int64; weights are in it as they are in memory."""
    lengths = np.array(bucket.fill(store.lengths[indices].tolist()))
    row = row_numbers(lengths, bucket.longest)
    # A slot without tokens has a loss all the same, over this one: a sum over none is no number, not even times 0.
    row[: bucket.slots * bucket.longest].reshape(bucket.slots, -1)[lengths == 0, 0] = bucket.tokens - 1
    ids, types = store.flat(indices)
    labels = np.zeros((bucket.slots, 2), dtype=np.int64)
    labels[: len(indices)] = np.stack((store.start_token[indices], store.end_token[indices]), axis=-1)
    weights = np.zeros(bucket.slots)
    weights[: len(indices)] = weight
    padding = np.zeros(bucket.tokens - len(ids), dtype=np.int64)
    return np.concatenate([ids, padding, types, padding, row, labels.reshape(-1), weights.view(np.int64)])
