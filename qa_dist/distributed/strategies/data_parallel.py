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
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        with self.watchdog.waiting():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
                pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
                for gradient, piece in zip(bucket, pieces, strict=True):
                    gradient.copy_(piece.view_as(gradient))

    @override
    def optimizer_step(self, learning_rate: float) -> float:
        if self._scaler is None:
            return super().optimizer_step(learning_rate)
        self._scaler.unscale_(self.optimizer)
        norm = super().optimizer_step(learning_rate)
        # It lowers the scale if `unscale_` has seen a gradient overflow.
        self._scaler.update()
        return norm


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
