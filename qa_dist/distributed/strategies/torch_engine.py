"""What the engines share whose optimiser is torch's own, stepped here."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from qa_dist.distributed.engine import Engine, MakeOptimizer, TrainableModel, collective
from qa_dist.distributed.strategies.optimizer_state import load_optimizer_tensors, optimizer_tensors
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.model.span_model import Weights


class TorchEngine(Engine):
    """An engine that steps torch's optimiser itself.

    Such engines differ in how a tensor is held: `_whole` and `_shard` go from a rank's shard to the whole tensor and
    back.
    """

    def __init__(
        self,
        model: TrainableModel,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        *,
        watchdog: Watchdog,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(model, watchdog, scaler)
        self.optimizer = make_optimizer(model.trainable())
        self._parameters: dict[str, Any] = dict(model.trainable())
        # clip_grad_norm_ multiplies by max_norm / (norm + 1e-6), which for an infinite max_norm is clamped to 1.
        self._limit = math.inf if max_grad_norm is None else max_grad_norm

    @staticmethod
    def _whole(tensor: Any) -> torch.Tensor:
        whole: torch.Tensor = tensor
        return whole

    @staticmethod
    def _shard(parameter: Any, whole: torch.Tensor) -> Any:
        return whole

    @override
    @collective
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @override
    @collective
    def dry_backward(self, loss: torch.Tensor) -> None:
        self.backward(loss, last=True)
        self.zero_grad()

    @override
    @collective
    def have_gradients(self, names: Sequence[str]) -> list[bool]:
        gradients = {name: self._parameters[name].grad for name in names}
        counts = {name: self._whole(each).count_nonzero() for name, each in gradients.items() if each is not None}
        found = dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True)) if counts else {}
        return [bool(found.get(name)) for name in names]

    @override
    @collective
    def optimizer_step(self, learning_rate: float, check: torch.Tensor | None = None) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        if self.optimizer.defaults.get("fused"):
            norm = self._step_on_device(check)
        else:
            norm = self._whole(nn.utils.clip_grad_norm_(list(self._parameters.values()), self._limit))
            if math.isfinite(norm if check is None else norm + check):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return norm

    def _step_on_device(self, check: torch.Tensor | None) -> torch.Tensor:
        """Step a fused optimiser, which clips and decides on the device; the norm before clipping.

        It divides the gradients by `grad_scale`, which here is 1 over `clip_grad_norm_`'s factor (but for its 1e-6
        against a division by zero), and leaves weights and moments as they are where `found_inf` is 1. Each operation
        costs the host as much as one on a million numbers, so these are few.
        """
        gradients = [each.grad for each in self._parameters.values() if each.grad is not None]
        norm = self._whole(nn.utils.get_total_norm(gradients))
        total = norm if check is None else norm + check
        optimizer: Any = self.optimizer
        # Zero times what is not finite is not zero.
        optimizer.found_inf = (total * 0 != 0).float()
        optimizer.grad_scale = None if math.isinf(self._limit) else (norm / self._limit).clamp(min=1.0)
        optimizer.step()
        return norm

    @override
    @collective
    def weights(self) -> Weights:
        return {
            name: self._whole(parameter.detach()).to("cpu", copy=True) for name, parameter in self._parameters.items()
        }

    @override
    @collective
    def restore(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._shard(parameter, weights[name]))

    @override
    @collective
    def optimizer_tensors(self) -> Weights:
        return optimizer_tensors(self.optimizer, self._parameters.items(), whole=self._whole)

    @override
    @collective
    def load_optimizer_tensors(self, tensors: Weights) -> None:
        shards = {}
        for key, whole in tensors.items():
            parameter = self._parameters[key.partition("/")[2]]
            shards[key] = self._shard(parameter, whole) if whole.shape == parameter.shape else whole
        load_optimizer_tensors(self.optimizer, self._parameters.items(), shards)
