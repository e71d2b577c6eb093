"""Mistakes as calls from Python tell of them: options without dashes, under the names of the call."""

import pytest

from qa_dist.common.errors import ConfigError, DataError, UserError
from qa_dist.common.notebook import named_as_in_python


def test_mistakes_of_another_kind_stay_as_they_are() -> None:
    with pytest.raises(DataError, match=r"^give --max_seq_length$"), named_as_in_python(kind=ConfigError):
        raise DataError("give --max_seq_length")


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_flags_lose_their_dashes_and_paths_keep_them(kind: type[UserError]) -> None:
    message = "/cache/models--me--reader/x has no --max_seq_length; give --tokens (--doc_stride 3) or run-two--three"
    with pytest.raises(kind) as caught, named_as_in_python({"tokens": "num_tokens"}):
        raise kind([message]) if kind is ConfigError else kind(message)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "/cache/models--me--reader/x has no max_seq_length; give num_tokens (doc_stride 3) or run-two--three"
    )
