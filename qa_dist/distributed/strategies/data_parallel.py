"""Plain data parallelism: every rank holds everything, gradients are averaged once a step."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from typing_extensions import override

from qa_dist.distributed.launch_config import GRADIENT_BUCKET
from qa_dist.distributed.strategies.torch_engine import TorchEngine


class DataParallel(TorchEngine):
    """Every rank holds the whole model, and gradients are averaged once per step.

    The model is not wrapped in DistributedDataParallel: that would exchange gradients inside the last backward pass,
    where a rank that runs out of memory leaves the others waiting. Here all ranks first agree that the step is whole.
    """

    holds_shards = False
    forward_needs_all_ranks = False

    @override
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        super().backward(loss if self._scaler is None else self._scaler.scale(loss), last=last)

    @override
    def sync_gradients(self) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # Every rank sends all of them, whichever it has: one that ran out of memory has none, and sends zeros.
        with self.watchdog.waiting():
            for bucket in _buckets(list(self._parameters.values())):
                flat = torch.cat([_flat_gradient(parameter) for parameter in bucket])
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
                pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
                for parameter, piece in zip(bucket, pieces, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.copy_(piece.view_as(parameter))

    @override
    def optimizer_step(self, learning_rate: float, check: torch.Tensor | None = None) -> torch.Tensor:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        return super().optimizer_step(learning_rate, check)


def _flat_gradient(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
    return parameter.grad.reshape(-1)


def _buckets(tensors: Sequence[torch.Tensor], most_elements: int = GRADIENT_BUCKET) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype together, at most `most_elements` of them (64 MiB of float32), in the order given."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size + tensor.numel() > most_elements or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
