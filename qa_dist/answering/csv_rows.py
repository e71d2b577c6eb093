"""Rows of CSV, read from a stream of lines: a row that is badly quoted is told of, and the next ones are read."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qa_dist.common.errors import DataError


class CsvRow(NamedTuple):
    """A row, or what is wrong with it.

    Attributes:
        line: The number of its first line, counted from 1.
        values: What it holds; empty for a blank line, and for one that is no CSV.
        problem: Why it is no CSV; None if it is.
    """

    line: int
    values: list[str]
    problem: str | None = None


def csv_rows(lines: Iterator[bytes], path: Path, mark: str, *, most_bytes: int) -> Iterator[CsvRow]:
    """The rows of a file, the header first.

    What is not UTF-8 becomes halves of surrogate pairs, and so a mistake of its row alone.

    Args:
        lines: The lines of the file, with their ends. No more of them are taken than the rows given need.
        path: Names the file in messages.
        mark: What stands between values.
        most_bytes: A row of so many is no row.

    Raises:
        DataError: The header is no CSV, a quote stays open over further lines to the end of the file, or a row is too
            long. All rows before are given.
    """
    texts = _Texts(lines, path, most_bytes)
    # The module's limit of 128 KiB per field is global, and shorter than some contexts.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(texts, delimiter=mark, strict=True)
        while True:
            texts.begin_row()
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield CsvRow(texts.first, [], _problem(texts, path, error))
                # What a reader does after an error is not documented.
                reader = csv.reader(texts, delimiter=mark, strict=True)
                continue
            if values is None:
                return
            yield CsvRow(texts.first, values)
    finally:
        csv.field_size_limit(limit)


def _problem(texts: "_Texts", path: Path, error: csv.Error) -> str:
    """What is wrong with a row, for a sentence.

    Raises:
        DataError: It is the header, or took the rest of the file with it.
    """
    reason = str(error).partition(" - ")[0]
    if texts.first == 1:
        raise DataError(f"{path} is not CSV: {reason} at line {texts.number}; mend the file") from error
    is_one_line = texts.number == texts.first
    if texts.is_at_end and not is_one_line:
        raise DataError(
            f"{path} has a quote in the row at line {texts.first} that is not closed before the end of the file at "
            f"line {texts.number}; close it, or write quotes inside a value twice"
        ) from error
    if texts.is_at_end:
        return "it is not CSV (a quote is not closed)"
    which = "it is not CSV" if is_one_line else f"it and what follows up to line {texts.number} are not CSV"
    return f"{which} ({reason})"


class _Texts:
    """Lines as text, counted.

    Attributes:
        number: Lines given so far.
        first: Number of the first line of the row in hand.
        is_at_end: Whether there are no more.
    """

    def __init__(self, lines: Iterator[bytes], path: Path, most_bytes: int) -> None:
        self.number, self.first, self.is_at_end = 0, 1, False
        self._lines, self._path, self._most_bytes = lines, path, most_bytes
        self._num_bytes = 0

    def begin_row(self) -> None:
        """Let the next line be the first one of a row."""
        self.first, self._num_bytes = self.number + 1, 0

    def __iter__(self) -> "_Texts":
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.is_at_end = True
            raise StopIteration
        self.number += 1
        self._num_bytes += len(line)
        if self._num_bytes >= self._most_bytes:
            raise row_too_long(self._path, self.first, self._most_bytes)
        return line.decode("utf-8", "surrogateescape")


def row_too_long(path: Path, number: int, most_bytes: int) -> DataError:
    """Says that the row which begins at a line is longer than any that is read."""
    return DataError(
        f"{path} has {most_bytes >> 20} MiB or more in the row at line {number}, where a question and its context "
        "belong; check that it is a text file and that its quotes are closed"
    )
