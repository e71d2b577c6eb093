"""A store of the hand-written data set, and the folder of the tokenizer that it is made with."""

import shutil
from pathlib import Path

import pytest

from qa_dist.features.store import FeatureStore
from tests.unit.data_fixtures import prepared, run_config, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def built(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return prepared(run_config(tokenizer_folder, tmp_path_factory.mktemp("store")), "train")


@pytest.fixture
def copy(built: FeatureStore, tmp_path: Path) -> Path:
    """A copy of the store, to be spoiled."""
    return Path(shutil.copytree(built.path, tmp_path / built.path.name))
