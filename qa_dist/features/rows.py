"""The layout of a row of real tokens: where each feature begins, and where its tokens would be in a padded batch.

All of it follows from the lengths, which the host knows: it is computed there and copied to the device in one piece.

Legend: B features, T tokens of the row, L tokens of the longest feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The layout of a row, as tensors of one device.

    Attributes:
        lengths: tokens of each feature; () where the numbers change and their places do not.
        cumulative: int32 [B + 1], where each feature begins, and where the last one ends.
        positions_T: int64 [T], place of every token inside its feature.
        places_BL: int64 [B, L], place in the row of every token of a padded batch; T where that has padding.
        padded_T: int64 [T], place of every token in a padded batch, counted through its rows.
    """

    lengths: tuple[int, ...]
    cumulative: torch.Tensor
    positions_T: torch.Tensor
    places_BL: torch.Tensor
    padded_T: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Row":
        """The row of features of these lengths; the device is not waited for."""
        numbers = torch.from_numpy(row_numbers(lengths))
        if device.type == "cuda" and torch.cuda.is_available():
            # What is copied from memory that is not pinned makes the host wait.
            numbers = numbers.pin_memory()
        return cls.within(numbers.to(device, non_blocking=True), lengths)

    @classmethod
    def within(cls, numbers: torch.Tensor, lengths: Sequence[int]) -> "Row":
        """The row whose `row_numbers` are in this tensor, wherever it is: views of it."""
        return cls.at(
            numbers,
            num_features=len(lengths),
            num_tokens=sum(lengths),
            longest=max(lengths, default=0),
            lengths=lengths,
        )

    @classmethod
    def at(
        cls, numbers: torch.Tensor, *, num_features: int, num_tokens: int, longest: int, lengths: Sequence[int] = ()
    ) -> "Row":
        """The row of these sizes whose `row_numbers` are in this tensor; `lengths` may stay unknown."""
        sizes = [num_features * longest, num_tokens, num_tokens, _int64_of(num_features + 1)]
        # Tensors, not views: torch.compile takes sizes of a view and of what it is a view of for one if they happen to
        # be the same, and compiles again when they are not.
        parts = [part.data for part in torch.split(numbers, sizes)]
        return cls(
            lengths=tuple(lengths),
            cumulative=parts[3].view(torch.int32)[: num_features + 1].data,
            positions_T=parts[1],
            places_BL=parts[0].view(num_features, longest),
            padded_T=parts[2],
        )


def row_numbers(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]], longest: int | None = None
) -> npt.NDArray[np.int64]:
    """All numbers of a `Row` in one array, for `Row.within`; boundaries are in it as pairs of int32.

    `longest` is L; None: tokens of the longest of these features.
    """
    lengths_B = np.asarray(lengths, dtype=np.int64)
    ends_B = np.cumsum(lengths_B)
    starts_B, num_tokens = ends_B - lengths_B, int(lengths_B.sum())
    longest = int(lengths_B.max(initial=0)) if longest is None else longest
    columns = np.arange(longest)
    places_BL = np.where(columns < lengths_B[:, None], starts_B[:, None] + columns, num_tokens)
    positions_T = np.arange(num_tokens) - np.repeat(starts_B, lengths_B)
    padded_T = positions_T + np.repeat(np.arange(len(lengths_B)) * longest, lengths_B)
    boundaries = np.zeros(2 * _int64_of(len(lengths_B) + 1), dtype=np.int32)
    boundaries[1 : len(lengths_B) + 1] = ends_B
    return np.concatenate([places_BL.reshape(-1), positions_T, padded_T, boundaries.view(np.int64)])


def num_row_numbers(num_features: int, num_tokens: int, longest: int) -> int:
    """How many numbers a row of these sizes has."""
    return num_features * longest + 2 * num_tokens + _int64_of(num_features + 1)


def _int64_of(num_int32: int) -> int:
    """Numbers of 64 bits that hold this many of 32."""
    return (num_int32 + 1) // 2


def window_mask(length: int, reach: int, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask [length, length] that keeps tokens at most `reach` apart; None where it would mask nothing.

    Args:
        length: Tokens of the feature.
        reach: The distance; negative: any.
        like: What gives the mask its dtype and device.
    """
    if reach < 0 or length <= reach + 1:
        return None
    places = torch.arange(length, device=like.device)
    far = (places[:, None] - places[None, :]).abs() > reach
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(far, float("-inf"))
