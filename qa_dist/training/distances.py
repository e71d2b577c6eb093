"""How far tensors are from each other."""

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor | None]
"""Tensors of one device, such as gradients; None where there is none."""


def norm(tensors: Tensors) -> torch.Tensor:
    """The Euclidean norm of all of them together, [] on their device."""
    return torch.nn.utils.get_total_norm([each for each in tensors if each is not None])


def relative_distance(found: Tensors, wanted: Tensors) -> float:
    """The norm of all differences, as a share of that of what was wanted; waits for the device."""
    differences = [None if new is None or old is None else new - old for new, old in zip(found, wanted, strict=True)]
    distance, size = map(float, (norm(differences), norm(wanted)))
    return distance / size if size else distance
