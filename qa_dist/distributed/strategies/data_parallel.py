"""Plain data parallelism: every rank holds everything, gradients are averaged once a step."""

import torch
import torch.distributed as dist
from typing_extensions import override

from qa_dist.distributed.engine import MakeOptimizer, TrainableModel
from qa_dist.distributed.strategies.gradient_exchange import GradientExchange
from qa_dist.distributed.strategies.torch_engine import TorchEngine
from qa_dist.distributed.watchdog import Watchdog


class DataParallel(TorchEngine):
    """Every rank holds the whole model, and gradients are averaged once per step, beside its last backward pass.

    The model is not wrapped in DistributedDataParallel, where a rank that runs out of memory in that pass leaves the
    others waiting. Here it sends zeros, and all ranks give the step up.
    """

    holds_shards = False
    forward_needs_all_ranks = False

    def __init__(
        self,
        model: TrainableModel,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        *,
        watchdog: Watchdog,
        scaler: torch.amp.GradScaler | None = None,
        exchange_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, make_optimizer, max_grad_norm, watchdog=watchdog, scaler=scaler)
        if scaler is not None:
            # It makes its tensors for the first loss, which a pass that runs out of memory does not come to.
            scaler.scale(torch.zeros((), device=next(iter(self._parameters.values())).device))
        has_others = dist.is_initialized() and dist.get_world_size() > 1
        self._exchange = GradientExchange(list(self._parameters.values()), exchange_dtype) if has_others else None

    @override
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if self._exchange is None:
            self._backward(loss)
            return
        # Gradients that are kept are those of passes that are replayed, of which no hook hears.
        with self._exchange.backward_pass(sends=last and not self.keeps_gradients):
            self._backward(loss)

    @override
    def dry_backward(self, loss: torch.Tensor) -> None:
        # Ranks try out different passes, so that nothing may be sent.
        self._backward(loss)
        self.zero_grad()

    def _backward(self, loss: torch.Tensor) -> None:
        super().backward(loss if self._scaler is None else self._scaler.scale(loss), last=True)

    @override
    def give_up_step(self) -> None:
        super().give_up_step()
        if self._exchange is not None and not self.keeps_gradients:
            with self.watchdog.waiting():
                self._exchange.send_rest()

    @override
    def sync_gradients(self) -> None:
        if self._exchange is not None:
            with self.watchdog.waiting():
                self._exchange.average()

    @property
    @override
    def exchanged_bytes(self) -> int:
        return 0 if self._exchange is None else self._exchange.num_bytes

    @override
    def optimizer_step(self, learning_rate: float, check: torch.Tensor | None = None) -> torch.Tensor:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        return super().optimizer_step(learning_rate, check)
