"""Products of half precision on processors that have no instructions for it.

torch computes them in plain loops there, which takes some twenty times as long as the same product in float32. A GPU
multiplies numbers of half precision, adds up in float32 and rounds the sum once. The same comes out, up to the order of
the sums, of a product in float32 of the numbers as they are, rounded at its end: 8 or 11 bits times as many bits fit
into the 24 of float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
_ADDED_IN_PLACE = {"aten::addmm_": torch.ops.aten.addmm.default, "aten::baddbmm_": torch.ops.aten.baddbmm.default}
"""Products that are added to their first operand, and what computes the sum elsewhere."""
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "qa_dist::attend",
    "qa_dist::attend_backward",
}
"""Inside the last two, of `qa_dist.model.attention`, a mode is not asked."""


class WideProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, matrix products and attention of half precision on this thread are computed in float32 and rounded."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the half precision: torch.bfloat16 or torch.float16."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, name = kwargs or {}, func.name()
        added = _ADDED_IN_PLACE.get(name)
        if not (added or name in _PRODUCTS or name in _ATTENTION) or args[0].dtype is not self._dtype:
            return func(*args, **named)
        wide_args, wide_named = tree_map_only(torch.Tensor, self._widened, (tuple(args), dict(named)))
        result = (added or func)(*wide_args, **wide_named)
        if added:
            return args[0].copy_(result)
        if name in _PRODUCTS:
            return result.to(self._dtype)
        if name.endswith("_backward"):
            return tuple(gradient.to(self._dtype) for gradient in result)
        # The logarithms of the sums of attention are float32 in half precision too.
        output, *logarithms = result
        return (output.to(self._dtype), *logarithms)

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype is self._dtype else tensor
