"""Fixtures of several files of unit tests."""

from pathlib import Path

import pytest

from tests.unit.trained import copy_of, trained_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and the adapter of a short run; for reading only."""
    return trained_folder(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of these to spoil."""
    return copy_of(trained, tmp_path)
