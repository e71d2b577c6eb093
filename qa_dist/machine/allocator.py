"""Which allocator hands out the memory of this process, and how what runs long on CPUs gets one whose heap stays flat.

A row of tokens has another length in every step. glibc's heap keeps what was freed in holes that the next tensors do
not fit into, and grows for as long as a run lasts; jemalloc's does not, at the same speed (docs/memory.md). glibc can
be told to give large tensors back at once (`mallopt`), but then every one of them is paged in anew, which makes steps a
quarter slower. A library that replaces it must be there before the process starts: hence the second start.
"""

import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path

_LIBRARY = "libjemalloc.so.2"
_LONG = ("qa_dist.train", "qa_dist.sweep", "qa_dist.serve")
"""Modules whose processes run long."""

_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""What the drivers of GPUs leave in /dev: NVIDIA's, that of Windows' Linux, AMD's."""


def library_folders() -> list[Path]:
    """Where Debian and its kin, Fedora, SUSE, Arch and conda put their libraries."""
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders = [f"/usr/lib/{multiarch}"] if multiarch else []
    return [Path(folder) for folder in (*folders, "/usr/lib64", "/usr/lib", "/usr/local/lib", f"{sys.prefix}/lib")]


def find_jemalloc(folders: Iterable[Path] | None = None) -> Path | None:
    """Jemalloc's library on this machine; None if it has none."""
    found = (folder / _LIBRARY for folder in (library_folders() if folders is None else folders))
    return next((path for path in found if path.is_file()), None)


def has_glibc() -> bool:
    """Whether this process would get its memory from glibc."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):
        return False


def with_jemalloc(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that a process must start with to get jemalloc; None if it has what it is to have.

    That is so where the user has set LD_PRELOAD, be it to nothing, on a machine with a GPU, whose memory is not
    glibc's, and where jemalloc is not installed.
    """
    if "LD_PRELOAD" in environment or not has_glibc() or any(Path(name).exists() for name in _GPU_FILES):
        return None
    library = find_jemalloc()
    return None if library is None else {**environment, "LD_PRELOAD": str(library)}


def start_with_jemalloc(environment: MutableMapping[str, str], command: Sequence[str]) -> None:
    """Start this process anew, under the same number, if jemalloc is to be had; call it before anything else.

    Args:
        environment: This process's variables.
        command: The interpreter and its arguments, `sys.orig_argv`.
    """
    # A process that somebody else's program forked cannot be started anew by what that was started with.
    is_own = any(word in _LONG or Path(word).name == "qa-dist" for word in command[1:])
    changed = with_jemalloc(environment) if is_own else None
    if changed is not None:
        os.execve(sys.executable, [sys.executable, *command[1:]], changed)


def allocator(maps: Path = Path("/proc/self/maps")) -> str:
    """Name of what hands out this process's memory: `jemalloc`, `glibc 2.36`, or `system` where that is all we know."""
    try:
        libraries = {
            line.rpartition("/")[2] for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()
        }
    except OSError:
        libraries = set()
    for name in _OTHERS:
        if any(library.startswith(f"lib{name}") for library in libraries):
            return name
    return os.confstr("CS_GNU_LIBC_VERSION") or "system" if has_glibc() else "system"
