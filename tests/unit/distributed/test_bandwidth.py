"""Measuring all-reduces, on ranks that are not there."""

from typing import Any

import pytest
import torch

from qa_dist.common.errors import UserError
from qa_dist.distributed.bandwidth import bus_bandwidth, measure


class Alone:
    """One of two ranks; the other has the same data, times a factor."""

    rank, world_size, device = 0, 2, torch.device("cpu")

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.num_sums = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        return values.mul_(1 + self.factor)

    def minimum(self, value: int) -> int:
        return value

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


def test_the_formula_is_that_of_nccl_tests() -> None:
    # Two ranks: each sends and receives the whole array once. Many ranks: almost twice.
    assert bus_bandwidth(1000, 0.5, 2) == 2000
    assert bus_bandwidth(1000, 0.5, 4) == 3000
    assert bus_bandwidth(1000, 0.5, 1000) == pytest.approx(3996)


def test_every_size_is_measured() -> None:
    ranks = Alone(factor=2.0)
    small, large = measure(ranks, seconds=0.05, sizes=(64, 4096))  # type: ignore[arg-type]
    assert (small.num_bytes, large.num_bytes) == (64, 4096)
    for rate in (small, large):
        assert rate.bus_bytes_per_second == bus_bandwidth(rate.num_bytes, rate.seconds, 2) > 0
    # A look at the sums and two rounds to learn how long one takes, for each size.
    assert ranks.num_sums == small.num_rounds + large.num_rounds + 2 * 3


def test_damaged_data_are_an_error() -> None:
    with pytest.raises(UserError, match="NCCL_P2P_DISABLE=1"):
        measure(Alone(factor=1.0), seconds=0.05, sizes=(64,))  # type: ignore[arg-type]
