"""Features of a table, such as a store, as tensors of a device: one row without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qa_dist.common.arrays import Indices
from qa_dist.features.rows import Row, row_numbers
from qa_dist.features.table import FeatureTable


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features one behind the other, as tensors on one device.

    Attributes:
        indices: int64 [B] on the CPU, the features' places in their table.
        input_ids_T: int64 [T].
        token_type_ids_T: int64 [T].
        lengths: tokens of each feature.
        labels_B2: int64 [B, 2], start and end token.
        context_start_B: int64 [B], first context token.
        context_end_B: int64 [B], one past the last context token.
        cls_token_B: int64 [B], the token that stands for "no answer".
        lengths_B: int64 [B], `lengths` on the device.
        places_B: int64 [B], the features' places in the global batch that they were taken from; else from 0 on.
        row: the layout of the features in the row.
    """

    indices: Indices
    input_ids_T: torch.Tensor
    token_type_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    labels_B2: torch.Tensor
    context_start_B: torch.Tensor
    context_end_B: torch.Tensor
    cls_token_B: torch.Tensor
    lengths_B: torch.Tensor
    places_B: torch.Tensor
    row: Row

    @classmethod
    def of(cls, store: FeatureTable, indices: Indices, device: torch.device) -> "FeatureBatch":
        """The features of a table at these places."""
        return cls.several(store, [(indices, np.arange(len(indices)))], device)[0]

    @classmethod
    def several(
        cls, store: FeatureTable, groups: Sequence[tuple[Indices, Indices]], device: torch.device
    ) -> list["FeatureBatch"]:
        """A batch of each group of features; all of them go to the device together.

        Args:
            store: The features.
            groups: For each batch the features' places in the store, and in their global batch, both int64 [B].
            device: Where the tensors are to be.
        """
        columns: list[npt.NDArray[Any]] = []
        for indices, places in groups:
            starts = store.context_start[indices]
            columns += [
                *store.flat(indices),
                np.stack((store.start_token[indices], store.end_token[indices]), axis=-1).reshape(-1),
                starts,
                starts + store.context_length[indices],
                store.cls_token[indices],
                store.lengths[indices],
                places,
                row_numbers(store.lengths[indices]),
            ]
        tensors = iter(on_device(columns, device))
        batches = []
        for indices, _ in groups:
            input_ids_T, types_T, labels, starts_B, ends_B, cls_B, lengths_B, places_B, row = islice(tensors, 9)
            lengths = tuple(store.lengths[indices].tolist())
            batches.append(
                cls(
                    indices=indices,
                    input_ids_T=input_ids_T,
                    token_type_ids_T=types_T,
                    lengths=lengths,
                    labels_B2=labels.view(-1, 2),
                    context_start_B=starts_B,
                    context_end_B=ends_B,
                    cls_token_B=cls_B,
                    lengths_B=lengths_B,
                    places_B=places_B,
                    row=Row.within(row, lengths),
                )
            )
        return batches


def on_device(columns: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arrays of integers as int64 tensors: views of one, which is copied at once and which nobody waits for.

    The memory that a GPU copies from must not move; torch keeps it until the copy is done, and uses it again then.
    """
    sizes = [len(column) for column in columns]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(columns, out=host.numpy())
    return torch.split(host.to(device, non_blocking=True), sizes)
