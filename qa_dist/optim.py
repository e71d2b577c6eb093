"""Learning rate as a pure function of the step, and which parameters decay."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


def learning_rate(
    step: int,
    *,
    num_steps: int,
    peak: float,
    warmup_ratio: float,
    shape: Literal["linear", "cosine", "constant"],
) -> float:
    """Learning rate of optimiser step `step`, counted from 0; the same at every world size.

    Over the first `ceil(warmup_ratio * num_steps)` steps it rises linearly and reaches `peak` in the last of them; no
    step is spent at zero, as the Hugging Face schedules spend their first one. After warm-up the fraction of the decay
    that lies behind is `t = (step - warmup) / (num_steps - warmup)`; linear gives `1 - t`, cosine `(1 + cos(pi t)) / 2`
    (Loshchilov and Hutter 2017, half a period), constant 1.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    behind = (step - warmup) / max(1, num_steps - warmup)
    factor = {"linear": 1 - behind, "cosine": (1 + math.cos(math.pi * behind)) / 2, "constant": 1.0}[shape]
    return peak * max(0.0, factor)


def parameter_groups(
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]", weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW parameter groups of the trainable parameters: matrices decay, biases and norms do not.

    Every vector counts as a bias or norm; so do DoRA's magnitudes.
    """
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_tensors(
    optimizer: "torch.optim.Optimizer",
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    *,
    whole: "Callable[[torch.Tensor], torch.Tensor]" = lambda tensor: tensor,
) -> "dict[str, torch.Tensor]":
    """Copies of the optimiser's state on the CPU, as `kind/parameter`: `exp_avg/...`, `exp_avg_sq/...`, `step/...`.

    `whole` makes a tensor whole of which this rank holds a share.
    """
    return {
        f"{kind}/{name}": whole(value).detach().to("cpu", copy=True).contiguous()
        for name, parameter in named_parameters
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: "torch.optim.Optimizer",
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    tensors: "Mapping[str, torch.Tensor]",
) -> None:
    """Put a state that `optimizer_tensors` returned back, each tensor on its parameter's device."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        # The optimiser counts its steps in the tensor that it is given.
        state.setdefault(name, {})[kind] = value.clone()
    names = {id(parameter): name for name, parameter in named_parameters}
    saved = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = enumerate(names[id(parameter)] for parameter in ordered)
    saved["state"] = {place: state[name] for place, name in places if name in state}
    optimizer.load_state_dict(saved)
