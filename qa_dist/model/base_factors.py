"""Adapters that begin as a part of the base model's weights (PiSSA, OLoRA), and how they are saved.

Such an adapter begins with factors B0 A0 of a layer's weights W, which are taken off the frozen weights: the layer is
`W - s B0 A0 + s B A`, and at the start what it was. What training changes is `s (B A - B0 A0)`, which is an adapter of
twice the rank on W itself, with B and B0 side by side and A over -A0. That is what is saved, so that whoever loads it
needs no other base model than the one that everybody has.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qa_dist.model.span_model import Weights

_ADAPTER = "default"
_ATTRIBUTE = "qa_dist_base_factors"


def take_off_base(model: Any, method: str) -> None:
    """Let the adapters of a peft model begin with factors of their layers' weights, as peft computes them.

    In one thread, since the last bits of a decomposition may depend on how many there are, and a run that is resumed
    must begin with the same ones. Tensors on "meta" stay as they are.

    Args:
        model: A peft model whose adapters are new.
        method: "pissa" (Meng et al. 2024, equations 2 to 4) or "olora" (Buyukakyuz 2024, algorithm 1).
    """
    from peft.tuners.lora import Linear

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    factors: Weights = {}
    try:
        for name, layer in model.named_modules():
            if not isinstance(layer, Linear):
                continue
            weights = [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
            if not weights[0].is_meta:
                with torch.no_grad():
                    layer.pissa_init(_ADAPTER, "pissa") if method == "pissa" else layer.olora_init(_ADAPTER)
            for kind in ("lora_A", "lora_B"):
                weight = getattr(layer, kind)[_ADAPTER].weight
                # peft gives it a tensor of another layout, or one that shares its memory.
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
                factors[f"{name}.{kind}.{_ADAPTER}.weight"] = weight.detach().clone()
    finally:
        torch.set_num_threads(threads)
    setattr(model, _ATTRIBUTE, factors)


@contextmanager
def as_saved(model: Any, trained: Mapping[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    """The trained tensors as an adapter on the base model as it was; inside the block the model has its shapes to tell.

    For a model whose adapters began otherwise, that is `trained` as it is.

    Args:
        model: The peft model.
        trained: Its trainable tensors by name, whole.
    """
    factors: Weights = getattr(model, _ATTRIBUTE, {})
    if not factors:
        yield trained
        return
    doubled = dict(trained)
    for name, factor in factors.items():
        now = trained[name]
        first = factor.to(now.device)
        is_a = name.endswith(f".lora_A.{_ADAPTER}.weight")
        doubled[name] = torch.cat([now, -first]) if is_a else torch.cat([now, first], dim=1)
    config = model.peft_config[_ADAPTER]
    rank, alpha = config.r, config.lora_alpha
    # The scale is alpha / r.
    config.r, config.lora_alpha = 2 * rank, 2 * alpha
    try:
        yield doubled
    finally:
        config.r, config.lora_alpha = rank, alpha
