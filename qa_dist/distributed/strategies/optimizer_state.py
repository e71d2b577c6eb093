"""An optimiser's state as whole tensors by name, whatever holds it."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qa_dist.config.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import torch

_LOOKUPS = frozenset(
    name for optimizer in OPTIMIZERS.values() if optimizer.quantisation for name in optimizer.quantisation.lookups
)
"""What 8 bits stand for: the same for every tensor of every run, so that no checkpoint holds it."""


def optimizer_tensors(
    optimizer: "torch.optim.Optimizer",
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    *,
    whole: "Callable[[torch.Tensor], torch.Tensor]" = lambda tensor: tensor,
) -> "dict[str, torch.Tensor]":
    """Copies of the optimiser's state on the CPU, as `kind/parameter`.

    The kinds are torch's `exp_avg`, `exp_avg_sq` and `step`, or bitsandbytes' `state1`, `state2`, `step`, and `absmax1`
    and `absmax2` where the former two are uint8. `whole` makes a tensor whole of which this rank holds a shard.
    """
    import torch

    return {
        # bitsandbytes counts its steps in a plain integer.
        f"{kind}/{name}": whole(torch.as_tensor(value)).detach().to("cpu", copy=True).contiguous()
        for name, parameter in named_parameters
        for kind, value in optimizer.state.get(parameter, {}).items()
        if kind not in _LOOKUPS
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
        state.setdefault(name, {})[kind] = value
    names = {id(parameter): name for name, parameter in named_parameters}
    if hasattr(optimizer, "init_state"):
        _fill_in_place(optimizer, {number: state.get(name, {}) for number, name in names.items()})
        return
    saved = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = enumerate(names[id(parameter)] for parameter in ordered)
    # The optimiser counts its steps in the tensor that it is given.
    saved["state"] = {
        place: {kind: value.clone() for kind, value in state[name].items()} for place, name in places if name in state
    }
    optimizer.load_state_dict(saved)


def _fill_in_place(optimizer: Any, state: "Mapping[int, Mapping[str, torch.Tensor]]") -> None:
    """Put a state into bitsandbytes' own tensors, by `id` of the parameter.

    Its `load_state_dict` would put tensors of its own in their place, and those are not paged.
    """
    for place, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            wanted = state[id(parameter)]
            if not wanted:
                optimizer.state.pop(parameter, None)
                continue
            held = optimizer.state[parameter]
            if not held:
                optimizer.init_state(group, parameter, place, index)
            for kind, value in wanted.items():
                if kind == "step":
                    held[kind] = int(value)
                else:
                    held[kind].copy_(value)
