"""Files of users, plain or gzip-compressed: their bytes and their text, or one sentence on why not.

The standard library is enough, so that scoring starts at once.
"""

import gzip
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json, type_name

_GZIP_MAGIC = b"\x1f\x8b"


def read_json_file(path: str | Path) -> Any:
    """The value in a JSON file, plain or gzip-compressed.

    Raises:
        DataError: It cannot be read, is damaged, is not UTF-8, or is not JSON without repeated keys.
    """
    path = Path(path)
    text = decoded(decompressed(read_bytes(path), path), path)
    try:
        return read_json(text)
    except ParseError as error:
        raise DataError(f"{path} is not JSON that can be used: {error}; mend the file") from error


def read_json_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        DataError: As for `read_json_file`, or the file holds something else.
    """
    if not path.is_file():
        return {}
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not {type_name(value)}; mend or remove it")
    return value


def read_bytes(path: Path) -> bytes:
    """Content of a file, as it is.

    Raises:
        DataError: It cannot be read.
    """
    with _named(path):
        return path.read_bytes()


def require_readable(path: Path) -> None:
    """Open a file and look at its first byte, so that a wrong path is said before anything expensive starts.

    Of a pipe or a device nothing is read: it would be gone for whoever opens it behind this.

    Raises:
        DataError: As for `read_bytes`, or it is such a one.
    """
    with _named(path):
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise DataError(
                f"{path} is a pipe or a device, and files are read more than once; write it to a file and name that"
            )
        with path.open("rb") as file:
            file.read(1)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name one file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error


def is_compressed(content: bytes) -> bool:
    """Whether the bytes of a file are a gzip stream."""
    return content.startswith(_GZIP_MAGIC)


def decompressed(content: bytes, path: Path) -> bytes:
    """The bytes of a file without their gzip compression, if they have any.

    Raises:
        DataError: The stream is damaged or cut short.
    """
    if not is_compressed(content):
        return content
    try:
        return gzip.decompress(content)
    except EOFError:
        raise DataError(f"{path} ends in the middle of its gzip stream; copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged gzip ({error}); copy or download it again") from error


def decoded(content: bytes, path: Path) -> str:
    """The text in the bytes of a file; a byte order mark before it is left out.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start:,} is 0x{content[error.start]:02x}; convert the file to UTF-8"
        ) from error
