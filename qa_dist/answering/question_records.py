"""What lines and rows of files of questions say: records, or what is wrong with them.

The layouts are those of `qa_dist.data`. A line of JSONL may also be a context with its questions (MRQA), and a row may
have a list of passages as its context, or as `contexts`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qa_dist.answering.passages import PASSAGES, TWO_KINDS, problem_of_cells
from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json
from qa_dist.data.layouts import lay_out
from qa_dist.data.rows import Columns, Record, Row, listed
from qa_dist.data.values import is_nothing, without_point


class Flaw(NamedTuple):
    """What is no question that can be answered: where it stands, and what is wrong."""

    place: str
    problem: str


def _record(columns: Columns, values: Row, place: str) -> Record | Flaw:
    row = columns.row(values)
    passages = values.get(PASSAGES)
    if not is_nothing(row.get("context")):
        return Record(place, row) if is_nothing(passages) else Flaw(place, TWO_KINDS)
    return Record(place, row if passages is None else {**row, "context": passages})


def records_of_row(columns: Columns, values: Row, place: str) -> list[Record | Flaw]:
    """The record of a row of Parquet."""
    return [_record(columns, values, place)]


def records_of_cells(
    columns: Columns, names: Sequence[str], values: Sequence[str], place: str, has_float_ids: bool
) -> list[Record | Flaw]:
    """The record of a row of CSV.

    Args:
        columns: What the columns hold.
        names: Their names; columns without one are left out.
        values: The cells.
        place: Where the row stands.
        has_float_ids: Whether ids are whole numbers that became floats, as `7.0`.
    """
    if len(values) > len(names):
        # A separator without quotes has shifted the columns.
        return [Record(place, {}, "surplus_values")]
    if any("\udc80" <= character <= "\udcff" for value in values for character in value if character >= "\ud800"):
        return [Flaw(place, "it is not UTF-8")]
    row = {name: value for name, value in zip(names, values, strict=False) if name.strip()}
    if has_float_ids and columns.id in row:
        row[columns.id] = without_point(row[columns.id])
    if problem := problem_of_cells(row):
        return [Flaw(place, problem)]
    if columns.answers in row and row[columns.answers] not in row.get(columns.context or "", ""):
        # Another one than the context has cannot be meant, if a whole number is.
        row[columns.answers] = without_point(row[columns.answers])
    return [_record(columns, row, place)]


def records_of_line(line: bytes, place: str) -> list[Record | Flaw]:
    """The records of a line of JSONL."""
    try:
        value = read_json(line.decode())
    except UnicodeDecodeError as error:
        return [Flaw(place, f"it is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})")]
    except ParseError as error:
        at = f" at column {error.column}" if error.column else ""
        return [Flaw(place, f"it is not JSON ({error.reason}{at})")]
    if not isinstance(value, dict):
        return [Record(place, {}, "not_object")]
    columns = Columns.of(list(value))
    if columns.question is not None and (columns.context is not None or PASSAGES in value) and not _is_nested(value):
        return [_record(columns, value, place)]
    if "header" in value and columns.question is None:
        # The first line of MRQA's files.
        return []
    return _lay_out_line(value, place)


def _is_nested(value: Row) -> bool:
    return any(isinstance(value.get(name), list) for name in ("qas", "detected_answers", "annotations"))


def _lay_out_line(value: Row, place: str) -> list[Record | Flaw]:
    try:
        records = lay_out(value if "data" in value else [value], Path(place)).records
    except DataError:
        return [Flaw(place, f"it has no question or no context, but {listed(list(value), len(value)) or 'nothing'}")]
    if len(records) == 1:
        return [Record(place, records[0].row, records[0].problem)]
    return [Record(f"{place}, {record.place}", record.row, record.problem) for record in records]
