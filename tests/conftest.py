"""Settings and fixtures of all tests."""

import os
from pathlib import Path

# Before torch or any Hugging Face library is imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# The same examples in every run, and no time limit for one: a busy machine is no failure. To look further:
# pytest --hypothesis-profile search
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same")


@pytest.fixture(scope="session")
def squad_dir() -> Path:
    """The directory of the real SQuAD files; tests that need it are skipped where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad"
    directory = Path(os.environ.get("QA_DIST_SQUAD_DIR", default))
    if not (directory / "dev-v1.1.json.gz").is_file():
        pytest.skip(f"no SQuAD files in {directory}; set QA_DIST_SQUAD_DIR to their directory")
    return directory
