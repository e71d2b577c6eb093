"""Signals that ask a run to stop."""

import os
import signal
from types import SimpleNamespace

import pytest

from qa_dist.common import signals


def test_a_second_ctrl_c_ends_now_unless_it_is_the_launchers_copy_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((100.0, 100.9, 101.1))
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    before = signal.getsignal(signal.SIGINT)
    with signals.StopSignals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
