"""Which allocator hands out the memory of this process, and how what runs long on CPUs gets one whose heap stays flat.

A row of tokens has another length in every step. glibc's heap keeps what was freed in holes that the next tensors do
not fit into, and grows for as long as a run lasts; jemalloc's does not, at the same speed (docs/memory.md). A library
that replaces it must be there before the process starts: hence the second start.

Without jemalloc, glibc loses most of these holes with its cache of small blocks (`glibc.malloc.tcache_count=0`), which
is read when a process starts, too. Torch asks for aligned blocks, and `memalign` cuts a few bytes off before and behind
each. Up to glibc 2.38 these go into that cache, and from there to small objects, which then lie between large blocks
and keep them apart (glibc's bug 30723). To give large tensors back at once (`mallopt`) would help as well, but then
every one of them is paged in anew, which makes steps a quarter slower.
"""

import ctypes
import os
import re
import sys
import sysconfig
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

_LIBRARY = "libjemalloc.so.2"
LONG_RUNNING = ("qa_dist.train", "qa_dist.sweep", "qa_dist.serve", "qa_dist.predict")
"""Modules whose processes run long."""

_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""What the drivers of GPUs leave in /dev: NVIDIA's, that of Windows' Linux, AMD's."""

_TUNABLES = "GLIBC_TUNABLES"
_CACHE = "glibc.malloc.tcache_count"
_MENDED = (2, 39)
"""The first glibc whose `memalign` leaves nothing in the cache."""


def library_folders() -> list[Path]:
    """Where Debian and its kin, Fedora, SUSE, Arch and conda put their libraries."""
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders = [f"/usr/lib/{multiarch}"] if multiarch else []
    return [Path(folder) for folder in (*folders, "/usr/lib64", "/usr/lib", "/usr/local/lib", f"{sys.prefix}/lib")]


def find_jemalloc() -> Path | None:
    """Jemalloc's library on this machine; None if it has none."""
    found = (folder / _LIBRARY for folder in library_folders())
    return next((path for path in found if path.is_file()), None)


def glibc_version() -> tuple[int, int] | None:
    """Version of the glibc that this process gets its memory from; None where that is another library."""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return None
    found = re.fullmatch(r"glibc (\d+)\.(\d+).*", name)
    return (int(found[1]), int(found[2])) if found else None


def with_flat_heap(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that a process must start with for a heap that stays flat; None if it has what it is to have.

    That is so where the user has set LD_PRELOAD, be it to nothing, on a machine with a GPU, whose memory is not
    glibc's, and where jemalloc is not installed and glibc has no cache that would have to go.
    """
    if "LD_PRELOAD" in environment or glibc_version() is None or any(Path(name).exists() for name in _GPU_FILES):
        return None
    library = find_jemalloc()
    return without_cache(environment) if library is None else {**environment, "LD_PRELOAD": str(library)}


def without_cache(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment in which glibc keeps no cache of small blocks.

    None if the user has set one there, and where it does no harm: in other libraries, and in glibc 2.39 and newer.
    """
    version, tunables = glibc_version(), environment.get(_TUNABLES, "")
    if version is None or version >= _MENDED or _CACHE in tunables:
        return None
    return {**environment, _TUNABLES: ":".join([*filter(None, [tunables]), f"{_CACHE}=0"])}


def start_with_flat_heap(environment: MutableMapping[str, str], command: Sequence[str]) -> None:
    """Start this process anew, under the same number, if that gets it a better heap; call it before anything else.

    Args:
        environment: This process's variables.
        command: The interpreter and its arguments, `sys.orig_argv`.
    """
    # A process that somebody else's program forked cannot be started anew by what that was started with.
    is_own = any(word in LONG_RUNNING or Path(word).name == "qa-dist" for word in command[1:])
    changed = with_flat_heap(environment) if is_own else None
    if changed is not None:
        os.execve(sys.executable, [sys.executable, *command[1:]], changed)


def return_freed_memory() -> None:
    """Give the system back what glibc keeps of freed memory for later; other libraries do that by themselves.

    It takes some milliseconds, and what is allocated next has to be paged in.
    """
    if glibc_version() is not None:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def allocator(maps: Path = Path("/proc/self/maps")) -> str:
    """What hands out this process's memory: `jemalloc`, `glibc 2.36` or, without its cache, `glibc 2.36, no cache`.

    `system` where that is all that is known.
    """
    try:
        libraries = {
            line.rpartition("/")[2] for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()
        }
    except OSError:
        libraries = set()
    for name in _OTHERS:
        if any(library.startswith(f"lib{name}") for library in libraries):
            return name
    version = glibc_version()
    if version is None:
        return "system"
    return f"glibc {version[0]}.{version[1]}" + (", no cache" if f"{_CACHE}=0" in os.environ.get(_TUNABLES, "") else "")
