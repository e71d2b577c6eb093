"""Casts that autocast would repeat in every pass of a model with adapters, done once or left out.

Autocast rounds the weights of every linear layer in every pass, and the copies of frozen ones live until the backward
pass is over. Held rounded, they give the same results to the last bit and take half the memory. peft casts the input of
every adapter up to float32, which autocast casts down again.
"""

import torch
from torch import nn

from qa_dist.config.options import ModelConfig
from qa_dist.model.families import UNKNOWN, family_of
from qa_dist.model.precision import DTYPES, Precision
from qa_dist.model.residual_stream import HalfStreamNorm
from qa_dist.model.span_model import SpanModel, head_names, transformers_model


def remove_redundant_casts(
    model: SpanModel, config: ModelConfig, precision: Precision, device: torch.device, *, shards_one_type: bool
) -> None:
    """Change a model that is called in `autocast` alone, so that there is less to cast and the results are the same.

    Args:
        model: The model, before its tensors are moved or sharded.
        config: What it was built from.
        precision: What autocast multiplies in.
        device: Where the model will compute.
        shards_one_type: Whether the ranks hold shards in which all tensors must have one type, as DeepSpeed does.
    """
    # DoRA computes norms of frozen weights, which autocast does not round; an architecture without a row in the table
    # of families may use them in any other way.
    is_known = family_of(transformers_model(model.model).config) is not UNKNOWN
    if precision == "no" or config.tuning != "lora" or config.use_dora or not is_known:
        return
    if not shards_one_type:
        round_frozen(model, DTYPES[precision])
    # A CPU rounds the masks of dropout to the type of the input; CUDA multiplies in float32 and rounds the product.
    if config.lora_dropout == 0 or device.type != "cpu":
        leave_inputs_of_adapters(model)


def round_frozen(model: SpanModel, dtype: torch.dtype) -> None:
    """Hold frozen weights and biases in this type: those of plain linear layers, and of norms that give bfloat16.

    Those of the head stay.
    """
    plain = transformers_model(model.model)
    heads = head_names(plain)
    for name, layer in plain.named_modules():
        if type(layer) not in (nn.Linear, HalfStreamNorm) or name.partition(".")[0] in heads:
            continue
        for kind, parameter in list(layer.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                setattr(layer, kind, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def leave_inputs_of_adapters(model: SpanModel) -> None:
    """Let adapters take their input in the type that it has."""
    from peft.tuners.lora.layer import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
