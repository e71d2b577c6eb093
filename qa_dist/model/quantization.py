"""Frozen base weights in 8 or 4 bits, through bitsandbytes: how they are loaded, and a check that they were.

The head, the adapters, embeddings and norms stay in float32. On CUDA the quantised layers multiply in the type of
autocast, as other linear layers do; on CPUs, where that would take longer, in float32.
"""

import logging
from typing import Any, Literal

import torch
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.machine.requirements import require_package

Quantization = Literal["no", "8bit", "4bit"]

_NF4_BLOCK = 64
"""Weights that share a scale in 4 bits: the default of bitsandbytes, and of its paper."""


def quantization_options(kind: Quantization, heads: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` that load linear layers quantised, onto the rank's own device.

    Args:
        kind: "8bit" for LLM.int8 (Dettmers et al. 2022), "4bit" for NF4 (Dettmers et al. 2023), "no" for none of it.
        heads: Modules that stay as they are.
        device: Where the rank computes.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if kind == "no":
        return {}
    require_package("bitsandbytes", f"--quantization {kind}")
    return {"quantization_config": _settings(kind, heads), "device_map": {"": device}}


def _settings(kind: Quantization, heads: tuple[str, ...]) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        # It says in every layer of every pass that inputs are cast to float16 while they are quantised.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        # A threshold would make columns with outliers, found over all tokens of a batch, an exception: a feature's
        # logits would then depend on its neighbours, and a step on the number of ranks.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(heads))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(heads),
    )


def quantize_meta_model(model: Any, kind: Quantization, heads: tuple[str, ...]) -> None:
    """Give a model on the meta device the layers, the shapes and the scales that quantised loading gives.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if kind == "no":
        return
    require_package("bitsandbytes", f"--quantization {kind}")
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    replace_with_bnb_linear(model, list(heads), _settings(kind, heads))
    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            # A scale per row.
            weight = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
            scales = torch.empty(layer.out_features, device="meta")
            layer.weight = Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
        elif isinstance(layer, Linear4bit):
            # Two numbers to a byte, and a scale per block of 64.
            shape = layer.weight.shape
            absmax = torch.empty(-(-shape.numel() // _NF4_BLOCK), device="meta")
            code = torch.empty(16, device="meta")
            state = QuantState(absmax, shape, code, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=torch.float32)
            packed = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            layer.weight = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
            layer.quant_state = state
    # By these peft knows which kind of adapter goes around them.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "8bit", kind == "4bit"


def require_quantized(model: nn.Module, kind: Quantization, heads: tuple[str, ...]) -> None:
    """Make sure that all linear layers but the heads' are quantised, and those are not.

    Raises:
        ConfigError: A library did not do what was asked.
    """
    if kind == "no":
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    wanted = Linear8bitLt if kind == "8bit" else Linear4bit
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module, wanted) == (name.partition(".")[0] in heads):
            state = "not quantised" if name.partition(".")[0] not in heads else "quantised"
            raise ConfigError(
                [f"--quantization {kind} left {name} {state}; this model cannot be quantised, use --quantization no"]
            )


def keep_stored_weights(model: nn.Module) -> None:
    """Let 4-bit layers multiply by the weights that were stored, on every processor.

    On CPUs with AVX512-BF16, layers of bitsandbytes 0.50 exchange theirs in the first evaluation for others, with
    scales in bfloat16: a run would go on from other weights after an evaluation than without one. Rows of fewer than
    64 weights, the block of a scale, end it.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def follow_autocast(model: nn.Module) -> None:
    """Let quantised layers multiply, forward and backward, in the type of autocast where they are called inside it.

    By themselves (bitsandbytes 0.50) they multiply and answer in the type of their input, which behind a norm is
    float32, and 4-bit layers in the type that they were loaded for.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            layer.register_forward_pre_hook(_in_autocast_type)


def _in_autocast_type(layer: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    kind = arguments[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    # Linear8bitLt has no such attribute, and computes in the type of its input.
    layer.compute_dtype = dtype
    return arguments[0].to(dtype), *arguments[1:]


def num_elements(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: 4-bit weights are stored two to a byte."""
    shape: torch.Size | None = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()
