"""A file of answers that grows by whole chunks, and the journal beside it that says how far it has come.

The journal is a file of JSON lines. Its first line names what the answers depend on, and appears whole or not at all.
Each other line stands for answers that are on the disk: it is appended after them. The second one stands for none, and
is appended before the first answers: without it, what is in the file is not this command's. What a killed run left
behind the last whole line, in either file, is cut off by the next run, which goes on from there. So the answers are the
same bytes, however often the run was killed.
"""

import errno
import fcntl
import json
import os
import stat
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from qa_dist.common.command import OutputClosedError
from qa_dist.common.errors import DataError
from qa_dist.common.files import staged

SUFFIX = ".journal"
_FORMAT = 1
_POLL_SECONDS = 0.2
_NOTHING: Mapping[str, Any] = {}
_NO_ANSWERS: Mapping[str, int] = {"start": 0, "num_bytes": 0, "crc32": 0}
_OVERWRITE = "name another file, or pass --overwrite_output_file true to replace it"


class Sink(Protocol):
    """Where answers go.

    Attributes:
        state: What the run said with the answers that are there already; None without any.
        is_finished: Whether they are all of them.
    """

    state: dict[str, Any] | None
    is_finished: bool

    def add(self, answers: bytes, state: Mapping[str, Any]) -> None:
        """Append answers, and what the run must know to go on behind them.

        Raises:
            DataError: They cannot be written; what was added before is kept.
        """

    def finish(self, state: Mapping[str, Any]) -> None:
        """Note that all answers are there."""

    def start_anew(self) -> bool:
        """Whether what is there may be replaced; if so, it is, but not before there are answers to replace it with."""

    def close(self) -> None:
        """Let go of the files."""


def open_sink(
    output: Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool,
    earlier: Mapping[str, Any] = _NOTHING,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> "Journal | Stream | None":
    """A journal for a file; a stream where the name is that of something else, as /dev/stdout or a named pipe.

    Args:
        output: The name.
        identity: As `Journal` takes it.
        overwrite: Likewise.
        earlier: Likewise.
        is_asked_to_stop: Whether not to wait any longer for somebody who reads a pipe; the result is None then.

    Raises:
        DataError: It cannot be written.
    """
    # A link to a file that is not there yet is the name of a file.
    if os.path.exists(output) and not os.path.isdir(output) and not os.path.isfile(output):
        try:
            opened = _opened_for_writing(output, is_asked_to_stop)
        except OSError as error:
            raise _unwritable(output, error) from error
        return None if opened is None else Stream(opened, str(output), is_own=True)
    return Journal(output, identity, overwrite=overwrite, earlier=earlier)


def _opened_for_writing(output: Path, is_asked_to_stop: Callable[[], bool]) -> BinaryIO | None:
    """A pipe or a device, opened as soon as somebody reads it; None if asked to stop before."""
    while not is_asked_to_stop():
        try:
            # Opening a named pipe would wait for whoever reads, deaf to signals.
            descriptor = os.open(output, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            # Sockets have the same error, for other reasons.
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(output.stat().st_mode):
                raise
            time.sleep(_POLL_SECONDS)
        else:
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "wb", buffering=0)
    return None


class Stream:
    """A stream of answers, of which nothing is kept: a run that is killed starts anew."""

    def __init__(self, stream: BinaryIO, name: str, *, is_own: bool = False) -> None:
        """Take a stream, by its name in messages; `is_own` if nobody else will close it."""
        self.state: dict[str, Any] | None = None
        self.is_finished = False
        self._stream = stream
        self._name = name
        self._is_own = is_own

    def add(self, answers: bytes, state: Mapping[str, Any]) -> None:
        view = memoryview(answers)
        try:
            while view:
                view = view[self._stream.write(view) :]
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputClosedError(*error.args) from error
        except OSError as error:
            raise DataError(
                f"{self._name} takes no more answers ({error.strerror or error}); make room and start again, or name a "
                "file with --output_file, where a run goes on from what is written"
            ) from error

    def finish(self, state: Mapping[str, Any]) -> None:
        self._stream.flush()

    def start_anew(self) -> bool:
        return False

    def close(self) -> None:
        if self._is_own:
            self._stream.close()


class Journal:
    """A file of answers with its journal, held by this process alone.

    Attributes:
        path: The journal.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, Any],
        *,
        overwrite: bool,
        earlier: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Begin the file, or find the place from which to go on.

        Args:
            output: The file of answers.
            identity: What they depend on, by name, as JSON has it: a file of other answers is not resumed.
            overwrite: Whether a file that is there and holds other answers, or anything else, is replaced.
            earlier: What a journal of an earlier version has in `identity` for the same.

        Raises:
            DataError: The file cannot be written, holds something else, or is another process's.
        """
        self.path = output.with_name(output.name + SUFFIX)
        self.state: dict[str, Any] | None = None
        self.is_finished = False
        self._output = output
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._overwrites = overwrite
        self._replaces = self._is_blank = self._is_made = self._is_announced = False
        self._answers = self._lines = -1
        self._length = 0
        self._last = dict(_NO_ANSWERS)
        if os.path.isdir(output):
            raise DataError(f"--output_file {output} is a folder; name a file in it")
        try:
            self._open(json.loads(json.dumps(dict(earlier))))
        except OSError as error:
            self.close()
            raise _unwritable(output, error) from error
        except BaseException:
            self.close()
            raise

    def _open(self, earlier: dict[str, Any]) -> None:
        self._output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not os.path.lexists(self._output)
        self._answers = os.open(self._output, os.O_RDWR | os.O_CREAT, 0o666)
        self._hold()
        self._is_made = is_new
        problem = self._find_place(self._identity, earlier)
        if problem and not self.start_anew():
            raise DataError(problem)
        if not problem:
            if not self.path.exists() or self._is_blank:
                self._begin()
            self._open_lines()

    def start_anew(self) -> bool:
        if self._overwrites:
            self.state, self.is_finished, self._last = None, False, dict(_NO_ANSWERS)
            self._replaces = True
        return self._overwrites

    def _open_lines(self) -> None:
        """Open the journal, and cut off what neither file should have."""
        if self._lines >= 0:
            os.close(self._lines)
        self._lines = os.open(self.path, os.O_RDWR)
        os.ftruncate(self._answers, self._last["num_bytes"])
        os.ftruncate(self._lines, self._length)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{self._output} is being written by another process; wait for it or name another --output_file"
            ) from None
        except OSError:
            # Some file systems of networks know no locks.
            return

    def _begin(self) -> None:
        """Write a journal of no answers; the file of answers is emptied afterwards."""
        header = _line({"answers_format": _FORMAT, "identity": self._identity})
        with staged(self.path) as aside:
            aside.write_bytes(header)
        self._length = len(header)
        self._is_announced = False

    def _find_place(self, identity: dict[str, Any], earlier: dict[str, Any]) -> str | None:
        """Read the journal up to its last whole line; why its answers cannot be resumed, if they cannot."""
        size = os.fstat(self._answers).st_size
        if not self.path.exists():
            return self._not_ours() if size else None
        header: Any = None
        last: Any = None
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                value = _value(line)
                if value is None:
                    # What was being appended when the run was killed; nothing can follow it.
                    break
                header, last = (value, last) if number == 0 else (header, value)
                self._length += len(line)
        if not isinstance(header, dict) or header.get("answers_format") != _FORMAT:
            return f"{self.path} is no journal of this version; {_OVERWRITE}"
        # A run that ended before its first chunk leaves nothing that has to fit.
        self._is_blank = not size and (last is None or last["state"] is None)
        before = header.get("identity")
        if isinstance(before, dict):
            before |= {name: identity[name] for name, value in earlier.items() if before.get(name, ...) == value}
        if not self._is_blank and (difference := _difference(before, identity)):
            return (
                f"{self._output} holds answers of another run ({difference}); give the options of that run to go on "
                f"with it, or {_OVERWRITE}"
            )
        if last is None and size:
            return self._not_ours()
        if last is not None and not self._is_there(last, size):
            return f"{self._output} was changed since its answers were written ({self.path} says so); {_OVERWRITE}"
        if last is not None:
            self._is_announced = True
            self.state, self.is_finished = last["state"], last["is_finished"]
            self._last = {name: last[name] for name in self._last}
        return None

    def _not_ours(self) -> str:
        return f"--output_file {self._output} exists and is no file of this command; {_OVERWRITE}"

    def _is_there(self, last: Mapping[str, Any], size: int) -> bool:
        """Whether the answers of the last line are in the file, and nothing behind them if they are all."""
        start, end = last["start"], last["num_bytes"]
        is_long_enough = size == end if last["is_finished"] else size >= end
        return is_long_enough and bool(zlib.crc32(os.pread(self._answers, end - start, start)) == last["crc32"])

    def add(self, answers: bytes, state: Mapping[str, Any]) -> None:
        start = self._last["num_bytes"]
        last = {"start": start, "num_bytes": start + len(answers), "crc32": zlib.crc32(answers)}
        self._add(answers, last, state, is_finished=False)

    def finish(self, state: Mapping[str, Any]) -> None:
        self._add(b"", self._last, state, is_finished=True)
        self.is_finished = True

    def _add(self, answers: bytes, last: dict[str, int], state: Mapping[str, Any], *, is_finished: bool) -> None:
        if self._replaces:
            if not answers and is_finished:
                raise DataError(f"no question of the input could be answered, and {self._output} is left as it is")
            if not answers:
                return
            self._replace()
        line = _line({"state": dict(state), "is_finished": is_finished, **last})
        try:
            self._announce()
            _append(self._answers, answers, last["start"])
            _append(self._lines, line, self._length)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._answers, self._last["num_bytes"])
                os.ftruncate(self._lines, self._length)
            raise DataError(
                f"{self._output} takes no more answers ({error.strerror or error}); what is written is kept: make room "
                "and run the same command to go on"
            ) from error
        self._last, self._length, self.state = last, self._length + len(line), dict(state)

    def _announce(self) -> None:
        """Note, before the first answers, that what is in the file from here on is this command's."""
        if not self._is_announced:
            line = _line({"state": None, "is_finished": False, **_NO_ANSWERS})
            _append(self._lines, line, self._length)
            self._is_announced, self._length = True, self._length + len(line)

    def _replace(self) -> None:
        """Begin anew in the place of what is there."""
        try:
            self._begin()
            self._open_lines()
        except OSError as error:
            raise _unwritable(self._output, error) from error
        self._replaces = False

    def close(self) -> None:
        if self.state is None and not self.is_finished:
            # Nothing was written: what somebody puts into the file now is not this command's.
            with suppress(OSError):
                if self._lines >= 0 and not self._replaces:
                    self.path.unlink()
                if self._is_made and not os.fstat(self._answers).st_size:
                    self._output.unlink()
        for descriptor in (self._answers, self._lines):
            if descriptor >= 0:
                os.close(descriptor)
        self._answers = self._lines = -1


def _append(descriptor: int, content: bytes, place: int) -> None:
    """Write all of it at its place, and wait until it is on the disk."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
    os.fsync(descriptor)


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _value(line: bytes) -> dict[str, Any] | None:
    """The object in a whole line; None for any other."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _difference(before: Any, now: dict[str, Any]) -> str | None:
    """The first thing in which two identities differ, for a bracket; None if they are the same."""
    if not isinstance(before, dict):
        return "which it does not name"
    for name in now | before:
        old, new = before.get(name), now.get(name)
        if old != new:
            told = json.dumps(old), json.dumps(new)
            return f"{name} differs" if max(map(len, told)) > 60 else f"{name} was {told[0]} and is {told[1]}"
    return None


def _unwritable(output: Path, error: OSError) -> DataError:
    return DataError(f"--output_file {output} cannot be written ({error.strerror or error}); choose another place")
