"""Files written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError


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
        raise ConfigError([f"{option} {directory} cannot be used: {error.strerror}; choose another folder"]) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path`, by one rename, if the block ends well.

    If it does not, `path` is as it was and nothing stays beside it.
    """
    staged = path.with_name(f".{path.name}")
    # What a killed process left.
    staged.unlink(missing_ok=True)
    try:
        yield staged
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON that is the same, byte for byte, for the same value."""
    with replacing(path) as staged:
        staged.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
