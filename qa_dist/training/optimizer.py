"""Learning rate as a pure function of the step, which parameters decay, and AdamW with its state in two forms.

torch's AdamW keeps two float32 moments for every number that it trains. bitsandbytes' (Dettmers et al. 2022) keeps them
in 8 bits, with a float32 scale for every 256 of them; moments of small tensors stay in float32.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import TrainingConfig
from qa_dist.machine.requirements import require_bitsandbytes

if TYPE_CHECKING:
    import torch

Kind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]

_LEAST_8BIT = 4096
_BLOCK = 256


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


def require_optimizer(kind: Kind, device_type: str) -> None:
    """Make sure that AdamW of this kind runs on a type of device.

    Raises:
        ConfigError: bitsandbytes is missing, or has no paged memory there: it would go on without a word.
    """
    if kind == "adamw":
        return
    require_bitsandbytes(f"--optim {kind}")
    if kind == "paged_adamw_8bit" and device_type != "cuda":
        raise ConfigError(
            [f"--optim {kind} is for GPUs, whose memory it pages, and this run is on the CPU; use --optim adamw_8bit"]
        )


def make_adamw(
    kind: Kind,
    groups: "list[dict[str, Any]]",
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> "torch.optim.Optimizer":
    """AdamW of that kind over the parameter groups; see `require_optimizer`."""
    if kind == "adamw":
        import torch

        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)
    import bitsandbytes

    adamw = bitsandbytes.optim.AdamW8bit if kind == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    made: torch.optim.Optimizer = adamw(groups, lr=learning_rate, betas=betas, eps=epsilon, min_8bit_size=_LEAST_8BIT)
    return made


def make_optimizer(
    training: TrainingConfig, named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]"
) -> "torch.optim.Optimizer":
    """The optimiser that a run's options describe, over its trainable parameters."""
    return make_adamw(
        training.optim,
        parameter_groups(named_parameters, training.weight_decay),
        learning_rate=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
    )


def moment_bytes(kind: Kind, num_elements: int) -> int:
    """Memory of both moments of a tensor, in bytes."""
    if kind == "adamw" or num_elements < _LEAST_8BIT:
        return 2 * 4 * num_elements
    return 2 * (num_elements + 4 * math.ceil(num_elements / _BLOCK))
