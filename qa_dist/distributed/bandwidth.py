"""How fast ranks add up data: an all-reduce repeated for some seconds at a few sizes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qa_dist.common.errors import UserError
from qa_dist.distributed.ranks import Ranks

SIZES = (1 << 20, 1 << 24, 1 << 27)
"""Bytes: about the gradients of a small adapter, of a large one, and what saturates a network."""
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rate:
    """What all-reduces of one size took.

    Attributes:
        num_bytes: of the data that every rank has.
        num_rounds: how often they were added up.
        seconds: of one round, on average.
        bus_bytes_per_second: what each rank sends and receives, see `bus_bandwidth`.
    """

    num_bytes: int
    num_rounds: int
    seconds: float
    bus_bytes_per_second: float


def bus_bandwidth(num_bytes: int, seconds: float, world_size: int) -> float:
    """Bytes per second that pass through each rank's link in an all-reduce: bytes * 2 (n - 1) / n / seconds.

    A rank must send and receive that much at least, so the figure can be compared with the speed of the hardware,
    whatever the number of ranks (NCCL tests, doc/PERFORMANCE.md, "Bandwidth").
    """
    return num_bytes * 2 * (world_size - 1) / world_size / seconds


def measure(ranks: Ranks, *, seconds: float, sizes: Sequence[int] = SIZES) -> list[Rate]:
    """Rates of all-reduces, smallest first, about `seconds` in all; every rank must call this.

    Raises:
        UserError: On every rank alike: a sum is wrong.
    """
    return [_measure(ranks, num_bytes, seconds / len(sizes)) for num_bytes in sizes]


def _measure(ranks: Ranks, num_bytes: int, seconds: float) -> Rate:
    values = torch.full((num_bytes // _FLOAT_BYTES,), ranks.rank + 1.0, device=ranks.device)
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    wrong = int((ranks.sum(values) != expected).sum())
    if ranks.minimum(-wrong) < 0:
        raise UserError(
            "the ranks added up numbers and got a wrong sum: the connection between them damages data; run again with "
            "NCCL_P2P_DISABLE=1, and with NCCL_IB_DISABLE=1, to find out which one"
        )
    values.zero_()
    once = _seconds(ranks, values, 2) / 2
    # Rank 0 decides, so that all stop together.
    num_rounds = ranks.broadcast(max(1, round(seconds / once)))
    taken = ranks.broadcast(_seconds(ranks, values, num_rounds) / num_rounds)
    return Rate(num_bytes, num_rounds, taken, bus_bandwidth(num_bytes, taken, ranks.world_size))


def _seconds(ranks: Ranks, values: torch.Tensor, num_rounds: int) -> float:
    ranks.barrier()
    started = time.perf_counter()
    for _ in range(num_rounds):
        ranks.sum(values)
    # A GPU works on after the calls have come back; looking at a value waits for it.
    float(values[0])
    return time.perf_counter() - started
