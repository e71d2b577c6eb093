"""What a forward and backward pass takes, counted tensor by tensor while nothing is computed.

The real model runs on fake tensors: shapes, dtypes and the life of every tensor are those of a real pass, numbers and
memory there are none. A tracer sees every operation, counts the storages that it makes, and counts them out when they
are dropped - as an allocator would, without its rounding and fragmentation. So that boundaries of features can be read
from a tensor, as some operators do, integers and single numbers are computed for real beside it.

What an operator takes inside itself, and gives back before it returns, is not seen.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from qa_dist.memory.by_strategy import TracedPass
from qa_dist.model.precision import DTYPES, Precision, autocast
from qa_dist.model.span_model import SpanModel, head_names, span_loss, transformers_model

Part = Literal["weights", "gradients", "activations", "logits", "workspace"]

MADE: tuple[Part, ...] = ("activations", "logits", "workspace")
"""Parts that a pass makes, and leaves nothing of."""

_MAX_FOLLOWED = 1 << 18
"""Numbers of a tensor up to which they are computed: more than the layout of a row has, less than most masks have."""


class StorageTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors made while it is entered.

    Attributes:
        part: what storages made from here on count as.
        live: bytes of the living storages, by part.
        peak: `live` when its sum was greatest since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part: Part = "weights"
        self.live: dict[Part, int] = defaultdict(int)
        self.peak: dict[Part, int] = {}
        self._parts: dict[int, tuple[Part, int]] = {}
        self._values: Any = WeakIdKeyDictionary()

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self.peak = dict(self.live)

    def rename(self, old: Part, new: Part) -> None:
        """Count the living storages of one part as another."""
        self._parts = {key: (new if part == old else part, size) for key, (part, size) in self._parts.items()}
        self.live[new] += self.live.pop(old, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0] in self._values:
            with _disable_current_modes():
                return self._values[args[0]].item()
        output = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self.count(tensor)
        self._follow(func, args, dict(kwargs or {}), made)
        return output

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._parts:
            self._parts[key] = self.part, storage.nbytes()
            self.live[self.part] += storage.nbytes()
            weakref.finalize(storage, self._drop, key)
            if sum(self.live.values()) > sum(self.peak.values()):
                self.peak = dict(self.live)

    def _drop(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self.live[part] -= size

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Sequence[torch.Tensor]) -> None:
        """Compute the numbers of what was made, if it is of integers or a single number and all inputs are known."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not all(
            isinstance(tensor, FakeTensor)
            and (tensor.ndim == 0 or (not tensor.dtype.is_floating_point and tensor.numel() <= _MAX_FOLLOWED))
            for tensor in made
        ) or not all(tensor in self._values or type(tensor) is torch.Tensor for tensor in inputs):
            for tensor in made:
                # It may have been written to.
                self._values.pop(tensor, None)
            return
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: self._values.get(tensor, tensor), (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        with _disable_current_modes():
            values = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor, value in zip(made, values, strict=True):
            self._values[tensor] = value


def trace_passes(
    model: SpanModel,
    sizes: Sequence[int],
    *,
    length: int,
    device: torch.device,
    precision: Precision,
    groups_adapters: bool = False,
) -> list[TracedPass]:
    """What the passes of some batches make, each as the second micro-batch of a step: all gradients are there already.

    Args:
        model: A model on the meta device, as `build_meta_model` gives it; it is used up.
        sizes: Features of each batch.
        length: Tokens of every feature. Equal lengths are the worst case of attention that computes whole squares.
        device: Where the tensors pretend to be; torch must have been built for such devices.
        precision: Of the matrix products.
        groups_adapters: Whether layers with adapters are computed in groups, as training does that finds them equal.
    """
    model.train()
    passes = []
    with FakeTensorMode(), StorageTracer() as tracer:
        fake_weights(model, device)
        if groups_adapters:
            _group(model, precision)
        for head in head_names(transformers_model(model.model)):
            module = transformers_model(model.model).get_submodule(head)
            module.register_forward_pre_hook(lambda *_: setattr(tracer, "part", "logits"))
        # Every tensor has its gradient from here on.
        run_pass(model, (length,) * min(sizes), device, precision, tracer)
        tracer.rename("workspace", "gradients")
        for size in sizes:
            tracer.reset_peak()
            run_pass(model, (length,) * size, device, precision, tracer)
            passes.append(TracedPass(size * length, {part: tracer.peak.get(part, 0) for part in MADE}))
    return passes


def _group(model: SpanModel, precision: Precision) -> None:
    # It imports peft.
    from qa_dist.model.lora_layers import GroupedAdapters, group_layers

    if groups := group_layers(model, DTYPES.get(precision, torch.float32)):
        GroupedAdapters(model, groups)


def run_pass(
    model: SpanModel,
    lengths: tuple[int, ...],
    device: torch.device,
    precision: Precision,
    tracer: StorageTracer,
) -> None:
    """A forward and backward pass over features of these lengths, entered into the tracer."""
    tracer.part = "activations"
    input_ids_T = torch.zeros(sum(lengths), dtype=torch.long, device=device)
    with autocast(device.type, precision):
        start_T, end_T = model(input_ids_T, torch.zeros_like(input_ids_T), lengths)
    labels_B2 = torch.zeros(len(lengths), 2, dtype=torch.long, device=device)
    loss = span_loss(start_T, end_T, lengths, labels_B2).sum()
    tracer.part = "workspace"
    loss.backward()  # type: ignore[no-untyped-call]


def fake_weights(model: nn.Module, device: torch.device) -> None:
    """Put fake tensors in the place of a model's tensors on the meta device, quantised ones with their scales."""
    # Kept until all is replaced, so that no two tensors have the same id.
    originals = (*model.parameters(), *model.buffers())
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for tensor in originals:
        old: Any = tensor
        new: Any = fake(old)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        if getattr(old, "CB", None) is not None:
            new.CB, new.SCB = new.data, fake(old.SCB)
        if getattr(old, "quant_state", None) is not None:
            new.quant_state = copy.copy(old.quant_state)
            new.quant_state.absmax = fake(old.quant_state.absmax)
            new.quant_state.code = fake(old.quant_state.code)
        made[id(old)] = new
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in places:
            tensors.update({name: made[id(held)] for name, held in tensors.items() if held is not None})
