"""Files of questions of any size, read as a stream: JSONL, CSV and Parquet row by row, JSON documents file by file.

`find_files` says which files a name means, `QuestionFiles` gives their `Unit`s in order: lines, rows or records that
are not parsed yet, so that a run that goes on can pass over what it has answered. What was read is digested on the way:
two inputs with one digest are the same up to there.

What a line or row says is for `question_records`; layouts are recognised line by line.
"""

import glob
import gzip
import hashlib
import io
import os
import select
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qa_dist.answering.csv_rows import csv_rows, row_too_long
from qa_dist.answering.options import STREAM
from qa_dist.answering.passages import PASSAGES, refuse_passages
from qa_dist.answering.question_records import Flaw, records_of_cells, records_of_line, records_of_row
from qa_dist.common.errors import DataError
from qa_dist.common.reading import decoded, is_compressed, require_readable
from qa_dist.data.folders import files_in, is_saved, matches, suffixes
from qa_dist.data.formats import PARQUET_MAGIC, is_object, named_format, parse, require_gzip, separator_of
from qa_dist.data.layouts import require_columns
from qa_dist.data.rows import Columns, Record
from qa_dist.data.values import are_floats

LONGEST_UNIT = 1 << 28
"""Bytes of a line or row at most: what has no line ends is no file of questions, and would not fit into memory."""

_BLOCK = 1 << 20
_POLL_SECONDS = 0.2
_ROWS = 256
"""Rows of Parquet that are decoded together."""
_BOM = b"\xef\xbb\xbf"
_MARKS = "*?["


class Unit(NamedTuple):
    """A line, row or record of a file, not yet parsed.

    Attributes:
        place: Where it stands, for messages.
        parse: The records in it, or what is wrong with it; the same ones every time.
    """

    place: str
    parse: Callable[[], Sequence[Record | Flaw]]


def find_files(name: str) -> list[Path]:
    """The files that a name means, in order: a file, those in a folder, or those that a pattern matches.

    Raises:
        DataError: There are none, or one cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if is_saved(path):
            raise DataError(
                f"{path} is a data set saved with save_to_disk; write it with to_parquet and name that file"
            )
        found = files_in(path)
        if not found:
            raise DataError(f"{path} is a folder without files of questions ({', '.join(suffixes())}, also .gz)")
    elif not os.path.lexists(path) and any(mark in name for mark in _MARKS):
        found = [Path(match) for match in sorted(set(glob.glob(str(path), recursive=True))) if os.path.isfile(match)]
        if not found:
            raise DataError(f"no file matches {path}; check the pattern, and put it in quotes if the shell expands it")
    else:
        found = [path]
    for file in found:
        require_readable(file)
    return found


class StoppedReadingError(Exception):
    """Whoever reads was asked to stop while nothing came."""


class Interruptible(io.RawIOBase):
    """A stream, such as standard input, whose reader can be asked to stop while nothing comes."""

    def __init__(self, descriptor: int, is_asked_to_stop: Callable[[], bool], *, is_own: bool = False) -> None:
        """Read what comes from a descriptor.

        Args:
            descriptor: Of a pipe, a terminal or a file.
            is_asked_to_stop: Whether to raise StoppedReadingError instead of waiting any longer.
            is_own: Whether the descriptor is closed with the stream; if not, it is left open.
        """
        self._descriptor = descriptor
        self._is_asked_to_stop = is_asked_to_stop
        self._is_own = is_own

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not select.select([self._descriptor], [], [], _POLL_SECONDS)[0]:
            if self._is_asked_to_stop():
                raise StoppedReadingError
        return os.readv(self._descriptor, [buffer])

    def close(self) -> None:
        if self._is_own and not self.closed:
            os.close(self._descriptor)
        super().close()


def opened_pipe(name: str, is_asked_to_stop: Callable[[], bool]) -> BinaryIO | None:
    """A pipe or a device under a name, such as /dev/fd/63 of a shell's `<(...)`, opened; None if it is none.

    What is read of such a one is gone, so that it is opened once, and nobody may look into it before.

    Raises:
        DataError: It cannot be opened.
    """
    path = os.path.expanduser(name)
    if not os.path.exists(path) or os.path.isdir(path) or os.path.isfile(path):
        return None
    try:
        # Opening a named pipe would wait for whoever writes, deaf to signals; reading waits for it as well.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    os.set_blocking(descriptor, True)
    return io.BufferedReader(Interruptible(descriptor, is_asked_to_stop, is_own=True))


def inside(output: Path, name: str) -> bool:
    """Whether a file of this name would be one of the files that `find_files` finds under a name, now or once written.

    A run that goes on would take its own answers for questions.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        ending = output.name.lower().removesuffix(".gz")
        return os.path.realpath(output.parent) == os.path.realpath(path) and ending.endswith(tuple(suffixes()))
    if os.path.lexists(path):
        return os.path.realpath(output) == os.path.realpath(path)
    return matches(Path(os.path.abspath(output)).parts, Path(os.path.abspath(path)).parts)


class QuestionFiles:
    """The units of some files, one after the other; can be gone through once.

    Attributes:
        names: Of the files, without their folders.
        num_bytes: Of all files together, as they are on the disk; None for a stream.
    """

    def __init__(
        self, paths: Sequence[Path], stream: BinaryIO | None = None, *, stream_name: str = "standard input"
    ) -> None:
        """Open nothing yet.

        Args:
            paths: The files.
            stream: What is read instead of files, in any format, also gzip-compressed.
            stream_name: What messages call that.
        """
        self.names = [path.name for path in paths] if stream is None else [STREAM]
        self.num_bytes = None if stream is not None else sum(path.stat().st_size for path in paths)
        self._paths = paths
        self._stream = stream
        self._stream_path = Path(stream_name)
        self._shown = _shown_names(paths) if stream is None else {self._stream_path: stream_name}
        self._digest = hashlib.sha256()
        self._digest_of_given = self._digest.copy()
        self._bytes_before = 0
        self._place: Callable[[], int] = lambda: 0

    def again(self) -> "QuestionFiles | None":
        """The same files, to be gone through anew; None of a stream, which cannot be."""
        return None if self._stream is not None else QuestionFiles(self._paths)

    @property
    def shown(self) -> str:
        """The first few files, or the stream, as messages call them."""
        return ", ".join(list(self._shown.values())[:3])

    @property
    def sha256(self) -> str:
        """Hex digest of everything up to the last unit that was given; of Parquet and JSON, of whole files."""
        return self._digest_of_given.hexdigest()

    @property
    def num_bytes_read(self) -> int:
        """How many of the bytes on the disk have been read; for a bar."""
        return self._bytes_before + self._place()

    def units(self) -> Iterator[Unit]:
        """The units in order.

        Raises:
            DataError: A file cannot be read, is damaged, or is no file of questions. All units before are given.
        """
        for unit in self._all_units():
            # Blank lines and empty files behind the last unit are read before anybody knows that it was the last.
            self._digest_of_given = self._digest.copy()
            yield unit

    def _all_units(self) -> Iterator[Unit]:
        if self._stream is not None:
            yield from self._units_of(self._stream_path, self._stream)
            return
        for path in self._paths:
            with _named(path), path.open("rb", buffering=_BLOCK) as file:
                self._place = file.tell
                try:
                    yield from self._units_of(path, file)
                finally:
                    # Of a closed file nobody can ask that.
                    self._place = lambda: 0
            self._bytes_before += path.stat().st_size

    def _units_of(self, path: Path, file: Any) -> Iterator[Unit]:
        """The units of one opened file, whatever its format."""
        self._digest.update(b"\0file\0")
        file = _unpacked(path, file)
        with _named(path):
            head = _head(file, path)
            kind = _kind(head, path)
            if kind == "Parquet":
                yield from self._parquet_rows(path, head, file)
            elif kind == "JSON":
                yield from self._document(path, head, file)
            elif kind == "CSV":
                yield from self._csv_rows(path, head, self._lines(path, head, file))
            elif kind == "JSONL":
                yield from self._jsonl_lines(path, self._lines(path, head, file))

    def _lines(self, path: Path, head: Sequence[bytes], file: BinaryIO) -> Iterator[bytes]:
        """The lines of a file whose first ones were read already, digested as they are given."""
        number = 0
        for lines in (head, iter(lambda: file.readline(LONGEST_UNIT), b"")):
            for line in lines:
                number += 1
                if len(line) >= LONGEST_UNIT:
                    raise row_too_long(path, number, LONGEST_UNIT)
                self._digest.update(line)
                yield line.removeprefix(_BOM) if number == 1 else line

    def _jsonl_lines(self, path: Path, lines: Iterator[bytes]) -> Iterator[Unit]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{self._shown[path]}, line {number}"
                yield Unit(place, partial(records_of_line, line, place))

    def _csv_rows(self, path: Path, head: Sequence[bytes], lines: Iterator[bytes]) -> Iterator[Unit]:
        mark = separator_of(head[0].removeprefix(_BOM).decode("utf-8", "surrogateescape"))
        rows = csv_rows(lines, path, mark, most_bytes=LONGEST_UNIT)
        names = next(rows).values
        # Spreadsheets leave columns without a name, and rows of separators alone.
        named = [name for name in names if name.strip()]
        try:
            _require_columns(named, path)
        except DataError:
            # Names that nobody can read are best told by their cause.
            decoded(head[0], path)
            raise
        columns = Columns.of(named)
        has_float_ids = self._stream is None and columns.id is not None and _has_float_ids(path, mark, columns.id)
        for row in rows:
            place = f"{self._shown[path]}, line {row.line}"
            if row.problem:
                yield Unit(place, partial(list, (Flaw(place, row.problem),)))
            elif any(value.strip() for value in row.values):
                yield Unit(place, partial(records_of_cells, columns, names, row.values, place, has_float_ids))

    def _parquet_rows(self, path: Path, head: Sequence[bytes], file: Any) -> Iterator[Unit]:
        import pyarrow as pa
        from pyarrow import parquet

        if isinstance(file, gzip.GzipFile) or self._stream is not None:
            content = b"".join(head) + file.read()
            self._digest.update(content)
            source: Any = pa.BufferReader(content)
        else:
            file.seek(0)
            while block := file.read(_BLOCK):
                self._digest.update(block)
            source = str(path)
        try:
            with parquet.ParquetFile(source) as table:
                names = table.schema_arrow.names
                _require_columns(names, path)
                columns, number, total = Columns.of(names), 0, max(1, table.metadata.num_rows)
                num_bytes = path.stat().st_size if self.num_bytes else 0
                self._place = lambda: num_bytes * number // total
                for batch in table.iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        place = f"{self._shown[path]}, row {number}"
                        yield Unit(place, partial(records_of_row, columns, row, place))
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path} is not Parquet ({reason}); write it again") from error

    def _document(self, path: Path, head: Sequence[bytes], file: Any) -> Iterator[Unit]:
        content = b"".join(head) + file.read()
        self._digest.update(content)
        refuse_passages(content, path)
        for record in parse(content, path, is_unpacked=True):
            placed = Record(f"{self._shown[path]}, {record.place}", record.row, record.problem)
            yield Unit(placed.place, partial(list, (placed,)))


def _unpacked(path: Path, file: Any) -> Any:
    """An opened file that can be peeked into, as what is in it where it is compressed with gzip."""
    start = file.peek(2)[:2]
    if is_compressed(start):
        return gzip.GzipFile(fileobj=file)
    require_gzip(path, start)
    return file


def _has_float_ids(path: Path, mark: str, column: str) -> bool:
    """Whether all ids of a table are whole numbers that became floats, as `7.0`; it reads on to the first other one."""
    is_any = False
    # Damage is told of when the rows before it are given.
    with suppress(DataError, EOFError, OSError, zlib.error), path.open("rb", buffering=_BLOCK) as file:
        rows = csv_rows(iter(_unpacked(path, file)), path, mark, most_bytes=LONGEST_UNIT)
        place = [name.removeprefix("\ufeff") for name in next(rows).values].index(column)
        for row in rows:
            cell = row.values[place] if len(row.values) > place else ""
            if cell.strip() and not are_floats([cell]):
                return False
            is_any = is_any or bool(cell.strip())
    return is_any


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the file system and gzip say inside the block into one sentence."""
    try:
        yield
    except EOFError:
        raise DataError(f"{path} ends in the middle of its gzip stream; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged gzip ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and the disk") from error


def _shown_names(paths: Sequence[Path]) -> dict[Path, str]:
    """What messages call each file: its own name, or its path below the folder of all where several have that name."""
    counts = Counter(path.name for path in paths)
    common = os.path.commonpath([path.parent for path in paths]) if len(counts) < len(paths) else ""
    return {path: path.name if counts[path.name] == 1 else os.path.relpath(path, common or os.curdir) for path in paths}


def _head(file: Any, path: Path) -> list[bytes]:
    """The first lines of a file, up to the second one that is not blank; fewer if there are no more."""
    head: list[bytes] = []
    while sum(bool(line.strip()) for line in head) < 2:
        line = file.readline(LONGEST_UNIT)
        if not line:
            break
        if len(line) >= LONGEST_UNIT:
            raise row_too_long(path, len(head) + 1, LONGEST_UNIT)
        head.append(line)
        if line.startswith(PARQUET_MAGIC):
            break
    return head


def _kind(head: Sequence[bytes], path: Path) -> str | None:
    """Which of FORMATS a file is, by its name and its first lines; None for one that is empty."""
    lines = [text for line in head if (text := line.removeprefix(_BOM).strip())]
    if not lines:
        return None
    is_json, is_parquet = lines[0][:1] in (b"{", b"["), lines[0].startswith(PARQUET_MAGIC)
    named = named_format(path, is_json=is_json, is_parquet=is_parquet)
    if is_parquet:
        return "Parquet"
    if named == "JSONL":
        # A whole document, also under this name, begins with a bracket, or with one alone in its line.
        return "JSON" if lines[0][:1] == b"[" or (lines[0] == b"{" and len(lines) > 1) else "JSONL"
    if is_json and named in ("JSON", None):
        # Many tools write one object per line into a file called .json.
        return "JSONL" if len(lines) > 1 and _is_object(lines[0]) else "JSON"
    if named is None and not any(mark in lines[0] for mark in (b",", b";", b"\t", b"|")):
        raise DataError(f"{path} is neither JSON, JSONL, CSV or TSV with a header, nor Parquet; convert it to one")
    return named or "CSV"


def _is_object(line: bytes) -> bool:
    try:
        return is_object(line.decode())
    except UnicodeDecodeError:
        return False


def _require_columns(names: Sequence[str], path: Path) -> None:
    """Make sure that rows with these columns are questions; a list of passages is a context too."""
    lacks_context = PASSAGES in names and Columns.of(names).context is None
    require_columns([*names, *(["context"] if lacks_context else [])], path)
