"""Dropout whose masks cost little on a CPU.

Torch draws a mask on the CPU with one Bernoulli variate per element, which takes ten times as long as the product with
it. Here one 64-bit draw decides four elements, 16 bits each: the probability is rounded to a multiple of 1/65536, and
the scale is that of the rounded one, so that the expectation is exact.
"""

import numpy as np
import torch
from torch import nn

from qa_dist.model.span_model import SpanModel, transformers_model

_LEVELS = 1 << 16


class CheapDropout(nn.Dropout):
    """`nn.Dropout` with other random numbers, drawn from torch's default generator."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` with a share `p` of its elements at zero and the rest scaled up; `input` itself in evaluation."""
        dropped = round(self.p * _LEVELS)
        if not self.training or not dropped:
            return input
        if dropped == _LEVELS:
            return input * 0.0
        draws = torch.empty((input.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        levels = draws.view(torch.int16)[: input.numel()].view(input.shape)
        mask = (levels >= dropped - _LEVELS // 2).to(input.dtype).mul_(_LEVELS / (_LEVELS - dropped))
        return input * mask


def use_cheap_dropout(model: nn.Module) -> int:
    """Put `CheapDropout` in the place of every `nn.Dropout` of a model on the CPU; returns how many there were."""
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Dropout
    ]
    for module, name, child in places:
        setattr(module, name, CheapDropout(child.p).train(child.training))
    return len(places)


def has_dropout(model: SpanModel) -> bool:
    """Whether anything of a model drops something in training: a module of it, or by a number of its configuration.

    Some models drop by a function, as attention's weights are dropped in most.
    """
    settings = transformers_model(model.model).config.to_dict()
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or any(
        "dropout" in name and isinstance(value, float) and value > 0 for name, value in settings.items()
    )


def seed_dropout(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make the masks of a step depend on (seed, step, rank) alone, so that a resumed run draws the same ones.

    They are drawn from torch's default generator of the device, which is seeded.
    """
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    # The generator of this device alone: `torch.manual_seed` goes through those of all kinds of devices, and for those
    # that have not been used yet notes the call and its stack each time.
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)
