"""Floating-point operations that a training step needs, and how many a second this device can do.

Only the matrix products of the model count, on real tokens alone, each multiply-add as two operations: the model FLOPs
of Chowdhery et al. 2022 (PaLM, appendix B), without anything computed twice under gradient checkpointing and without
padding. A feature of L tokens needs, forward,

    2 * (weights of all linear layers) * L    +    4 * hidden * L * L  for each attention layer.

Backward, a linear layer needs as much again for the gradient of its input and as much again for that of its weight,
each only if it is computed: behind frozen weights only the inputs' gradients are, and below the first adapter not even
those. Attention needs twice its forward products. So full training costs three times the forward pass, LoRA on a frozen
base a little over two times.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qa_dist.benchmarking.measuring import synchronize
from qa_dist.model.lora_layers import computed_by_peft
from qa_dist.model.precision import autocast
from qa_dist.model.span_model import SpanModel, transformers_model

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of forward and backward pass.

    Attributes:
        per_token: of the linear layers, for each token.
        per_token_pair: of attention, for each pair of tokens of a feature.
        products: (inputs, outputs) of the encoder's linear layers, adapters left out, and how many there are.
    """

    per_token: int
    per_token_pair: int
    products: Mapping[tuple[int, int], int]

    def of(self, lengths: Iterable[int]) -> int:
        """Operations for features of these lengths."""
        return sum(self.per_token * length + self.per_token_pair * length * length for length in map(int, lengths))

    @classmethod
    def of_training(cls, model: SpanModel) -> "StepFlops":
        """What training this model needs, found by watching which linear layers a forward pass calls, and how."""
        per_token = 0
        products: Counter[tuple[int, int]] = Counter()

        def watch(name: str, layer: nn.Linear) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                nonlocal per_token
                forward = 2 * layer.in_features * layer.out_features
                gradients = int(inputs[0].requires_grad) + int(layer.weight.requires_grad)
                per_token += forward * (1 + gradients * int(output.requires_grad))
                if "lora_" not in name and min(layer.in_features, layer.out_features) > 2:
                    products[layer.in_features, layer.out_features] += 1

            return layer.register_forward_hook(hook)

        device = next(model.parameters()).device
        with ExitStack() as stack:
            # Groups of adapters call none of their parts.
            stack.enter_context(computed_by_peft(model))
            for name, part in model.named_modules():
                if isinstance(part, nn.Linear):
                    stack.callback(watch(name, part).remove)
            zeros = torch.zeros(_PROBE_TOKENS, dtype=torch.int64, device=device)
            # Frozen weights may be held in half precision, which only autocast multiplies with others.
            with autocast(device.type, "bf16"):
                model(zeros, zeros, (_PROBE_TOKENS,))
        config = transformers_model(model.model).config
        # Scores and weighted sum forward; the gradients of query, key, weights and value backward.
        per_pair = 3 * 4 * config.hidden_size * config.num_hidden_layers
        return cls(per_token, per_pair, dict(products))


def matmul_rates(
    products: Mapping[tuple[int, int], int],
    *,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[float]:
    """Operations per second of a model's own matrix products and nothing else, one figure for each pass over them.

    A pass multiplies `num_tokens` rows by a weight matrix of each shape in `products`, as often as the model has it,
    into memory that is there already. Passes go on for `seconds`; there are at least three.
    """
    tensors = [
        (
            torch.randn(num_tokens, inputs, dtype=dtype, device=device),
            torch.randn(outputs, inputs, dtype=dtype, device=device).T,
            torch.empty(num_tokens, outputs, dtype=dtype, device=device),
            count,
        )
        for (inputs, outputs), count in products.items()
    ]
    operations = sum(2 * num_tokens * inputs * outputs * count for (inputs, outputs), count in products.items())
    rates: list[float] = []
    with torch.inference_mode():
        begin = time.perf_counter()
        while len(rates) < 4 or time.perf_counter() - begin < seconds:
            synchronize(device)
            started = time.perf_counter()
            for rows, weights, result, count in tensors:
                for _ in range(count):
                    torch.mm(rows, weights, out=result)
            synchronize(device)
            rates.append(operations / (time.perf_counter() - started))
    # The first pass warms up.
    return rates[1:]
