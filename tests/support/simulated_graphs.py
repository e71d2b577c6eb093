"""A recorder without a device: its graphs compute again what they recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class Recorded:
    """A graph that does again what was recorded; `spoil` comes after it."""

    def __init__(self, recorder: "Simulated", work: Callable[[], object]) -> None:
        self.recorder, self.work, self.is_reset = recorder, work, False

    def replay(self) -> None:
        assert not self.is_reset
        self.recorder.replays += 1
        self.work()
        self.recorder.spoil()

    def reset(self) -> None:
        assert not self.is_reset
        self.is_reset = True
        self.recorder.resets += 1


class Simulated:
    """A recorder without a device."""

    def __init__(self) -> None:
        self.records = self.replays = self.resets = 0
        self.error: RuntimeError | None = None
        self.found: list[str] = []
        self.spoil: Callable[[], object] = lambda: None

    def beside(self) -> Any:
        return nullcontext()

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        yield self.found

    def record(self, work: Callable[[], object]) -> Recorded:
        self.records += 1
        if self.error is not None:
            raise self.error
        return Recorded(self, work)

    def dropout_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_dropout_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)
