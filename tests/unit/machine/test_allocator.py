"""The allocator of a run on CPUs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qa_dist import cli
from qa_dist.machine import allocator


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPUs, and with jemalloc in the second folder that is looked into."""
    folders = [tmp_path / "lib", tmp_path / "lib64"]
    for folder in folders:
        folder.mkdir()
    path = folders[1] / "libjemalloc.so.2"
    path.write_bytes(b"")
    monkeypatch.setattr(allocator, "library_folders", lambda: folders)
    monkeypatch.setattr(allocator, "has_glibc", lambda: True)
    monkeypatch.setattr(allocator, "_GPU_FILES", (str(tmp_path / "nvidiactl"),))
    return path


def test_a_run_starts_anew_with_jemalloc_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    allocator.start_with_jemalloc({"A": "b"}, ["python3", "-X", "dev", "-m", "qa_dist.train", "--seed", "1"])
    ((program, words, environment),) = started
    assert program == sys.executable
    assert words == [sys.executable, "-X", "dev", "-m", "qa_dist.train", "--seed", "1"]
    assert environment == {"A": "b", "LD_PRELOAD": str(library)}
    allocator.start_with_jemalloc(environment, words)
    allocator.start_with_jemalloc({}, ["python3", "-c", "from multiprocessing.forkserver import main; main(3)"])
    assert len(started) == 1
    allocator.start_with_jemalloc({}, ["python3", "/usr/local/bin/qa-dist", "train"])
    allocator.start_with_jemalloc({}, ["python3", "-m", "qa_dist.serve", "model"])
    assert len(started) == 3


class StartedAnewError(Exception):
    """In the place of this process's end."""


@pytest.mark.parametrize("command", ["train", "sweep", "serve"])
@pytest.mark.parametrize("way", ["qa-dist", "-m"])
def test_every_command_that_computes_for_long_starts_anew(
    way: str, command: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_anew(program: str, words: list[str], environment: dict[str, str]) -> None:
        raise StartedAnewError(words, environment["LD_PRELOAD"])

    monkeypatch.setattr(os, "execve", start_anew)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    module = f"qa_dist.{command}"
    words = ["/usr/bin/qa-dist", command, "a"] if way == "qa-dist" else ["-m", module, "a"]
    monkeypatch.setattr(sys, "orig_argv", ["python3", *words])
    monkeypatch.setattr(sys, "argv", words[1 if way == "-m" else 0 :])
    with pytest.raises(StartedAnewError) as anew:
        (cli if way == "qa-dist" else importlib.import_module(module)).main()
    assert anew.value.args == ([sys.executable, *words], str(library))


@pytest.mark.parametrize("why", ["preloaded", "preloads nothing", "has a GPU", "no glibc", "no jemalloc"])
def test_a_process_is_left_as_it_is(why: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {}
    assert allocator.with_jemalloc(environment) is not None
    if why.startswith("preload"):
        environment = {"LD_PRELOAD": "/usr/lib/libtcmalloc.so" if why == "preloaded" else ""}
    elif why == "has a GPU":
        Path(allocator._GPU_FILES[0]).touch()
    elif why == "no glibc":
        monkeypatch.setattr(allocator, "has_glibc", lambda: False)
    else:
        library.unlink()
    assert allocator.with_jemalloc(environment) is None


def test_the_allocator_is_named_by_the_libraries_of_the_process(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 0 00:00 1  /usr/lib/libjemalloc.so.2\n7f02 r-xp  /lib/libc.so.6\n", encoding="utf-8"
    )
    assert allocator.allocator(maps) == "jemalloc"
    maps.write_text("7f02 r-xp  /lib/libc.so.6\n", encoding="utf-8")
    assert allocator.allocator(maps) == (os.confstr("CS_GNU_LIBC_VERSION") if allocator.has_glibc() else "system")
    assert allocator.allocator(tmp_path / "none") == allocator.allocator(maps)


@pytest.mark.skipif(allocator.find_jemalloc() is None, reason="jemalloc is not installed here")
@pytest.mark.skipif(allocator.with_jemalloc({}) is None, reason="this machine's processes are left as they are")
def test_training_runs_with_jemalloc_where_it_lies() -> None:
    program = (
        "import os, sys\nfrom qa_dist.machine.allocator import allocator, start_with_jemalloc\n"
        "start_with_jemalloc(os.environ, sys.orig_argv)\nprint(os.getpid(), allocator())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, "qa_dist.train"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.communicate(timeout=60)[0].split() == [str(process.pid), "jemalloc"]
