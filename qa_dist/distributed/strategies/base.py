"""What a strategy is: a model and its optimiser, held by all ranks together."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from qa_dist.distributed.strategies.optimizer_state import load_optimizer_tensors, optimizer_tensors
from qa_dist.model.span_model import Weights

NamedParameters = Iterable[tuple[str, nn.Parameter]]


MakeOptimizer = Callable[[NamedParameters], torch.optim.Optimizer]


class Trained(Protocol):
    """A model as a strategy sees it, beside being a module."""

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of every trainable parameter, in one order on all ranks."""

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers: what is gathered and freed at once."""

    def unmoved(self) -> list[str]:
        """Names of trainable parameters whose gradient is zero but for rounding, and must be zero."""


class Strategy(Protocol):
    """A model and its optimiser, held by all ranks together.

    Attributes:
        module: what a forward pass of training calls.
        is_collective: whether a pass through the model needs all ranks, evaluation included.
        is_shared: whether ranks hold the model or its optimiser in shares: then a step cannot be given up and repeated
            when one rank fails in the middle of it.
    """

    module: nn.Module
    is_collective: bool
    is_shared: bool

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` is that of the step."""

    def rehearse(self, loss: torch.Tensor) -> None:
        """A backward pass that takes the memory of one and leaves no gradients."""

    def exchange(self) -> None:
        """After the last backward pass: make the gradients the mean over the ranks, if they are not yet."""

    def has_gradient(self, name: str) -> bool:
        """Whether the exchanged gradient of a trainable parameter is not zero; all ranks must ask together."""

    def update(self, learning_rate: float) -> float:
        """Clip, take the optimiser's step and drop the gradients; the global L2 norm before clipping.

        Nothing is updated if the norm is not finite.
        """

    def weights(self) -> Weights:
        """A copy of the trainable tensors by name, whole, on the CPU of every rank; all ranks must ask together."""

    def restore(self, weights: Weights) -> None:
        """Put whole tensors back; all ranks must do it together."""

    def optimizer_tensors(self) -> Weights:
        """A copy of the optimiser's state, whole, on the CPU, as `kind/parameter`; all ranks must ask together."""

    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """Put such a state back, whatever strategy it is from; all ranks must do it together."""


class _TorchOptimizer:
    """What strategies share whose optimiser is torch's own, stepped here.

    They differ in how a tensor is held: `_whole` and `_share` go from a rank's share to the whole tensor and back.
    """

    def __init__(
        self, model: nn.Module, trained: Trained, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        self.module: Any = model
        self.optimizer = make_optimizer(trained.trainable())
        self._parameters: dict[str, Any] = dict(trained.trainable())
        # clip_grad_norm_ multiplies by max_norm / (norm + 1e-6), which for an infinite max_norm is clamped to 1.
        self._limit = math.inf if max_grad_norm is None else max_grad_norm

    @staticmethod
    def _whole(tensor: Any) -> torch.Tensor:
        whole: torch.Tensor = tensor
        return whole

    @staticmethod
    def _share(parameter: Any, whole: torch.Tensor) -> Any:
        return whole

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def rehearse(self, loss: torch.Tensor) -> None:
        """See `Strategy`."""
        self.backward(loss, last=True)
        self.optimizer.zero_grad(set_to_none=True)

    def has_gradient(self, name: str) -> bool:
        """See `Strategy`."""
        gradient = self._parameters[name].grad
        return gradient is not None and bool(self._whole(gradient).count_nonzero())

    def update(self, learning_rate: float) -> float:
        """See `Strategy`."""
        norm = float(self._whole(nn.utils.clip_grad_norm_(list(self._parameters.values()), self._limit)))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Weights:
        """See `Strategy`."""
        return {
            name: self._whole(parameter.detach()).to("cpu", copy=True) for name, parameter in self._parameters.items()
        }

    def restore(self, weights: Weights) -> None:
        """See `Strategy`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._share(parameter, weights[name]))

    def optimizer_tensors(self) -> Weights:
        """See `Strategy`."""
        return optimizer_tensors(self.optimizer, self._parameters.items(), whole=self._whole)

    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """See `Strategy`."""
        shares = {}
        for key, whole in tensors.items():
            parameter = self._parameters[key.partition("/")[2]]
            shares[key] = self._share(parameter, whole) if whole.shape == parameter.shape else whole
        load_optimizer_tensors(self.optimizer, self._parameters.items(), shares)
