"""Contexts in which transformers and peft load a model: what they raise is one sentence, what they say is kept out."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qa_dist.common.errors import UserError
from qa_dist.model.pretrained import hub_logs_held_back


def _is_of_use(record: logging.LogRecord) -> bool:
    """False of what bitsandbytes says when peft imports it, on a CPU with bfloat16: that a kernel is not installed."""
    return "kernels-community" not in record.getMessage()


# Here, as peft is imported in many places.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_of_use)


@contextmanager
def library_errors(sentence: Callable[[Exception], UserError]) -> Iterator[None]:
    """Context in which `sentence` makes the error to raise of whatever a library raises about a model.

    What is a sentence already, and a lack of memory, pass as they are. Lines that the libraries log are shown behind
    the block, and dropped if it raises.
    """
    try:
        with hub_logs_held_back():
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise a dozen unrelated types for what is wrong with a folder
        raise sentence(error) from error


@contextmanager
def without_library_messages() -> Iterator[None]:
    """Context in which transformers logs errors only and draws no bars, and two warnings are not shown.

    Left out are the list of newly initialised weights, which `check_trainable` looks after, and warnings of
    peft's use of what transformers deprecated and of missing adapter weights, which `load_trained` refuses.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
