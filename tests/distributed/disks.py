"""Small disks, and what happens to them while a run writes there: real ones, so that takes root."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forking import Fault, run_rank

PAGE = 4096


@dataclass(frozen=True)
class Trouble:
    """A disk that takes nothing more for some steps.

    Attributes:
        disk: Where it is mounted.
        kind: "full" or "read-only".
        begin: Number of the step, from 0, before which it begins.
        end: The same for its end; None: it lasts.
    """

    disk: Path
    kind: str
    begin: int
    end: int | None


@contextmanager
def small_disk(disk: Path) -> Iterator[None]:
    """An empty file system of a megabyte in the place of this folder, which is made."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here; that takes root")
    try:
        yield
    finally:
        # A trouble that has not ended is a mount over it.
        while os.path.ismount(disk):
            subprocess.run(["umount", str(disk)], check=True)


def begin(trouble: Trouble) -> None:
    """Fill the disk, or let no file on it be opened for writing; what is open stays so."""
    if trouble.kind == "full":
        ballast = trouble.disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        # Room for some lines of the log, and not for a checkpoint.
        os.truncate(ballast, ballast.stat().st_size - PAGE)
        return
    disk = str(trouble.disk)
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def end(trouble: Trouble) -> None:
    """Let the disk be written to again."""
    if trouble.kind == "full":
        (trouble.disk / "ballast").unlink()
    else:
        subprocess.run(["umount", str(trouble.disk)], check=True)


def run_rank_in(trouble: Trouble, words: list[str], fault: Fault | None, rank: int) -> int:
    """Train on this rank, with trouble."""
    from qa_dist.training.trainer import Trainer

    real: Callable[[Any, int], Any] = Trainer.step

    def step(self: Any, number: int) -> Any:
        if number == trouble.begin:
            begin(trouble)
        if number == trouble.end:
            # A checkpoint that is still being written was due while the trouble lasted.
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            end(trouble)
        return real(self, number)

    Trainer.step = step  # type: ignore[method-assign]
    return run_rank(words, fault, rank)
