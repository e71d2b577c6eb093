"""What tells tensors from others: one digest of all their bytes."""

import hashlib
from collections.abc import Mapping

import torch


def weights_fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
