"""Whether two ways to compute the same thing agree within rounding: for a check at the start of a run."""

from collections.abc import Iterable

import torch

from qa_dist.model.precision import Precision

ROUNDING: dict[Precision, float] = {"no": 1e-5, "bf16": 6 * 2.0**-8, "fp16": 6 * 2.0**-11}
"""Largest difference of two results that only rounding sets apart, as a share of the largest number among them.

In half precision that is six roundings, each of up to 2^-8 and 2^-11 of a number; in float32 a sum in another order.
"""

TF32_ROUNDING = 2.0**-8
"""The same where inputs of float32 products are rounded to TF32, which has the mantissa of float16."""


def rounding(precision: Precision, device: torch.device) -> float:
    """Largest difference that rounding explains, as a share of the largest number."""
    if precision == "no" and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return TF32_ROUNDING
    return ROUNDING[precision]


def largest_difference(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest difference of each pair's tensors as a share of the largest number in the second; the worst pair's.

    It is infinite where a tensor has numbers that are not finite, or shapes differ. Waits for the device once.
    """
    shares = []
    for found, expected in pairs:
        if found.shape != expected.shape:
            return float("inf")
        found, expected = found.detach().float(), expected.detach().float()
        share = (found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        shares.append(torch.where(share.isfinite(), share, torch.inf))
    return float(torch.stack(shares).max()) if shares else 0.0
