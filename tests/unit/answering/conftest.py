"""What several files of these tests share."""

from pathlib import Path

import pytest

from tests.unit.trained import trained_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and the adapter of a run that has moved it far; for reading only."""
    return trained_folder(tmp_path_factory.mktemp("trained"), learning_rate="0.05")
