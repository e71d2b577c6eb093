"""Errors of libraries are cut between words, and their log lines do not stand before a sentence of ours."""

import importlib
import logging
from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from qa_dist.common.libraries import hub_bars_at_terminals, logs_held_back, reason, shortened

ADDRESS = "https://huggingface.co/docs/transformers/installation#offline-mode"


@pytest.mark.parametrize("before", range(100, 220))
def test_an_address_is_there_as_a_whole_or_not_at_all(before: int) -> None:
    text = f"{'x ' * (before // 2)}{'y' * (before % 2)} see '{ADDRESS}'. And more, until it is too long to be shown."
    found = reason(OSError(text))
    assert len(found) <= 204
    assert found.endswith(" ...")
    assert ADDRESS in found or "http" not in found


def test_what_is_short_stays_as_it_is_on_one_line() -> None:
    assert reason(OSError("no\n  such\tfile")) == "no such file"
    assert shortened("a" * 200) == "a" * 200
    assert shortened("a" * 201) == "a" * 200 + " ..."
    assert shortened("one two three", 7) == shortened("one two three", 8) == "one two ..."


def test_an_error_without_words_is_named() -> None:
    assert reason(AssertionError()) == "AssertionError"
    assert reason(KeyError("weights")) == "'weights' is missing"


@pytest.fixture
def library() -> Iterator[tuple[logging.Logger, list[str]]]:
    """A logger as libraries make them, with a child, and what its handler has shown."""
    shown: list[str] = []

    class Shows(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    logger = logging.getLogger("a_library")
    logger.addHandler(Shows())
    yield logger, shown
    logger.handlers.clear()


def test_lines_of_a_library_come_behind_the_block(library: tuple[logging.Logger, list[str]]) -> None:
    logger, shown = library
    with logs_held_back("a_library"):
        logging.getLogger("a_library.part").warning("attempt %d", 1)
        logger.warning("attempt 2")
        logger.info("below its level")
        assert shown == []
    assert shown == ["attempt 1", "attempt 2"]
    logger.warning("afterwards")
    assert shown[-1] == "afterwards"


def test_lines_of_a_library_do_not_stand_before_its_error(
    library: tuple[logging.Logger, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    logger, shown = library

    def fail() -> None:
        with logs_held_back("a_library"):
            logger.warning("attempt 1")
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert shown == caplog.messages == []
    logger.warning("afterwards")
    assert shown == ["afterwards"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_hub_draws_bars_at_terminals_alone(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As at the start of a process without HF_HUB_DISABLE_PROGRESS_BARS.
    bars = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(bars, "progress_bar_states", {})
    for place in (bars, constants):
        monkeypatch.setattr(place, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    with hub_bars_at_terminals():
        assert are_progress_bars_disabled() is not is_terminal
    assert not are_progress_bars_disabled()
