"""The token budget from two measured peaks."""

import pytest
import torch

from qa_dist.features import token_budget
from qa_dist.features.token_budget import measured_budget, tokens_that_fit


def test_the_line_through_two_peaks() -> None:
    peaks = [(1000, 3_000_000), (2000, 5_000_000)]
    assert tokens_that_fit(peaks, 9_000_000) == 4000
    assert tokens_that_fit(peaks[::-1], 9_000_000) == 4000
    assert tokens_that_fit(peaks, 500_000) == 0
    assert tokens_that_fit([(1000, 5), (2000, 5)], 100) == 2000


class Device:
    """A CUDA device of 10 MB whose passes take 1 MB and 1 kB per token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[int] = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1_000_000 + 1000 * self.passes[-1])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9_000_000, 10_000_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_000_000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000)
        self.most_tokens = 10**9

    def run(self, tokens: int) -> int | None:
        self.passes.append(tokens)
        return tokens if tokens <= self.most_tokens else None

    def budget(self, longest: int, most: int, **options: int) -> int:
        given = {"reserved_bytes": 0, **options}
        return measured_budget(self.run, longest=longest, most=most, device=torch.device("cpu"), **given)


def test_the_budget_leaves_a_margin_and_what_the_optimiser_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_budget.MARGIN == 0.1
    device = Device(monkeypatch)
    assert device.budget(100, 100_000) == 8000
    assert device.passes == [400, 1600]
    assert device.budget(100, 100_000, reserved_bytes=2_000_000) == 6000
    assert device.budget(100, 5000) == 5000
    assert device.budget(100, 1000) == 1000
    assert device.budget(500, 10**6, reserved_bytes=8_500_000) == 500, "one feature at least"


def test_a_trial_that_runs_out_of_memory_leaves_what_the_other_one_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.most_tokens = 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900_000, 10_000_000))
    # 1.9 MB less a tenth, of which 1 MB is taken already.
    assert device.budget(100, 100_000) == 710
    assert device.budget(100, 100_000, reserved_bytes=10**7) == 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90_000_000, 100_000_000))
    assert device.budget(100, 100_000) == 1599, "less than what did not fit"
    device.most_tokens = 300
    assert device.budget(100, 100_000) == 100, "one feature at least"


def test_where_two_passes_are_in_memory_each_has_half_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    # Of 9 MB, 1 MB is taken already.
    assert device.budget(100, 100_000, num_passes=2) == 4000
    assert device.budget(100, 1000, num_passes=2) == 1000
    assert device.passes[-2:] == [400, 1000]
    assert device.budget(300, 1000, num_passes=2) == 1000
    assert device.budget(100, 6000, num_passes=2) == 4000
