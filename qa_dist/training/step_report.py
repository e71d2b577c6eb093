"""What the ranks tell each other about a step, in one tensor, which each reads once, when the step is behind it.

Reading a value makes the host wait for the GPU, which then idles until the host has enqueued more work. So what decides
whether a step counts stays on the device, and the host reads it once, when all of the step is enqueued.
"""

import math
from dataclasses import dataclass

import torch

from qa_dist.distributed.ranks import Ranks

_OUT_OF_MEMORY, _STOP, _NORM = -3, -2, -1
"""Places behind the losses: infinity if a rank ran out of memory, how many were asked to stop, the gradient's norm."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step, on the host; the same on all ranks.

    Attributes:
        losses: float64 [G_step], of every feature of the step; means nothing where memory was short.
        is_out_of_memory: whether some rank had too little memory, so that nothing has changed.
        stop: whether some rank was asked to stop.
        grad_norm: the gradient's norm before clipping.
    """

    losses: torch.Tensor
    is_out_of_memory: bool
    stop: bool
    grad_norm: float


class StepReport:
    """The report of a step, on the device: float64 [G_step + 3]."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self._values = torch.zeros(num_features + 3, device=device, dtype=torch.float64)

    def add_losses(self, places_B: torch.Tensor, losses_B: torch.Tensor) -> None:
        """Note the losses of features at these places of the global batch."""
        self._values[places_B] = losses_B.detach().double()

    def note_out_of_memory(self) -> None:
        """Note that this rank had too little memory."""
        self._values[_OUT_OF_MEMORY] = math.inf

    def exchange(self, ranks: Ranks) -> None:
        """Tell the others, and hear from them."""
        if ranks.is_asked_to_stop:
            self._values[_STOP] = 1.0
        ranks.sum(self._values[:_NORM])

    def check(self) -> torch.Tensor:
        """A number that is finite if the gradient may be used: float64 [], on the device, the same on all ranks.

        It is the sum of the losses, in one operation, to which one rank out of memory has added infinity.
        """
        return self._values[:_STOP].sum()

    def note_norm(self, norm: torch.Tensor) -> None:
        """Note the gradient's norm."""
        self._values[_NORM] = norm

    def read(self) -> Outcome:
        """Wait until the step is done; the one read of it."""
        values = self._values.cpu()
        short, stop, norm = values[_OUT_OF_MEMORY:].tolist()
        return Outcome(values[:_OUT_OF_MEMORY], bool(short), bool(stop), norm)
