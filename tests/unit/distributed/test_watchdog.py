"""The watchdog speaks when there is no progress, and only then."""

import math
import threading
import time

import pytest

from qa_dist.distributed.watchdog import Watchdog


def heard(watchdog_seconds: float) -> tuple[Watchdog, list[str], threading.Event]:
    sentences: list[str] = []
    spoken = threading.Event()

    def on_hang(sentence: str) -> None:
        sentences.append(sentence)
        spoken.set()

    return Watchdog(watchdog_seconds, on_hang), sentences, spoken


def test_a_hang_is_told_once_with_its_phase() -> None:
    watchdog, sentences, spoken = heard(0.2)
    watchdog.start()
    watchdog.beat("step 17")
    assert spoken.wait(30)
    watchdog.stop()
    assert sentences == ["has made no progress for 0.2 s in step 17; the run ends (--hang_timeout 0.2)"]


def test_waiting_for_others_is_allowed_to_take_longer() -> None:
    watchdog, sentences, spoken = heard(0.2)
    watchdog.beat("step 3")
    watchdog.start()
    began = time.monotonic()
    with watchdog.waiting():
        assert spoken.wait(30)
    assert time.monotonic() - began >= 0.4
    watchdog.stop()
    assert sentences == ["has waited for the other ranks for 0.4 s in step 3; the run ends (--hang_timeout 0.2)"]


@pytest.mark.parametrize("seconds", [60.0, math.inf])
def test_progress_is_no_hang(seconds: float) -> None:
    watchdog, sentences, spoken = heard(seconds)
    watchdog.start()
    watchdog.beat("step 1")
    assert not spoken.wait(0.3)
    watchdog.stop()
    assert not sentences
