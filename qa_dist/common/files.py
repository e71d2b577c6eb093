"""Files and folders that appear whole or not at all, and a folder for results that can be written to."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError

_UNFINISHED = ".qa_dist-unfinished"
"""Ends the names of files and folders that are being written. What lies under such a name is removed."""


def make_writable(directory: Path, option: str) -> None:
    """Create a folder for results if need be, and make sure that files can be written there.

    Args:
        directory: The folder.
        option: What names it, for the message.

    Raises:
        ConfigError: They cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        # mkdir says of a file only that it exists.
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError([f"{option} {directory} cannot be used: {reason}; choose another folder"]) from error


def require_writable(directory: Path, option: str) -> None:
    """Make sure that `make_writable` would do, as far as permissions tell, and create nothing.

    Raises:
        ConfigError: It would not.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    reason = None
    if not existing.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
    if reason is not None:
        raise ConfigError([f"{option} {directory} cannot be used: {os.strerror(reason)}; choose another folder"])


def hold(directory: Path, problem: str) -> int:
    """A descriptor of a folder that keeps others who call this out of it, on this machine, until it is closed.

    The process's end closes it too, whatever that end is; nothing is left behind. Other machines do not see it.

    Args:
        directory: The folder.
        problem: What is wrong if another process has it.

    Raises:
        ConfigError: Another process has it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError([problem]) from error
    except OSError:
        # A file system without locks.
        pass
    return descriptor


@contextmanager
def staged(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """Where to write a file or folder that appears as `path`, by one rename, if the block ends well.

    Everything in it is on the disk before it gets its name, and the name is before this returns: whatever is called
    `path` is whole, even after a power cut. If the block or the disk fails, `path` is as it was and nothing stays
    beside it. What a killed process left there is removed first.

    Args:
        path: A file, which is replaced if it exists, or a folder that does not exist.
        aside: Where to write meanwhile, on the same file system; None: beside `path`, under a name that nobody else
            gives to a file of theirs.
    """
    aside = aside or path.with_name(f".{path.name}{_UNFINISHED}")
    remove(aside)
    with _removed_on_failure(aside):
        yield aside
        _share(aside)
        _flush(aside)
        os.replace(aside, path)
    _synchronise(path.parent)


@contextmanager
def staged_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Where to write files that appear as `paths`, none of which exists, if the block ends well: all or none.

    As with `staged`, each is on the disk before one of them gets its name.
    """
    asides = [path.with_name(f".{path.name}{_UNFINISHED}") for path in paths]
    with ExitStack() as stack:
        for aside in asides:
            remove(aside)
            stack.enter_context(_removed_on_failure(aside))
        yield asides
        for aside in asides:
            _flush(aside)
        for path, aside in zip(paths, asides, strict=True):
            os.replace(aside, path)
            stack.enter_context(_removed_on_failure(path))
    for folder in dict.fromkeys(path.parent for path in paths):
        _synchronise(folder)


@contextmanager
def staged_files(directory: Path, *, order: Callable[[Path], Any]) -> Iterator[Path]:
    """A folder whose files move into `directory`, a rename each and in this order, if the block ends well.

    For the results of a run, which share a folder with others. As with `staged`, each file is on the disk before it
    gets its name, and nothing of a block that fails is moved or stays.

    Args:
        directory: The folder, which is made if need be.
        order: Sort key of the files.
    """
    aside = directory / f".results{_UNFINISHED}"
    remove(aside)
    aside.mkdir(parents=True)
    with _removed_on_failure(aside):
        yield aside
        _share(aside)
        _flush(aside)
        for path in sorted(aside.iterdir(), key=order):
            os.replace(path, directory / path.name)
        aside.rmdir()
    _synchronise(directory)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON that is the same, byte for byte, for the same value."""
    with staged(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(path)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _share(path: Path) -> None:
    """Give the files in a folder, if it is one, the rights of the folder itself, which are as the umask has them.

    Some libraries write theirs for the owner alone: with safetensors 0.8, a group could read all but the weights.
    """
    rights = path.stat().st_mode & 0o666
    for inner in path.iterdir() if path.is_dir() else ():
        if inner.is_dir():
            _share(inner)
        elif inner.stat().st_mode & 0o666 != rights:
            # File systems without rights refuse it, and have nothing to share.
            with suppress(OSError):
                inner.chmod(rights)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder and all that is in it, is on the disk."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            _flush(inner)
    _synchronise(path)


def _synchronise(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of networks and buckets take no such request for a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
