"""Features of a store as tensors of a device: one row without padding."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qa_dist.features.batching import Indices
from qa_dist.features.store import FeatureStore


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features one behind the other, as tensors on one device.

    Attributes:
        indices: int64 [B] on the CPU, the features' places in their store.
        input_ids_T: int64 [T].
        token_type_ids_T: int64 [T].
        lengths: tokens of each feature.
        labels_B2: int64 [B, 2], start and end token.
        context_start_B: int64 [B], first context token.
        context_end_B: int64 [B], one past the last context token.
        cls_token_B: int64 [B], the token that stands for "no answer".
    """

    indices: Indices
    input_ids_T: torch.Tensor
    token_type_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    labels_B2: torch.Tensor
    context_start_B: torch.Tensor
    context_end_B: torch.Tensor
    cls_token_B: torch.Tensor

    @classmethod
    def of(cls, store: FeatureStore, indices: Indices, device: torch.device) -> "FeatureBatch":
        """The features of a store at these places."""

        def column(*arrays: npt.NDArray[Any]) -> torch.Tensor:
            stacked = np.stack([array.astype(np.int64) for array in arrays], axis=-1)
            return torch.from_numpy(stacked).to(device, non_blocking=True)

        input_ids, token_type_ids = store.flat(indices)
        starts = store.context_start[indices]
        return cls(
            indices=indices,
            input_ids_T=column(input_ids).squeeze(-1),
            token_type_ids_T=column(token_type_ids).squeeze(-1),
            lengths=tuple(store.lengths[indices].tolist()),
            labels_B2=column(store.start_token[indices], store.end_token[indices]),
            context_start_B=column(starts).squeeze(-1),
            context_end_B=column(starts + store.context_length[indices]).squeeze(-1),
            cls_token_B=column(store.cls_token[indices]).squeeze(-1),
        )
