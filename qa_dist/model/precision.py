"""The precision of matrix products, as `--mixed_precision` names it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from qa_dist.model.wide_products import WideProducts

Precision = Literal["no", "bf16", "fp16"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrices are multiplied in; "no": as they are."""


def autocast(device_type: str, precision: Precision) -> AbstractContextManager[object]:
    """Context in which a forward pass multiplies matrices in this precision, over float32 weights; "no": in float32."""
    return nullcontext() if precision == "no" else torch.autocast(device_type, DTYPES[precision])


def products(device_type: str, precision: Precision) -> AbstractContextManager[object]:
    """Context in which this thread's products of this precision, of backward passes too, do not have to be imitated.

    On a processor without instructions for them they are computed in float32 and rounded; elsewhere nothing changes.
    `torch.compile` does not compile what is called in it.
    """
    is_imitated = device_type == "cpu" and not has_instructions(device_type, precision)
    return WideProducts(DTYPES[precision]) if is_imitated else nullcontext()


@contextmanager
def computing(device_type: str, precision: Precision) -> Iterator[None]:
    """`autocast` inside `products`: the context of a forward pass that is not compiled."""
    with products(device_type, precision), autocast(device_type, precision):
        yield


def has_instructions(device_type: str, precision: Precision) -> bool:
    """Whether the device multiplies in this precision itself, and does not imitate it.

    On processors that do not, torch computes such products in plain loops, which in bf16 take about twenty times as
    long as oneDNN's in float32 (AVX2, torch 2.13). GPUs have bf16 from compute capability 8.0 (Ampere) on.
    """
    if precision == "no":
        return True
    if device_type == "cuda":
        can_be_asked = precision == "bf16" and torch.cuda.is_available()
        return not can_be_asked or torch.cuda.is_bf16_supported(including_emulation=False)
    # torch asks these too before it hands a product to oneDNN.
    found = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return found is None or bool(found())


def precision_notes(device_type: str, precision: Precision, *, compiles: bool = False) -> list[str]:
    """What the user should know about computing in this precision here: nothing, or one sentence.

    `compiles` says that passes are compiled, for which products are not computed in another way.
    """
    if has_instructions(device_type, precision):
        return []
    device, better = ("GPU", "fp16") if device_type == "cuda" else ("processor", "no")
    lacks = f"this {device} has no instructions for {precision}"
    if device_type == "cpu" and not compiles:
        return [
            f"{lacks}: products are computed in float32 and rounded, which takes longer than --mixed_precision no and "
            "gives what a GPU would; use no here if you do not need that"
        ]
    return [f"{lacks}, which makes --mixed_precision {precision} many times slower than {better}; use {better} here"]
