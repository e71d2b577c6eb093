"""Settings and fixtures of all tests."""

import gc
import os
import sys
import uuid
from pathlib import Path
from typing import Any

# Before torch or any Hugging Face library is imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support import forked_python
from tests.support.scheduling import place, rotated, scheduling

# The same examples in every run, and no time limit for one: a busy machine is no failure. To look further:
# pytest --hypothesis-profile search
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same")


# A worker that was forked (below) starts real interpreters, unless a test asks for others.
sys.executable = str(Path(sys.prefix) / "bin" / "python") if "PYTEST_XDIST_WORKER" in os.environ else sys.executable


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let the workers of xdist be forks of one process that has imported the libraries, which takes ten seconds."""
    if worker := getattr(config, "workerinput", None):
        # All at once, so that what one has compiled is there when the others come to it.
        config.args = rotated(config.args, int(worker["workerid"].removeprefix("gw")), worker["workercount"])
    workers = getattr(config.option, "tx", None) or []
    # What was forked cannot use a GPU if the first process looked for one.
    if set(workers) != {"popen"} or sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return
    config.option.testrunuid = os.environ["PYTEST_XDIST_TESTRUNUID"] = uuid.uuid4().hex
    config.option.tx = [f"popen//python={forked_python.program('python')}"] * len(workers)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that share what is costly to start go to one worker."""
    return scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first; all workers have one order."""
    items.sort(key=lambda item: place(item.nodeid))


def pytest_collection_finish() -> None:
    """What has been imported stays: a collection of garbage, which code may ask for, need not look through it."""
    gc.freeze()


@pytest.fixture(scope="session")
def squad_dir() -> Path:
    """The directory of the real SQuAD files; tests that need it are skipped where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad"
    directory = Path(os.environ.get("QA_DIST_SQUAD_DIR", default))
    if not (directory / "dev-v1.1.json.gz").is_file():
        pytest.skip(f"no SQuAD files in {directory}; set QA_DIST_SQUAD_DIR to their directory")
    return directory
