"""An exponential average of the trained weights: what is evaluated and saved where `--ema_decay` asks for it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from qa_dist.model.span_model import Weights

PREFIX = "average/"
"""What the names of its tensors begin with in a checkpoint, beside the optimiser's."""


class WeightAverage:
    """The average of some parameters over the steps, on their devices.

    After step t, counted from 0, it is `k * average + (1 - k) * weights` with `k = min(decay, (1 + t) / (10 + t))`:
    less is kept in the first steps, as the weights that training starts from are no part of what it looks for
    (tf.train.ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._decay = decay
        named = list(named_parameters)
        self._names = [name for name, _ in named]
        self._parameters = [parameter.detach() for _, parameter in named]
        self._averages = [parameter.clone() for parameter in self._parameters]

    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        kept = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model has the average; behind it, its own weights to the last bit."""
        own = [parameter.clone() for parameter in self._parameters]
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(own)

    def take_over(self) -> None:
        """Give the model the average for good."""
        self._put(self._averages)

    def tensors(self) -> Weights:
        """Copies on the CPU, for a checkpoint."""
        return {
            f"{PREFIX}{name}": average.to("cpu", copy=True)
            for name, average in zip(self._names, self._averages, strict=True)
        }

    def restore(self, tensors: Weights) -> None:
        """Put back what `tensors` returned."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(tensors[f"{PREFIX}{name}"])

    def _put(self, tensors: Sequence[torch.Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.copy_(tensor)
