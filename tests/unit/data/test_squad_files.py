"""Names of files of questions that commands write."""

from pathlib import Path

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.data.squad_files import new_squad_file


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("there.json", "there.json exists already; name a file that does not"),
        ("dangling.json", "dangling.json exists already"),
        ("a.csv", "a.csv is to hold SQuAD JSON; name a file that ends in .json or .json.gz"),
        ("new.json/", "new.json/ is to hold SQuAD JSON"),
        ("there.json/a.json", "its folder .*there.json cannot be used: Not a directory"),
    ],
)
def test_a_file_of_questions_that_cannot_be_written_or_read_is_refused(
    tmp_path: Path, name: str, sentence: str
) -> None:
    (tmp_path / "there.json").touch()
    (tmp_path / "dangling.json").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=sentence):
        new_squad_file(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["a.json", "A.JSON.GZ", "new/folder/a.json.gz"])
def test_a_new_file_of_questions(tmp_path: Path, name: str) -> None:
    assert new_squad_file(f"{tmp_path}/{name}") == tmp_path / name
