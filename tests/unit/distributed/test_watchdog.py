"""The watchdog speaks when there is no progress, and only then."""

import math
import threading

import pytest

from qa_dist.distributed.watchdog import WAITING_FACTOR, Watchdog


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Heard:
    """A watchdog with a limit of 10 seconds by a clock that stands, and what it says."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.sentences: list[str] = []
        self.watchdog = Watchdog(10.0, self.sentences.append, clock=self.clock)

    def after(self, seconds: float) -> list[str]:
        """What it has said when so many seconds more have passed."""
        self.clock.now += seconds
        self.watchdog.check()
        return self.sentences


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_progress_within_the_limit_is_no_hang(heard: Heard) -> None:
    for step in range(5):
        assert heard.after(9.0) == []
        assert heard.after(1.0) == [], "the limit itself is allowed"
        heard.watchdog.beat(f"step {step}")


def test_a_hang_is_told_once_with_its_phase(heard: Heard) -> None:
    heard.watchdog.beat("step 16")
    assert heard.after(5.0) == []
    heard.watchdog.beat("step 17")
    told = ["has made no progress for 10 s in step 17; the run ends (--hang_timeout 10)"]
    assert heard.after(10.5) == told
    assert heard.after(10.5) == told


def test_waiting_for_others_is_allowed_to_take_longer(heard: Heard) -> None:
    assert WAITING_FACTOR == 2
    heard.watchdog.beat("step 3")
    assert heard.after(9.0) == []
    with heard.watchdog.waiting():
        assert heard.after(20.0) == [], "what was before the block does not count"
        told = ["has waited for the other ranks for 20 s in step 3; the run ends (--hang_timeout 10)"]
        assert heard.after(0.5) == told


def test_behind_what_was_waited_for_the_usual_limit_counts_anew(heard: Heard) -> None:
    with heard.watchdog.waiting():
        assert heard.after(19.0) == []
    assert heard.after(10.0) == []
    assert heard.after(0.5) == ["has made no progress for 10 s in start; the run ends (--hang_timeout 10)"]


def test_a_waiting_block_inside_another_changes_nothing(heard: Heard) -> None:
    with heard.watchdog.waiting():
        heard.clock.now += 15.0
        with heard.watchdog.waiting():
            heard.clock.now += 3.0
        assert heard.after(2.0) == [], "the rank still waits"
        told = ["has waited for the other ranks for 20 s in start; the run ends (--hang_timeout 10)"]
        assert heard.after(0.5) == told, "it has waited since the outer block began"


def test_what_fails_while_waiting_is_noted_once_with_its_phase(heard: Heard) -> None:
    heard.watchdog.beat("step 4")
    with pytest.raises(RuntimeError, match="lost") as caught, heard.watchdog.waiting(), heard.watchdog.waiting():
        raise RuntimeError("lost a rank")
    assert caught.value.__notes__ == ["it was in step 4"]
    assert heard.after(10.5) == ["has made no progress for 10 s in step 4; the run ends (--hang_timeout 10)"]


def test_what_was_before_the_start_does_not_count(heard: Heard) -> None:
    heard.clock.now += 1000.0
    heard.watchdog.start()
    try:
        assert heard.after(10.0) == []
    finally:
        heard.watchdog.stop()


def test_nothing_is_told_after_the_end(heard: Heard) -> None:
    heard.watchdog.stop()
    assert heard.after(1000.0) == []


def watching() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "watchdog"}


def test_a_limit_without_end_starts_no_thread() -> None:
    before = watching()
    watchdog = Watchdog(math.inf)
    watchdog.start()
    assert watching() == before
    watchdog.stop()


def test_a_thread_watches_by_the_clock_of_the_machine() -> None:
    sentences: list[str] = []
    spoken = threading.Event()

    def on_hang(sentence: str) -> None:
        sentences.append(sentence)
        spoken.set()

    watchdog = Watchdog(0.02, on_hang)
    # Before the start: a busy machine may take longer than the limit from here to the next line.
    watchdog.beat("step 17")
    watchdog.start()
    assert spoken.wait(60)
    watchdog.stop()
    assert sentences == ["has made no progress for 0.02 s in step 17; the run ends (--hang_timeout 0.02)"]


def test_stopping_ends_the_thread() -> None:
    before = watching()
    watchdog = Watchdog(3600.0)
    watchdog.start()
    (thread,) = watching() - before
    watchdog.stop()
    assert not thread.is_alive()
