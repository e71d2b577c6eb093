"""A run that goes on from an adapter: its tensors in place of new ones, on new data."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.config.options import ModelConfig
from qa_dist.model.folder import base_options, has_tokenizer
from qa_dist.model.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    check_adapter,
    load_tokenizer,
    require_safetensors,
    resolve_model_path,
)
from qa_dist.model.saved import unfilled
from qa_dist.model.span_model import SpanModel

_FOLD = "fold it into its base model with qa-dist merge, and train new adapters on the result"
# Of peft's LoraConfig: what this program's adapters never have, and loading the tensors alone would lose.
_OTHER_KINDS = (
    *("alpha_pattern", "rank_pattern", "layers_to_transform", "lora_bias", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens"),
)
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin that take something off the base model's weights."""
_PROBE = "Größe of ABC, 1911"


def require_its_tokenizer(config: ModelConfig, tokenizer: Any) -> None:
    """Make sure that a run that goes on from an adapter has the adapter's tokenizer, if one lies beside it.

    Raises:
        ConfigError: It has another.
        UserError: The one beside the adapter cannot be loaded.
    """
    folder = config.init_adapter
    if folder is None or not has_tokenizer(folder):
        return
    own = load_tokenizer(dataclasses.replace(config, tokenizer_name=folder))
    if _meaning(own) != _meaning(tokenizer):
        raise ConfigError(
            [
                f"--init_adapter {folder} has a tokenizer of its own, which is not that of "
                f"{config.tokenizer_name or config.model_name_or_path}; give --tokenizer_name {folder}"
            ]
        )


def _meaning(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.padding_side, tokenizer(_PROBE)["input_ids"]


def require_fitting_adapter(config: ModelConfig) -> None:
    """Make sure, before anything is made for it, that a run can go on from `--init_adapter`, if there is one.

    What only the built model knows, `start_from_adapter` looks at.

    Raises:
        UserError: The folder holds no LoRA adapter, or a file of it cannot be read.
        ConfigError: The adapter is of another base model, or of another kind than the options say.
    """
    if config.init_adapter is None:
        return
    folder = config.init_adapter
    if os.path.isfile(os.path.join(folder, MODEL_CONFIG)) and not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        raise ConfigError([f"--init_adapter {folder} holds a whole model; go on from it with --model_name_or_path"])
    saved = check_adapter(folder)
    if (of_run := base_options(folder)).get("model_config") is not None:
        raise ConfigError(
            [
                f"--init_adapter {folder} was trained on random weights (--model_config {of_run['model_config']}), "
                "which are not kept; give an adapter that was trained on a checkpoint"
            ]
        )
    if kind := next(_other_kinds(saved), None):
        raise ConfigError([f"--init_adapter {folder} has {kind}, which adapters of this program have not; {_FOLD}"])
    problems = []
    base = saved.get("base_model_name_or_path")
    if base and _place(base) != _place(config.model_name_or_path):
        problems.append(
            f"--init_adapter {folder} was trained on {base} and not on --model_name_or_path "
            f"{config.model_name_or_path}; name that model"
        )
    # Under the names of peft and of the options.
    fields = {name: name for name in ("lora_alpha", "use_rslora", "use_dora")} | {"r": "lora_r", "bias": "lora_bias"}
    problems += [
        f"--init_adapter {folder} has {field} {saved[field]} and this run {getattr(config, option)}; give "
        f"--{option} {str(saved[field]).lower()}"
        for field, option in fields.items()
        if saved.get(field, getattr(config, option)) != getattr(config, option)
    ]
    if problems:
        raise ConfigError(problems)
    require_safetensors(Path(folder) / ADAPTER_WEIGHTS)


def start_from_adapter(model: SpanModel, config: ModelConfig) -> None:
    """Give the adapters and the head of a new model the tensors of `--init_adapter`.

    Args:
        model: The model with new adapters.
        config: What it was built from.

    Raises:
        UserError: The folder holds no LoRA adapter.
        ConfigError: The adapter is of another base model, or of another shape than the options say.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    require_fitting_adapter(config)
    folder = str(config.init_adapter)
    peft_model: Any = model.model
    wanted = peft_model.peft_config["default"]
    targets = sorted(check_adapter(folder).get("target_modules") or ())
    if targets != sorted(wanted.target_modules):
        raise ConfigError(
            [
                f"--init_adapter {folder} adapts {', '.join(targets)} and this run "
                f"{', '.join(sorted(wanted.target_modules))}; give --lora_target_modules {','.join(targets)}"
            ]
        )
    path = Path(folder) / ADAPTER_WEIGHTS
    if lost := unfilled(peft_model, (), path):
        raise ConfigError([f"--init_adapter {folder} lacks {lost[0]}; give a folder that training wrote"])
    weights = load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in _state(peft_model).items()}
    if more := sorted(weights.keys() - shapes.keys()):
        # Embeddings, as with added tokens, or layers that were trained whole.
        raise ConfigError([f"--init_adapter {folder} holds {more[0]}, which a run here would not train on; {_FOLD}"])
    if other := [name for name, tensor in weights.items() if shapes[name] != tuple(tensor.shape)]:
        raise ConfigError(
            [
                f"{other[0]} in --init_adapter {folder} has the shape {tuple(weights[other[0]].shape)} and this "
                f"model's {shapes[other[0]]}; give the model and options that it was trained with"
            ]
        )
    set_peft_model_state_dict(peft_model, weights)


def _other_kinds(saved: Mapping[str, Any]) -> Iterator[str]:
    """What an adapter's configuration has that those of this program have not."""
    yield from (f"{name} {saved[name]}" for name in _OTHER_KINDS if saved.get(name))
    if isinstance(saved.get("target_modules"), str):
        yield f"a pattern as target_modules ({saved['target_modules']})"
    if saved.get("bias") == "lora_only":
        yield "bias lora_only"
    begun = saved.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGE_THE_BASE):
        yield f"init_lora_weights {begun}, which takes part of the base model's weights away"


def _state(peft_model: Any) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    state: dict[str, Any] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return state


def _place(name: str) -> str:
    """One spelling for all names of a folder; a hub id as it is."""
    try:
        return os.path.realpath(path) if os.path.isdir(path := resolve_model_path(name)) else name
    except UserError:
        return name
