"""Counts the places where a host would wait for its GPU, on tensors of the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
"""Operators whose result is a number of the host, or has a shape that the numbers decide."""


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.partition("::")[2]
        if name in _READS or (name in ("index", "index_put_") and any(map(_is_mask, args[1]))):
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@contextmanager
def reads() -> Iterator[list[str]]:
    """The operators run inside the block that read the numbers of a tensor: `.item()`, `bool(...)` and the like."""
    with _Reads() as mode:
        yield mode.names
