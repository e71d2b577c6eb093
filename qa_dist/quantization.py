"""Frozen base weights in 8 or 4 bits, through bitsandbytes: how they are loaded, and a check that they were.

The head, the adapters, embeddings and norms stay in float32.
"""

import logging
from typing import Any, Literal

import torch
from torch import nn

from qa_dist.errors import ConfigError
from qa_dist.requirements import require_bitsandbytes

Quantization = Literal["no", "8bit", "4bit"]


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
    require_bitsandbytes(f"--quantization {kind}")
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        # It says in every layer of every pass that inputs are cast to float16 while they are quantised.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        # A threshold would make columns with outliers, found over all tokens of a batch, an exception: a feature's
        # logits would then depend on its neighbours, and a step on the number of ranks.
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(heads))
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=list(heads),
        )
    return {"quantization_config": settings, "device_map": {"": device}}


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
            found = "not quantised" if name.partition(".")[0] not in heads else "quantised"
            raise ConfigError(
                [f"--quantization {kind} left {name} {found}; this model cannot be quantised, use --quantization no"]
            )


def num_elements(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: 4-bit weights are stored two to a byte."""
    shape: torch.Size | None = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()
