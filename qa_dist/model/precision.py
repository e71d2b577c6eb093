"""The precision of matrix products, as `--mixed_precision` names it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["no", "bf16", "fp16"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrices are multiplied in; "no": as they are."""


def autocast(device_type: str, precision: Precision) -> AbstractContextManager[object]:
    """Context in which a forward pass multiplies matrices in this precision, over float32 weights; "no": in float32."""
    return nullcontext() if precision == "no" else torch.autocast(device_type, DTYPES[precision])
