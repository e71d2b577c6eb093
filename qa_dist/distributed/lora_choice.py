"""Which code computes LoRA layers: peft's, or grouped ones where a check before the first step finds them equal."""

from collections.abc import Callable

import torch

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.model.casts import remove_redundant_casts
from qa_dist.model.equality import rounding
from qa_dist.model.precision import DTYPES
from qa_dist.model.span_model import SpanModel


def group_for_evaluation(
    config: RunConfig, ranks: Ranks, model: SpanModel, notice: Callable[[str], object] = lambda text: None
) -> int:
    """`group_adapters` for a trained model that was loaded, so that it computes what it did at the end of its run."""
    if config.model.tuning != "lora" or (ranks.device.type == "cpu" and config.model.lora_implementation != "grouped"):
        return 0
    remove_redundant_casts(model, config.model, config.training.mixed_precision, ranks.device, shards_one_type=False)
    return group_adapters(config, ranks, model, notice)


def wants_groups(config: RunConfig, device_type: str, strategy: str) -> bool:
    """Whether groups are tried: where they are asked for by name, and by themselves on CUDA in data parallel."""
    wanted = config.model.lora_implementation
    is_usual = wanted == "auto" and device_type == "cuda" and strategy == "ddp"
    return config.model.tuning == "lora" and (wanted == "grouped" or is_usual)


def group_adapters(config: RunConfig, ranks: Ranks, model: SpanModel, notice: Callable[[str], object]) -> int:
    """Let the model compute its LoRA layers in groups, as `--lora_implementation` says; how many groups there are.

    All ranks must call this together, with the model on their devices: they compute alike.

    Raises:
        ConfigError: Groups were asked for by name, and there are none, or they do not compute what peft does.
    """
    is_automatic, precision = config.model.lora_implementation == "auto", config.training.mixed_precision
    if not wants_groups(config, ranks.device.type, ranks.launch_config.strategy):
        return 0
    # It imports peft.
    from qa_dist.model.lora_check import difference_from_peft
    from qa_dist.model.lora_layers import GroupedAdapters, group_layers

    groups = group_layers(model, DTYPES.get(precision, torch.float32))
    if not groups:
        if not is_automatic:
            raise ConfigError(
                ["--lora_implementation grouped: no layer of this model has a plain adapter; use auto or peft"],
                on_all_ranks=True,
            )
        return 0
    adapters = GroupedAdapters(model, groups)
    with ranks.products():
        difference = difference_from_peft(adapters, ranks.autocast())
    limit = rounding(precision, ranks.device)
    if ranks.minimum(int(difference <= limit)):
        return len(groups)
    adapters.remove()
    found = f"grouped LoRA layers differ from peft's by {difference:.1e} of the largest number, more than {limit:.0e}"
    if not is_automatic:
        problem = f"--lora_implementation grouped: {found} here or on another rank; use auto or peft"
        raise ConfigError([problem], on_all_ranks=True)
    notice(f"{found} here or on another rank: peft's are used")
    return 0
