"""Gradients averaged over the ranks: views of flat buffers, which the backend adds up.

Neighbouring parameters share a buffer, their bucket. A backward pass begins with the last layers, so the last bucket
goes first: in a step's last pass each is sent as soon as its gradients are there, while the pass goes on below. When a
bucket goes may differ from rank to rank, the order never does, or ranks would add up what does not belong together.

A rank that cannot finish its passes sends what is still missing as zeros, for which it needs no memory, so that no
other one waits; all hear of it behind the last bucket. `DistributedDataParallel` can do neither: after a pass that was
broken off its reducer waits for the rest of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from qa_dist.distributed.launch_config import GRADIENT_BUCKET


class GradientExchange:
    """Averages the gradients of some parameters over all ranks, each of which has one of the same parameters."""

    def __init__(self, parameters: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Prepare to exchange in a type; the buffers are made when the first pass needs them."""
        self._dtype = dtype
        self._groups = neighbours(parameters, GRADIENT_BUCKET)[::-1]
        self._made: list[_Bucket] = []
        self._works: list[Any] = []
        # In a pass, how many gradients of each bucket are still to come.
        self._missing: list[int] | None = None
        self._sends = False
        # A single bucket is ready when the pass is over.
        for place, group in enumerate(self._groups if len(self._groups) > 1 else ()):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(partial(self._note, place))  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """What a rank sends of its own in a step."""
        return sum(tensor.numel() for group in self._groups for tensor in group) * self._dtype.itemsize

    @contextmanager
    def backward_pass(self, *, sends: bool) -> Iterator[None]:
        """Context of a backward pass; behind it gradients lie in the buffers, and with `sends` these are on their way.

        Buckets are sent during the pass, each when it is complete and its predecessors are under way.
        """
        self._missing, self._sends = [len(group) for group in self._groups], sends
        try:
            yield
        finally:
            self._missing = None
        if sends:
            self.send_rest()
        else:
            for bucket in self._buckets:
                bucket.take_in()

    def send_rest(self) -> None:
        """Send the buckets that were not, with zeros for gradients that are not there."""
        while len(self._works) < len(self._groups):
            self._buckets[len(self._works)].take_in()
            self._send_next()

    def average(self) -> None:
        """Make every gradient the mean over the ranks, whatever has been sent by now."""
        self.send_rest()
        for bucket, work in zip(self._buckets, self._works, strict=True):
            work.wait()
            bucket.receive()
        self._works.clear()

    def _note(self, place: int, _: torch.Tensor) -> None:
        """A gradient of this bucket is there, as far as this pass goes; passes of others are none of our business."""
        if self._missing is None:
            return
        if place < len(self._works):
            raise RuntimeError("a gradient came when its bucket had been sent: the pass computes it more than once")
        self._missing[place] -= 1
        if self._missing[place] == 0:
            # In an earlier pass of the step too, so that no more than a bucket is held twice.
            self._buckets[place].take_in()
        while self._sends and len(self._works) < len(self._groups) and self._missing[len(self._works)] == 0:
            self._send_next()

    def _send_next(self) -> None:
        self._works.append(self._buckets[len(self._works)].send())

    @property
    def _buckets(self) -> "list[_Bucket]":
        if not self._made:
            self._made = [_Bucket(group, self._dtype) for group in self._groups]
        return self._made


class _Bucket:
    """Parameters, and a flat buffer in which their gradients lie one behind the other.

    What is sent is this buffer, or a copy in another type, for which there is a buffer too.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self._parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self._sent = self._flat if dtype == self._flat.dtype else torch.empty_like(self._flat, dtype=dtype)
        pieces = torch.split(self._flat, sizes)
        self._views = [piece.view_as(each) for piece, each in zip(pieces, parameters, strict=True)]

    def send(self) -> Any:
        """Begin to average over the ranks; `receive` is for when the work that is returned has been waited for."""
        if self._sent is self._flat:
            return dist.all_reduce(self._sent, op=dist.ReduceOp.AVG, async_op=True)
        self._sent.copy_(self._flat)
        # Divided later, in float32: NCCL multiplies by 1 / W in the type that it adds up in.
        return dist.all_reduce(self._sent, async_op=True)

    def receive(self) -> None:
        """Let the gradients be what came."""
        if self._sent is not self._flat:
            self._flat.copy_(self._sent).div_(dist.get_world_size())

    def take_in(self) -> None:
        """Let gradients lie in the buffer; a parameter without one has zeros there, and goes on without one."""
        gradients = [parameter.grad for parameter in self._parameters]
        places = list(zip(self._parameters, gradients, self._views, strict=True))
        others = [gradient for _, gradient, view in places if gradient is not None and gradient is not view]
        if len(others) == len(places):
            torch.cat([gradient.reshape(-1) for gradient in others], out=self._flat)
        for parameter, gradient, view in places:
            if gradient is None:
                # The parameter stays without: with a gradient of zeros an optimiser would decay it.
                view.zero_()
            elif gradient is not view:
                if len(others) < len(places):
                    view.copy_(gradient)
                parameter.grad = view


def neighbours(tensors: Sequence[torch.Tensor], most_elements: int) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype together, at most `most_elements` of them, in the order given; a larger one is alone."""
    groups: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.numel() > most_elements or groups[-1][0].dtype != tensor.dtype:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.numel()
    return groups
