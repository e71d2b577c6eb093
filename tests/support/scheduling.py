"""Which files of tests one worker runs, and which come first."""

from pathlib import Path
from typing import Any

TOGETHER = {
    "fake CUDA": (
        *("tests/compiled/test_launches.py", "tests/compiled/test_counted.py", "tests/compiled/test_fake_cuda.py"),
        "tests/compiled/test_waits.py",
    ),
}
"""Files that share a server whose start takes seconds: one worker runs them."""

FIRST = ("tests/integration/test_slurm.py", "tests/distributed/test_resume.py", "tests/integration/test_readme.py")
"""What takes longest begins first, so that no worker is left alone with it at the end."""


def scope(name: str) -> str:
    """What of a test's name all tests have in common that one worker runs: a group of files, or its file."""
    file = name.partition("::")[0]
    return next((group for group, files in TOGETHER.items() if file in files), file)


def place(name: str) -> tuple[int, list[str]]:
    """Where a test comes in: scopes of `FIRST` before all others, which go by their path; a file keeps its order."""
    found = scope(name)
    return FIRST.index(found) if found in FIRST else len(FIRST), name.partition("::")[0].split("/")


def rotated(arguments: list[str], worker: int, count: int) -> list[str]:
    """Files of tests in these folders, from that on at which one of several workers begins to collect them."""
    if not all(Path(argument).is_dir() for argument in arguments):
        return arguments
    files = [str(file) for argument in arguments for file in sorted(Path(argument).rglob("test_*.py"))]
    first = len(files) * worker // count
    return files[first:] + files[:first]


def scheduling(config: Any, log: Any) -> Any:
    """As `--dist loadfile`, with some files for one file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return Scheduling(config, log)
