"""Where shipped files lie in a repository and installed, and what names mean."""

from pathlib import Path

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.common.shipped import FOLDERS, file_or_shipped, find_shipped, shipped_files, shipped_folder

ROOT = Path(__file__).parents[3]


def make(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_in_the_repository_its_own_folders_are_taken() -> None:
    assert shipped_folder("recipes") == ROOT / "qa_dist" / "recipes"
    for name in FOLDERS[1:]:
        assert shipped_folder(name) == ROOT / name
    files = shipped_files()
    assert {name.partition("/")[0] for name in files} == set(FOLDERS)
    assert files["launch/local.sh"] == ROOT / "launch" / "local.sh"


def test_installed_the_copies_in_the_package_are_taken(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "qa_dist"
    make(package / "shipped" / "launch" / "local.sh")
    assert shipped_folder("launch", package) == package / "shipped" / "launch"
    # Another package of this name, as that of a robotics framework.
    make(package.parent / "launch" / "__init__.py")
    assert shipped_folder("launch", package) == package / "shipped" / "launch"
    make(package.parent / "pyproject.toml")
    assert shipped_folder("launch", package) == package.parent / "launch"


@pytest.mark.parametrize("name", ["local", "local.sh", "launch/local.sh", "./launch/local.sh"])
def test_a_file_goes_by_short_names(name: str) -> None:
    assert find_shipped(name) == ("launch/local.sh", ROOT / "launch" / "local.sh")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zero2", "zero2 is accelerate_configs/zero2.yaml and ds_configs/zero2.json; name one of them"),
        ("squad_minilm_smal", "did you mean squad_minilm_small?"),
        ("launch/loca.sh", "did you mean launch/local.sh?"),
        ("", "see qa-dist recipes ls"),
        ("../pyproject.toml", "see qa-dist recipes ls"),
    ],
)
def test_other_names_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        find_shipped(name)


def test_a_file_of_the_users_own_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_or_shipped("ds_configs/zero2.json") == ROOT / "ds_configs" / "zero2.json"
    make(tmp_path / "ds_configs" / "zero2.json")
    assert file_or_shipped("ds_configs/zero2.json") == Path("ds_configs/zero2.json")
    # Short names are for people; a path in a configuration is a path.
    assert file_or_shipped("zero3.json") == Path("zero3.json")
