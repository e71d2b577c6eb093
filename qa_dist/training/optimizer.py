"""Learning rate as a pure function of the step, which parameters decay, and the optimiser that the options name.

What differs between the optimisers is in `qa_dist.config.optimizers`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qa_dist.common.errors import ConfigError
from qa_dist.config.optimizers import OPTIMIZERS, OptimizerName
from qa_dist.config.options import TrainingConfig
from qa_dist.features.batching import steps_in
from qa_dist.machine.requirements import require_package

if TYPE_CHECKING:
    import torch


_FLOAT_BYTES = 4


def learning_rate(step: int, num_steps: int, training: TrainingConfig) -> float:
    """Learning rate of optimiser step `step` of `num_steps`, counted from 0; the same at every world size.

    Over the first `ceil(warmup_ratio * num_steps)` steps it rises linearly and reaches its peak, `--learning_rate`, in
    the last of them; no step is spent at zero, as the Hugging Face schedules spend their first one. After warm-up the
    fraction of the decay that lies behind is `t = (step - warmup) / (num_steps - warmup)`; linear gives `1 - t`, cosine
    `(1 + cos(pi t)) / 2` (Loshchilov and Hutter 2017, half a period), constant 1.
    """
    peak = training.learning_rate
    warmup = steps_in(training.warmup_ratio, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    behind = (step - warmup) / max(1, num_steps - warmup)
    factors = {"linear": 1 - behind, "cosine": (1 + math.cos(math.pi * behind)) / 2, "constant": 1.0}
    return peak * max(0.0, factors[training.lr_scheduler_type])


def parameter_groups(
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    weight_decay: float,
    lr_multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """AdamW parameter groups of the trainable parameters: matrices decay, biases and norms do not.

    Every vector counts as a bias or norm; so do DoRA's magnitudes. `lr_multipliers` are what the learning rate is
    multiplied with, by name, where it is not 1; a group whose factor is not 1 has it as `lr_factor`.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            factor = (lr_multipliers or {}).get(name, 1.0)
            groups.setdefault((factor, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            **({} if factor == 1 else {"lr_factor": factor}),
        }
        for (factor, decays), parameters in groups.items()
        if parameters
    ]


def require_optimizer(name: OptimizerName, device_type: str) -> None:
    """Make sure that an optimiser runs on a type of device.

    Raises:
        ConfigError: Its package is missing, or has no paged memory there: it would go on without a word.
    """
    optimizer = OPTIMIZERS[name]
    require_package(optimizer.package, f"--optim {name}")
    if optimizer.unpaged is not None and device_type != "cuda":
        raise ConfigError(
            [
                f"--optim {name} is for GPUs, whose memory it pages, and this run is on the CPU; use --optim "
                f"{optimizer.unpaged}"
            ]
        )


def is_fused(name: OptimizerName, strategy: str, device_type: str) -> bool:
    """Whether a step is one operation on the device, which makes no tensors beside the weights and moments.

    torch's AdamW is on GPUs; on a CPU it goes tensor by tensor, and its results stay those of earlier versions to the
    last bit. DeepSpeed, too, gets what it was tested with.
    """
    fuses = device_type == "cuda" and strategy in ("ddp", "fsdp2")
    return OPTIMIZERS[name].is_fused or (OPTIMIZERS[name].takes_fused and fuses)


def step_bytes(name: OptimizerName, num_elements: "Sequence[int]", *, fused: bool) -> int:
    """Memory of a GPU that a step takes beside what a pass does, in bytes, for trained tensors of these sizes.

    That is the moments, the gradients that stay from one micro-batch to the next, and the roots of all second moments,
    which torch's AdamW makes at once where it is not fused.
    """
    moments = sum(map(OPTIMIZERS[name].moment_bytes, num_elements))
    return moments + _FLOAT_BYTES * sum(num_elements) * (1 if fused else 2)


def make_optimizer(
    training: TrainingConfig,
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    *,
    fused: bool = False,
    lr_multipliers: Mapping[str, float] | None = None,
) -> "torch.optim.Optimizer":
    """The optimiser that a run's options describe, over its trainable parameters; see `require_optimizer`.

    `fused` asks for one that takes a step in one operation, if its class can be asked; see `is_fused`. `lr_multipliers`
    are those of `parameter_groups`.
    """
    optimizer = OPTIMIZERS[training.optim]
    more: dict[str, Any] = {} if optimizer.quantisation is None else {"min_8bit_size": optimizer.quantisation.least}
    if fused and optimizer.takes_fused:
        more["fused"] = True
    made: torch.optim.Optimizer = getattr(import_module(optimizer.module), optimizer.class_name)(
        parameter_groups(named_parameters, training.weight_decay, lr_multipliers),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        **more,
    )
    return made
