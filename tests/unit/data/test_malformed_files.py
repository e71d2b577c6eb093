"""Files that are not what they should be: each is one sentence that says what was found."""

import json
import os
from pathlib import Path

import pytest

from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig
from qa_dist.data.sources import available_splits, load_examples
from tests.unit.data_fixtures import FIXTURES, MALFORMED, read_file

EXPECTED: dict[str, tuple[str, ...]] = json.loads((FIXTURES / "malformed_expected.json").read_text(encoding="utf-8"))


def test_the_table_of_malformed_files_is_complete() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in MALFORMED.iterdir())
    assert len(EXPECTED) >= 30


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_malformed_file_gives_one_clear_sentence(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_examples(DataConfig(train_file=str(MALFORMED / name)), "train")
    message = str(caught.value)
    assert message.startswith(str(MALFORMED / name))
    assert "\n" not in message
    for part in EXPECTED[name]:
        assert part in message


def test_a_pipe_is_refused_before_anything_is_taken_out_of_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe or a device, and files are read more than once; write it to a file"):
        available_splits(DataConfig(train_file=str(tmp_path / "pipe")))


def test_a_missing_file_a_folder_and_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_file(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder"):
        read_file(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / "file" / "below.json")
