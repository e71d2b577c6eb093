"""The type of the residual stream: of what layers pass to each other, and norms read and write.

Autocast multiplies matrices in bfloat16 and leaves norms in float32, on CUDA by name and on CPUs because their weights
are: so the stream is float32, each addition of a bfloat16 output to it gives float32, and each matrix product begins
with a cast. With norms that give bfloat16 all of it is bfloat16, which is half of what is read and written between the
products.
"""

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from qa_dist.common.errors import ConfigError
from qa_dist.model.span_model import SpanModel, head_names, transformers_model


class HalfStreamNorm(nn.LayerNorm):
    """A layer norm that gives bfloat16 inside autocast of that type, and is torch's own everywhere else.

    Mean and variance are computed in float32, inside torch's kernel; input, weight, bias and output are rounded. Made
    of a layer norm by changing its class: the weights stay where they are, under their names.
    """

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        if not _is_in_bfloat16(kind):
            return super().forward(input)
        bias: torch.Tensor | None = self.bias
        weight = self.weight.to(torch.bfloat16)
        # CUDA's autocast would compute it in float32.
        with torch.autocast(kind, enabled=False):
            return nn.functional.layer_norm(
                input.to(torch.bfloat16),
                self.normalized_shape,
                weight,
                None if bias is None else bias.to(torch.bfloat16),
                self.eps,
            )


def _is_in_bfloat16(kind: str) -> bool:
    """Whether autocast to bfloat16 is on, on devices of this kind."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def _rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a layer with the first of them, the stream, in bfloat16."""
    stream, *others = inputs
    return (stream.to(torch.bfloat16) if _is_in_bfloat16(stream.device.type) else stream, *others)


def set_residual_dtype(model: SpanModel, dtype: str) -> None:
    """Let the residual stream of a model have the type that `--residual_dtype` names, in bfloat16 autocast.

    Args:
        model: The model, before its tensors are sharded; nothing is changed for float32.
        dtype: "float32" or "bf16".

    Raises:
        ConfigError: The stream of this model cannot be bfloat16.
    """
    if dtype != "bf16":
        return
    plain = transformers_model(model.model)
    if model.padding != "unpadded":
        raise ConfigError(
            [
                f"--residual_dtype bf16 is for models whose rows are computed without padding, and this "
                f"{plain.config.model_type} model's are not; use --residual_dtype float32"
            ]
        )
    heads = head_names(plain)
    for name, layer in plain.named_modules():
        if type(layer) is nn.LayerNorm and name.partition(".")[0] not in heads:
            layer.__class__ = HalfStreamNorm
    # Not all embeddings end with a norm.
    for block in model.blocks()[:1]:
        block.register_forward_pre_hook(_rounded)
