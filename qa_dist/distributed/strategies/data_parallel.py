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
        if self.keeps_gradients and _has_others():
            _lay_out_gradients(list(self._parameters.values()))
        super().backward(loss if self._scaler is None else self._scaler.scale(loss), last=last)

    @override
    def sync_gradients(self) -> None:
        if not _has_others():
            return
        # Every rank sends all of them, whichever it has: one that ran out of memory has none, and sends zeros.
        with self.watchdog.waiting():
            for bucket in _buckets(list(self._parameters.values())):
                together = _lying_together(bucket)
                flat = torch.cat([_flat_gradient(each) for each in bucket]) if together is None else together
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
                if together is not None:
                    continue
                pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
                for parameter, piece in zip(bucket, pieces, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.copy_(piece.view_as(parameter))

    @override
    def optimizer_step(self, learning_rate: float, check: torch.Tensor | None = None) -> torch.Tensor:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        return super().optimizer_step(learning_rate, check)


def _has_others() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _lay_out_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Give parameters gradients of zero, those of a bucket one behind the other, if none has any."""
    if not all(parameter.grad is None for parameter in parameters):
        return
    for bucket in _buckets(parameters):
        sizes = [parameter.numel() for parameter in bucket]
        flat = torch.zeros(sum(sizes), dtype=bucket[0].dtype, device=bucket[0].device)
        for parameter, piece in zip(bucket, torch.split(flat, sizes), strict=True):
            parameter.grad = piece.view_as(parameter)


def _lying_together(bucket: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The gradients of a bucket as one tensor, if they lie one behind the other; it is what their concatenation is.

    So a rank that has to concatenate its own sends the same numbers in the same places.
    """
    first = bucket[0].grad
    if first is None:
        return None
    end = first.storage_offset()
    for parameter in bucket:
        gradient = parameter.grad
        if gradient is None or not gradient.is_contiguous() or gradient.storage_offset() != end:
            return None
        if gradient.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += gradient.numel()
    return first.as_strided((end - first.storage_offset(),), (1,), first.storage_offset())


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
