import logging
import warnings

import pytest
import torch

from qa_dist.common.errors import CheckpointError, UserError
from qa_dist.model.loading import library_errors, without_library_messages


def sentence(error: Exception) -> UserError:
    return UserError(f"it cannot be loaded ({error})")


def test_what_a_library_raises_becomes_a_sentence() -> None:
    with pytest.raises(UserError, match=r"it cannot be loaded \(no such layer\)") as caught, library_errors(sentence):
        raise RuntimeError("no such layer")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [CheckpointError("a sentence already"), torch.OutOfMemoryError("no memory")])
def test_sentences_and_a_lack_of_memory_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, library_errors(sentence):
        raise error
    assert caught.value is error


def test_messages_are_kept_out_inside_the_block_only() -> None:
    from transformers.utils import logging as library

    logger = logging.getLogger("transformers.modeling_utils")
    before, bars = logger.getEffectiveLevel(), library.is_progress_bar_enabled()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with without_library_messages():
            assert logger.getEffectiveLevel() == logging.ERROR
            assert not library.is_progress_bar_enabled()
            warnings.warn("Found missing adapter keys while loading", UserWarning, stacklevel=1)
            warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]
    assert (logger.getEffectiveLevel(), library.is_progress_bar_enabled()) == (before, bars)


def test_a_missing_kernel_that_nobody_asked_for_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_messages_come_back_after_an_error() -> None:
    from transformers.utils import logging as library

    bars = library.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), without_library_messages():
        raise RuntimeError
    assert library.is_progress_bar_enabled() == bars
