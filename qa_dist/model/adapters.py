"""Adapters: where they go, and how they get there."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import ModelConfig
from qa_dist.model.families import family_of
from qa_dist.model.loading import without_library_messages
from qa_dist.model.span_model import head_names


def target_modules(model: Any, wanted: Sequence[str]) -> list[str]:
    """Names of the linear layers that get adapters, as peft's `target_modules`.

    Args:
        model: A transformers question-answering model.
        wanted: ("attention",), ("all-linear",) or names of modules.

    Raises:
        ConfigError: A name is no linear layer of the encoder, or the architecture's projections are unknown.
    """
    encoder = getattr(model, model.base_model_prefix)
    linear = sorted({name.rpartition(".")[2] for name, part in encoder.named_modules() if isinstance(part, nn.Linear)})
    if tuple(wanted) == ("all-linear",):
        return linear
    if tuple(wanted) == ("attention",):
        projections = family_of(model.config).projections
        if not projections:
            raise ConfigError(
                [
                    f"--lora_target_modules attention is unknown for a {model.config.model_type} model; "
                    f"use all-linear or some of {', '.join(linear)}"
                ]
            )
        return list(projections)
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        raise ConfigError(
            [f"--lora_target_modules {', '.join(unknown)}: no such linear layer; the encoder has {', '.join(linear)}"]
        )
    return list(wanted)


def is_idle_bias(name: str) -> bool:
    """Whether a parameter of a peft model is a bias that nothing computes with, which peft would train with the others.

    That is one of the copy of the head that peft keeps as it was, or of the pooler.
    """
    return name.endswith(".bias") and (".original_module." in name or ".pooler." in name)


def add_adapters(base: Any, config: ModelConfig) -> Any:
    """`base` inside a peft model, frozen, with new LoRA adapters and a trainable copy of its head.

    Args:
        base: A transformers question-answering model; its layers are replaced in place.
        config: The adapters' rank, scale, dropout, targets and variant.

    Raises:
        ConfigError: A target is no linear layer of the encoder.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    heads = head_names(base)
    # A head may share layer names with the encoder (ModernBERT's `head.dense`); it is trained whole instead.
    excluded = [rf"({'|'.join(heads)})(\..*)?"]
    if any(name.endswith(".pooler") for name, _ in base.named_modules()):
        # What it makes of the first token, span heads do not read.
        excluded.append(r".*\.pooler\..*")
    # For this task peft also wraps whatever is called `qa_outputs`, which BigBird has inside its head.
    is_nested = any(name.endswith(".qa_outputs") for name, _ in base.named_modules())
    lora = LoraConfig(
        task_type=None if is_nested else TaskType.QUESTION_ANS,
        r=config.lora_r,
        # Its default is an integer and a flag's value is not; the file is the same.
        lora_alpha=int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(base, config.lora_target_modules),
        exclude_modules="|".join(excluded),
        modules_to_save=list(heads),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.lora_bias,
    )
    with without_library_messages():
        model = get_peft_model(base, lora)
    # peft notes the folder that a package or the hub cache happens to have on this machine, also in the
    # place of None. Random weights have no name.
    base_name = config.model_name_or_path if config.model_config is None else ""
    model.peft_config["default"].base_model_name_or_path = base_name
    if config.lora_bias == "all":
        for name, weight in model.named_parameters():
            if is_idle_bias(name):
                weight.requires_grad_(False)
    return model
