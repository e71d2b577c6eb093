"""The model that trains, from its configuration: loaded, set up, with adapters, and checked.

`build_model` is what a run calls. `build_meta_model` makes the same model without numbers, to estimate its memory.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.libraries import reason
from qa_dist.config.options import ModelConfig
from qa_dist.model.adapters import add_adapters
from qa_dist.model.attention import UNPADDED, drops_weights, register
from qa_dist.model.dropout import use_cheap_dropout
from qa_dist.model.families import family_of, longest_full_attention, model_types_unpadded, require_trainable
from qa_dist.model.loading import library_errors, without_library_messages
from qa_dist.model.pretrained import model_configuration, weights_folder
from qa_dist.model.quantization import (
    follow_autocast,
    keep_stored_weights,
    quantization_options,
    quantize_meta_model,
    require_quantized,
)
from qa_dist.model.span_model import (
    Padding,
    SpanModel,
    count_parameters,
    head_names,
    transformers_model,
)
from qa_dist.model.trainable import ParameterReport, check_trainable, parameter_report

CPU = torch.device("cpu")


class LoadedBase(NamedTuple):
    """A transformers model before adapters.

    Attributes:
        model: The question-answering model.
        newly_initialized: Names of its parameters that the checkpoint does not have; they are random.
        padding: How its batches are to be computed.
        notes: What the user should know about choices made here, one sentence each.
        training_notes: The same, of what is different in training alone.
    """

    model: Any
    newly_initialized: Sequence[str]
    padding: Padding
    notes: Sequence[str]
    training_notes: Sequence[str]


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    max_seq_length: int,
    gradient_checkpointing: bool = False,
    torch_compile: str = "no",
    tokenizer_pads_left: bool = False,
    device: torch.device = CPU,
) -> tuple[SpanModel, ParameterReport]:
    """The model as training starts with it, and the report of what it trains.

    New weights (the head's, the adapters') are drawn from `seed`, so every rank builds the same ones. Quantised weights
    are on `device` already, everything else is on the CPU. `torch_compile` is the option: `model` is compiled here,
    layers are later (`qa_dist.model.compiling`).

    Raises:
        UserError: The model cannot be loaded, or an option does not fit it.
    """
    torch.manual_seed(seed)
    base = load_base(config, config.model_name_or_path, max_seq_length, device)
    before = count_parameters(base.model)
    span_model = _with_adapters(
        base,
        config,
        max_seq_length=max_seq_length,
        gradient_checkpointing=gradient_checkpointing,
        tokenizer_pads_left=tokenizer_pads_left,
    )
    if torch_compile == "model":
        span_model.compile_encoder()
    # What is compiled fuses the masks of torch's own dropout into what surrounds them.
    if torch_compile in ("no", "auto") and not torch.cuda.is_available():
        use_cheap_dropout(span_model)
    return span_model, parameter_report(span_model, before)


def build_meta_model(
    config: ModelConfig, *, max_seq_length: int, gradient_checkpointing: bool = False, device: torch.device = CPU
) -> SpanModel:
    """The model that `build_model` would build for `device`, all shapes and no numbers: its tensors are on "meta".

    Only the configuration of a checkpoint is read.

    Raises:
        UserError: There is no such model, or an option does not fit it.
    """
    base = _meta_base(config, max_seq_length, device)
    with torch.device("meta"):
        span_model = _with_adapters(
            base,
            config,
            max_seq_length=max_seq_length,
            gradient_checkpointing=gradient_checkpointing,
            tokenizer_pads_left=False,
        )
    if device.type == "cpu":
        use_cheap_dropout(span_model)
    return span_model


def meta_parameter_report(config: ModelConfig, *, max_seq_length: int) -> ParameterReport:
    """What `build_model` would report, from the configuration of the model alone.

    Raises:
        UserError: There is no such model, or an option does not fit it.
    """
    before = count_parameters(_meta_base(config, max_seq_length, CPU).model)
    return parameter_report(build_meta_model(config, max_seq_length=max_seq_length), before)


def _meta_base(config: ModelConfig, max_seq_length: int, device: torch.device) -> LoadedBase:
    """The transformers model before adapters, its tensors on "meta"."""
    name = config.model_name_or_path
    refused = library_errors(lambda error: _not_an_encoder(name, error))
    with torch.device("meta"), refused, without_library_messages():
        model_config, padding, notes, training_notes = _configured(config, name, max_seq_length, device)
        model = _from_configuration(model_config, padding)
        quantize_meta_model(model, config.quantization, head_names(model))
        if config.quantization != "no" and device.type != "cpu":
            follow_autocast(model)
    return LoadedBase(model, (), padding, notes, training_notes)


def _with_adapters(
    base: LoadedBase,
    config: ModelConfig,
    *,
    max_seq_length: int,
    gradient_checkpointing: bool,
    tokenizer_pads_left: bool,
) -> SpanModel:
    """The model as it trains: with adapters if they are asked for, and all that is new in it trainable."""
    model = add_adapters(base.model, config) if config.tuning == "lora" else base.model
    span_model = SpanModel(
        model,
        padding=base.padding,
        max_seq_length=max_seq_length,
        tokenizer_pads_left=tokenizer_pads_left,
        notes=(*base.notes, *base.training_notes),
    )
    if gradient_checkpointing:
        # Reentrant checkpoints need an input that requires a gradient, which a frozen embedding does not give.
        plain = transformers_model(model)
        # Transformers 5.2x renamed it.
        enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    check_trainable(span_model, base.newly_initialized)
    for bias in span_model.shift_invariant_biases().values():
        bias.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    return span_model


def load_base(config: ModelConfig, name: str, max_seq_length: int, device: torch.device) -> LoadedBase:
    """The transformers model in the folder or on the hub under `name`, as the configuration sets it.

    Quantised weights are on `device`, all else is on the CPU; what the model computes with is chosen for `device`.

    Raises:
        UserError: There is no such model, it cannot be loaded, or an option does not fit it.
    """
    from transformers import AutoModelForQuestionAnswering

    with library_errors(lambda error: _not_an_encoder(name, error)), without_library_messages():
        model_config, padding, notes, training_notes = _configured(config, name, max_seq_length, device)
        if config.model_config is not None:
            model = _from_configuration(model_config, padding)
            notes.append(f"all weights of {config.model_config} are random: good for measuring, not for answers")
            # As of a checkpoint without a head; that the rest is random was asked for.
            heads = head_names(model)
            of_heads = [name for name, _ in model.named_parameters() if name.partition(".")[0] in heads]
            return LoadedBase(model, sorted(of_heads), padding, notes, training_notes)
        heads = () if config.quantization == "no" else _heads_of(model_config)
        model, info = AutoModelForQuestionAnswering.from_pretrained(
            weights_folder(name, config),
            config=model_config,
            dtype=torch.float32,
            attn_implementation=_attention(padding),
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **quantization_options(config.quantization, heads, device),
        )
        require_quantized(model, config.quantization, heads)
        if config.quantization != "no":
            keep_stored_weights(model)
            if device.type != "cpu":
                follow_autocast(model)
    return LoadedBase(model, sorted(info["missing_keys"]), padding, notes, training_notes)


def _not_an_encoder(name: str, error: Exception) -> UserError:
    return UserError(
        f"--model_name_or_path {name} cannot be loaded as a question-answering encoder ({reason(error)}); give a "
        "local folder of a transformers model, package:NAME/FOLDER, or a hub id that is reachable or cached"
    )


def _configured(
    config: ModelConfig, name: str, max_seq_length: int, device: torch.device
) -> tuple[Any, Padding, list[str], list[str]]:
    """The configuration of a transformers model as training sets it, its padding, and both kinds of notes."""
    model_config = model_configuration(dataclasses.replace(config, model_name_or_path=name))
    require_trainable(model_config)
    _check_length(model_config, max_seq_length)
    _set_full_attention(model_config, max_seq_length)
    padding, notes = _choose_padding(config, model_config)
    has_none = padding == "unpadded" and not drops_weights(device)
    training_notes = _set_dropout(model_config, config.model_dropout, without_attention=has_none)
    model_config.num_labels = 2
    if padding == "unpadded":
        register()
    return model_config, padding, notes, training_notes


def _attention(padding: Padding) -> str | None:
    return UNPADDED if padding == "unpadded" else None


def _from_configuration(model_config: Any, padding: Padding) -> Any:
    """The transformers model that a configuration describes, with new weights."""
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering.from_config(
        model_config, dtype=torch.float32, attn_implementation=_attention(padding), trust_remote_code=False
    )


def _heads_of(model_config: Any) -> tuple[str, ...]:
    """`head_names` of the model that a configuration describes, without loading it."""
    from transformers import AutoModelForQuestionAnswering

    with torch.device("meta"):
        return head_names(
            AutoModelForQuestionAnswering.from_config(copy.deepcopy(model_config), trust_remote_code=False)
        )


def _choose_padding(config: ModelConfig, model_config: Any) -> tuple[Padding, list[str]]:
    family = family_of(model_config)
    if family.depends_on_padding or family.has_blocks(model_config):
        if config.padding in ("auto", "max_length"):
            note = f"features of a {model_config.model_type} model are padded to --max_seq_length: its logits depend on"
            return "max_length", [f"{note} how far they are padded"]
        raise ConfigError(
            [
                f"--padding {config.padding} does not work for a {model_config.model_type} model, whose logits depend "
                "on how far a feature is padded; use --padding auto or max_length"
            ]
        )
    possible = family.unpadded
    if config.padding == "auto":
        if possible:
            return "unpadded", []
        return "sorted", [
            f"{model_config.model_type} computes attention in its own way: padded batches, sorted by length"
        ]
    if config.padding == "unpadded" and not possible:
        raise ConfigError(
            [
                f"--padding unpadded does not work for a {model_config.model_type} model, only for "
                f"{', '.join(model_types_unpadded())}; use --padding auto or sorted"
            ]
        )
    return config.padding, []


def longest_feature(model_config: Any) -> int | None:
    """Most tokens that a feature of the model with this configuration can have; None if any number."""
    positions: int | None = getattr(model_config, "max_position_embeddings", None)
    # XLNet's -1 stands for any number.
    if positions is None or positions < 0:
        return None
    return positions - family_of(model_config).first_position(model_config)


def _check_length(model_config: Any, max_seq_length: int) -> None:
    longest = longest_feature(model_config)
    if longest is not None and max_seq_length > longest:
        raise ConfigError(
            [f"--max_seq_length {max_seq_length} is more than the {longest} positions of this model; lower it"]
        )


def _set_full_attention(model_config: Any, max_seq_length: int) -> None:
    """Let attention be full from the start where all features are so short that it would be at the first of them."""
    settings = family_of(model_config).full_attention
    if settings and max_seq_length <= longest_full_attention(model_config):
        for name, value in settings.items():
            setattr(model_config, name, value)


def _set_dropout(model_config: Any, probability: float | None, *, without_attention: bool) -> list[str]:
    """Set every dropout probability of the encoder; of whole layers, and of attention if it can have none, to 0."""
    notes = []
    for name, value in list(model_config.to_dict().items()):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if "layerdrop" in name and value:
            # Each rank would skip other layers, and step with gradients that others do not have.
            notes.append(f"no layers are left out at random here: {name} is 0 instead of {value}")
            setattr(model_config, name, 0.0)
        if "dropout" not in name:
            continue
        wanted = value if probability is None else probability
        if without_attention and name == family_of(model_config).attention_dropout and wanted:
            notes.append(f"unpadded attention has no dropout here: {name} is 0 instead of {wanted}")
            wanted = 0.0
        setattr(model_config, name, float(wanted))
    return notes
