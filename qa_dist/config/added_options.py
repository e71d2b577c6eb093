"""Options that files of earlier versions do not name, and the value that stands for what those versions did."""

from collections.abc import Mapping
from typing import Any

_VALUES_BEFORE: Mapping[str, Any] = {
    "deterministic": False,
    "answer_normalization": "squad",
    "lora_bias": "none",
    "layer_decay": None,
    "residual_dtype": "float32",
    "rdrop_alpha": 0.0,
    "gradient_exchange_dtype": "float32",
}
"""Of the options that decide what a step computes: with another value, a run is another one."""


def with_added(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an earlier version wrote, and beside them those of `wanted` that were added since.

    Args:
        saved: Options of a run by flag name, as a file holds them.
        wanted: Options of a run of this version, with which they are to be compared.
    """
    return {**{name: value for name, value in _VALUES_BEFORE.items() if name in wanted}, **saved}
