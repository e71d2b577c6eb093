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
    monkeypatch.setattr(allocator, "glibc_version", lambda: (2, 36))
    monkeypatch.setattr(allocator, "_GPU_FILES", (str(tmp_path / "nvidiactl"),))
    return path


RESIDENT_AFTER_FREEING = """
import os
from pathlib import Path
import torch
from qa_dist.machine import allocator

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

blocks = [torch.ones(2**14) for _ in range(1024)]
del blocks[:-1]
before = resident()
allocator.return_freed_memory()
print(before - resident(), allocator.allocator())
"""


def test_freed_memory_goes_back_to_the_system() -> None:
    # Blocks of 64 KiB below one that is in use, which glibc keeps; jemalloc gives them back when it likes.
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", RESIDENT_AFTER_FREEING]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    mebibytes, _, name = printed.strip().partition(" ")
    if not name.startswith("glibc"):
        pytest.skip(f"memory is handed out by {name}")
    assert int(mebibytes) >= 56


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "glibc_version", lambda: None)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("a library was looked up"))
    allocator.return_freed_memory()


def test_a_run_starts_anew_with_flat_heap_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    allocator.start_with_flat_heap({"A": "b"}, ["python3", "-X", "dev", "-m", "qa_dist.train", "--seed", "1"])
    ((program, words, environment),) = started
    assert program == sys.executable
    assert words == [sys.executable, "-X", "dev", "-m", "qa_dist.train", "--seed", "1"]
    assert environment == {"A": "b", "LD_PRELOAD": str(library)}
    allocator.start_with_flat_heap(environment, words)
    allocator.start_with_flat_heap({}, ["python3", "-c", "from multiprocessing.forkserver import main; main(3)"])
    assert len(started) == 1
    allocator.start_with_flat_heap({}, ["python3", "/usr/local/bin/qa-dist", "train"])
    allocator.start_with_flat_heap({}, ["python3", "-m", "qa_dist.serve", "model"])
    assert len(started) == 3


class StartedAnewError(Exception):
    """In the place of this process's end."""


@pytest.mark.parametrize("command", ["train", "sweep", "serve", "predict"])
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


@pytest.mark.parametrize(
    "why", ["preloaded", "preloads nothing", "has a GPU", "no glibc", "no jemalloc and a new glibc"]
)
def test_a_process_is_left_as_it_is(why: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {}
    assert allocator.with_flat_heap(environment) is not None
    if why.startswith("preload"):
        environment = {"LD_PRELOAD": "/usr/lib/libtcmalloc.so" if why == "preloaded" else ""}
    elif why == "has a GPU":
        Path(allocator._GPU_FILES[0]).touch()
    elif why == "no glibc":
        monkeypatch.setattr(allocator, "glibc_version", lambda: None)
    else:
        library.unlink()
        monkeypatch.setattr(allocator, "glibc_version", lambda: (2, 39))
    assert allocator.with_flat_heap(environment) is None


def test_without_jemalloc_an_old_glibc_starts_without_its_cache(library: Path) -> None:
    library.unlink()
    without = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    assert allocator.with_flat_heap({"A": "b"}) == {"A": "b", **without}
    assert allocator.with_flat_heap(without) is None
    assert allocator.with_flat_heap({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}) is None
    assert allocator.with_flat_heap({"GLIBC_TUNABLES": "glibc.malloc.check=1"}) == {
        "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.tcache_count=0"
    }


def test_the_allocator_is_named_by_the_libraries_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 0 00:00 1  /usr/lib/libjemalloc.so.2\n7f02 r-xp  /lib/libc.so.6\n", encoding="utf-8"
    )
    assert allocator.allocator(maps) == "jemalloc"
    maps.write_text("7f02 r-xp  /lib/libc.so.6\n", encoding="utf-8")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert allocator.allocator(maps) == (os.confstr("CS_GNU_LIBC_VERSION") if allocator.glibc_version() else "system")
    assert allocator.allocator(tmp_path / "none") == allocator.allocator(maps)
    monkeypatch.setattr(allocator, "glibc_version", lambda: (2, 36))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert allocator.allocator(maps) == "glibc 2.36, no cache"


@pytest.mark.skipif(allocator.find_jemalloc() is None, reason="jemalloc is not installed here")
@pytest.mark.skipif(allocator.with_flat_heap({}) is None, reason="this machine's processes are left as they are")
def test_training_runs_with_flat_heap_where_it_lies() -> None:
    program = (
        "import os, sys\nfrom qa_dist.machine.allocator import allocator, start_with_flat_heap\n"
        "start_with_flat_heap(os.environ, sys.orig_argv)\nprint(os.getpid(), allocator())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, "qa_dist.train"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.communicate(timeout=60)[0].split() == [str(process.pid), "jemalloc"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(
    allocator.without_cache({}) is None, reason="this machine's memory is not that of a glibc with a cache"
)
def test_blocks_of_torch_leave_no_holes_without_the_cache() -> None:
    """Blocks that come and go beside small objects: without the cache the heap stays close to what is in use."""
    program = (
        "import random, re, torch\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "random.seed(0)\nbefore, kept = peak(), []\n"
        "for _ in range(400):\n"
        "    blocks = [torch.zeros(random.randrange(2**16, 2**18)) for _ in range(8)]\n"
        "    while blocks:\n"
        "        del blocks[random.randrange(len(blocks))]\n"
        "        kept += [torch.zeros(2) for _ in range(8)]\n"
        "print((peak() - before) // 1024)"
    )
    grown = {}
    for name, changed in {"as it is": {}, "without": allocator.without_cache({})}.items():
        environment = {**os.environ, **(changed or {}), "LD_PRELOAD": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        grown[name] = int(done.stdout)
    assert grown["without"] < grown["as it is"]
