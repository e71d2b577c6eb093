"""What libraries say: their errors in a few words, and their log lines not in front of a sentence of ours."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


def reason(error: BaseException) -> str:
    """What a library's error says, for a bracket in a sentence of ours: on one line, shortened, its type if nothing."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return shortened(str(error)) or type(error).__name__


def shortened(text: str, longest: int = 200) -> str:
    """The text on one line, cut between two words where it is longer than that; dots stand for the rest.

    Half an address, or half a file's name, would look like a whole one.
    """
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    # A first word that is too long by itself is cut all the same.
    return f"{text[: longest + 1].rpartition(' ')[0] or text[:longest]} ..."


class _Held(logging.Handler):
    """A log handler that keeps the records it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def logs_held_back(*names: str) -> Iterator[None]:
    """Hold back what libraries log inside the block: it is shown behind it, and dropped if the block raises.

    The caller then says in one sentence what those lines say in many.

    Args:
        names: Of the libraries' loggers; they must have set up their handlers, which they do when they are imported.
    """
    with ExitStack() as stack:
        held = [stack.enter_context(_held_back(logging.getLogger(name))) for name in names]
        yield
    for logger, records in held:
        for record in records:
            logger.callHandlers(record)


@contextmanager
def hub_bars_at_terminals() -> Iterator[None]:
    """Context in which the hub's library draws bars only where somebody sees them: not into a pipe or a log.

    HF_HUB_DISABLE_PROGRESS_BARS, where it is set, decides instead.
    """
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if HF_HUB_DISABLE_PROGRESS_BARS is not None or sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _held_back(logger: logging.Logger) -> Iterator[tuple[logging.Logger, list[logging.LogRecord]]]:
    before, held = (logger.handlers, logger.propagate), _Held()
    logger.handlers, logger.propagate = [held], False
    try:
        yield logger, held.records
    finally:
        logger.handlers, logger.propagate = before
