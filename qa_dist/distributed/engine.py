"""The model and its optimiser as all ranks hold them: what a training step asks, whatever the strategy.

Each strategy is an `Engine` (`qa_dist.distributed.strategies`). What an engine takes and gives is the same for all:
micro-batches with one loss each, a gradient norm from before clipping, whole tensors by name. So is the mathematics:
float32 weights, the mean of the ranks' gradients, AdamW with float32 moments. A run may change its strategy without
changing its result. Moments of 8 bits (`--optim adamw_8bit`) are for models that are whole on every rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from qa_dist.distributed.watchdog import Watchdog
from qa_dist.model.span_model import Weights

NamedParameters = Iterable[tuple[str, nn.Parameter]]

MakeOptimizer = Callable[[NamedParameters], torch.optim.Optimizer]

E = TypeVar("E", bound="Engine")
P = ParamSpec("P")
R = TypeVar("R")


class TrainableModel(Protocol):
    """A torch module, as an engine sees it."""

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of every trainable parameter, in one order on all ranks."""

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers: what is gathered and freed at once."""

    def shift_invariant_biases(self) -> Mapping[str, nn.Parameter]:
        """Trainable parameters by name whose gradient is zero but for rounding, and must be zero."""


def collective(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Decorator of what all ranks must call together where they hold shards: the watchdog knows that a rank waits."""

    @wraps(method)
    def watched(self: E, /, *args: P.args, **options: P.kwargs) -> R:
        if not self.holds_shards:
            return method(self, *args, **options)
        with self.watchdog.waiting():
            return method(self, *args, **options)

    return watched


class Engine(ABC):
    """A model and its optimiser, held by all ranks together.

    Attributes:
        module: what a forward pass of training calls, inside `Ranks.autocast`.
        holds_shards: whether ranks hold shards of the model or its optimiser: then none can take a step or save the
            model alone, and a step cannot be given up and repeated when one rank fails in the middle of it.
        forward_needs_all_ranks: whether a forward pass gathers shards, so that all ranks must do it together,
            evaluation included.
        watchdog: knows when this rank waits for others.
        keeps_gradients: whether gradients are zeroed where they are, for passes that add to them there, instead of
            being dropped; only where no shards are held.
    """

    holds_shards: ClassVar[bool]
    forward_needs_all_ranks: bool

    def __init__(self, module: Any, watchdog: Watchdog, scaler: torch.amp.GradScaler | None = None) -> None:
        self.module = module
        self.watchdog = watchdog
        self._scaler = scaler
        self.keeps_gradients = False

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch to this rank's; `last` is that of the step."""

    @abstractmethod
    def dry_backward(self, loss: torch.Tensor) -> None:
        """A backward pass that takes the memory of one and leaves no gradients."""

    def zero_grad(self) -> None:
        """Drop this rank's gradients of a step that is given up, which can only be where no shards are held."""
        self.module.zero_grad(set_to_none=not self.keeps_gradients)

    def give_up_step(self) -> None:
        """Drop this rank's gradients of a step of which it cannot finish its passes; to the others they are zeros.

        Only where no shards are held. `sync_gradients` must follow, as after passes that were finished.
        """
        self.zero_grad()

    @abstractmethod
    def sync_gradients(self) -> None:
        """After the last backward pass of a step: every gradient is the mean over the ranks from here on."""

    @abstractmethod
    def have_gradients(self, names: Sequence[str]) -> list[bool]:
        """Whether the synchronised gradient of each of these parameters is not zero; all ranks must ask together."""

    @abstractmethod
    def optimizer_step(self, learning_rate: float, check: torch.Tensor | None = None) -> torch.Tensor:
        """Clip, take the optimiser's step and drop the gradients; the global L2 norm of the gradients before clipping.

        Nothing is updated if the norm is not finite, or if `check` is not: a number [], None: nothing else is checked.
        The norm is a tensor [] on any device; where the optimiser can be told on the device whether to step, the host
        waits for nothing. `conclude_step` must be called before the next step.
        """

    def conclude_step(self, *, is_whole: bool) -> None:
        """After `optimizer_step`, when the host knows whether every rank's gradients were in it."""
        if self._scaler is None:
            return
        if is_whole:
            # It lowers the scale if `unscale_` has seen a gradient overflow.
            self._scaler.update()
        else:
            # A step that is repeated says nothing about the scale.
            self._scaler.update(self._scaler.get_scale())

    @abstractmethod
    def weights(self) -> Weights:
        """A copy of the trainable tensors by name, whole, on the CPU of every rank; all ranks must ask together."""

    @abstractmethod
    def restore(self, weights: Weights) -> None:
        """Put the whole tensors of `weights` back; all ranks must do it together."""

    @abstractmethod
    def optimizer_tensors(self) -> Weights:
        """A copy of the optimiser's state, whole, on the CPU, as `kind/parameter`: `exp_avg/...`, `step/...`.

        All ranks must ask together.
        """

    @abstractmethod
    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """Put such a state back, whatever strategy it is from; all ranks must do it together."""

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of gradients that this rank has added up with the others' in a step; 0 if a library does that."""
        return 0

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied with before their backward pass; None where they are not."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    def scaler_state(self) -> dict[str, float] | None:
        """Scale and growth of the loss scaling, as plain numbers; None without it."""
        return None if self._scaler is None else dict(self._scaler.state_dict())

    def load_scaler_state(self, state: Mapping[str, float] | None) -> None:
        """Put back what `scaler_state` returned."""
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(dict(state))
