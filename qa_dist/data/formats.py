"""Files of questions read into raw records: SQuAD JSON, or rows as JSON, JSONL, CSV or Parquet, plain or gzipped.

`parse` is the way in. `LAYOUTS` has a row for each layout, with the function that reads it; a new one needs such a
function and a row. Nothing is checked here but that a file is what it claims to be: `checking` looks at the records.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json, type_name
from qa_dist.common.reading import decoded, decompressed, is_compressed

Row = Mapping[str, Any]

COLUMNS = ("id", "context", "question", "answers")
"""What a row must have; `title` is optional, and `is_impossible` is honoured where it occurs."""

_NUM_NAMES_SHOWN = 8
_PARQUET_MAGIC = b"PAR1"
_ALLOWED = (
    "allowed are SQuAD JSON, or JSONL, CSV or Parquet rows with id, context, question and answers, each plain or .gz"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One question as its source has it, not yet checked.

    Attributes:
        place: where it stands in its source, for records without a usable id.
        row: its keys and values; SQuAD's nesting is already flattened.
        problem: a key of `PROBLEMS`, if the record is already known to be unusable.
    """

    place: str
    row: Row
    problem: str | None = None


def read_rows(rows: Iterable[Row]) -> Iterator[Record]:
    """Records of rows that already have the schema of the hub's `squad` and `squad_v2`."""
    for number, row in enumerate(rows, 1):
        yield Record(f"row {number}", row)


# ----------------------------------------------------------------------------------------------------------- layouts


def _json_records(content: bytes, path: Path) -> Iterable[Record]:
    text = decoded(content, path)
    try:
        value = read_json(text)
    except ParseError as error:
        # Many tools write one object per line into a file called .json.
        first, _, rest = text.lstrip().partition("\n")
        if rest.strip() and _is_object(first):
            return _jsonl_records(content, path)
        raise DataError(f"{path} is not JSON that can be used: {error}; mend the file") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and "context" in value and "question" in value:
        value = [value]
    if not isinstance(value, list):
        top = type_name(value)
        if isinstance(value, dict):
            top += f" with the keys {listed(list(value), len(value))}"
        raise DataError(
            f"{path} is JSON but not in SQuAD's layout: its top level is {top}, and must be "
            f'{{"data": [articles]}} or a list of rows with {", ".join(COLUMNS)}'
        )
    if any(isinstance(item, dict) and "context" in item and "question" in item for item in value):
        return _checked_rows(value, path, "row")
    if value and not any(isinstance(item, dict) and "paragraphs" in item for item in value):
        raise DataError(
            f"{path} is JSON but not in SQuAD's layout: its list holds {type_name(value[0])}, and must hold articles "
            f"with paragraphs, or rows with {', '.join(COLUMNS)}"
        )
    return _article_records(value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(read_json(line), dict)
    except ParseError:
        return False


def _article_records(articles: Sequence[Any]) -> Iterator[Record]:
    """SQuAD's articles → paragraphs → questions, flattened; what is broken on the way is a record with a problem."""
    for article_number, article in enumerate(articles, 1):
        article_place = f"article {article_number}"
        if problem := _list_problem(article, "paragraphs"):
            yield Record(article_place, {}, problem)
            continue
        for paragraph_number, paragraph in enumerate(article["paragraphs"], 1):
            paragraph_place = f"{article_place}, paragraph {paragraph_number}"
            if problem := _list_problem(paragraph, "qas"):
                yield Record(paragraph_place, {}, problem)
                continue
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            for number, qa in enumerate(paragraph["qas"], 1):
                place = f"{paragraph_place}, question {number}"
                if isinstance(qa, dict):
                    yield Record(place, {**qa, **shared})
                else:
                    yield Record(place, {}, "not_object")


def _list_problem(parent: Any, key: str) -> str | None:
    if not isinstance(parent, dict):
        return "not_object"
    if parent.get(key) is None:
        return f"missing_{key}"
    return None if isinstance(parent[key], list) else f"wrong_{key}"


def _jsonl_records(content: bytes, path: Path) -> Iterable[Record]:
    rows: list[Any] = []
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(decoded(content, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(read_json(line))
        except ParseError as error:
            what = f"{error.reason} at line {number}" + (f", column {error.column}" if error.column else "")
            raise DataError(f"{path} is not JSONL: {what}; write one JSON object per line") from error
    return _checked_rows(rows, path, "record")


def _csv_records(content: bytes, path: Path) -> Iterable[Record]:
    text = decoded(content, path)
    # The module's limit of 128 KiB per field is global, and shorter than some contexts.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = reader.fieldnames or []
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error} at line {reader.line_num}; mend the file") from error
    finally:
        csv.field_size_limit(limit)
    if len(columns) == 1 and any(separator in columns[0] for separator in ";\t|"):
        raise DataError(f"{path} has one column called {columns[0]!r}; separate columns by commas")
    _require_columns(columns, path)
    # The reader files surplus values under None: a comma without quotes has shifted the columns.
    return [
        Record(f"row {number}", row, "surplus_values" if None in row else None) for number, row in enumerate(rows, 1)
    ]


def _parquet_records(content: bytes, path: Path) -> Iterable[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not Parquet ({reason}); write it again") from error
    _require_columns(table.column_names, path)
    return read_rows(table.to_pylist())


def _checked_rows(rows: Sequence[Any], path: Path, word: str) -> Iterable[Record]:
    """Records of JSON rows, some of which may be no objects at all."""
    names = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    if rows:
        _require_columns(list(names), path)
    for number, row in enumerate(rows, 1):
        place = f"{word} {number}"
        yield Record(place, row) if isinstance(row, dict) else Record(place, {}, "not_object")


def _require_columns(columns: Sequence[str], path: Path) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}: it has {listed(columns, len(columns)) or 'nothing'}, and rows need "
            f"{', '.join(COLUMNS)}"
        )
    repeated = [name for name in dict.fromkeys(columns) if list(columns).count(name) > 1]
    if repeated:
        raise DataError(f"{path} has the column {listed(repeated, len(repeated))} more than once; keep one of them")


class Layout(NamedTuple):
    """A way to write questions into a file.

    Attributes:
        suffixes: What names of such files end in, apart from .gz.
        read: Takes the content, decompressed, and the path for messages, and gives the records.
    """

    suffixes: tuple[str, ...]
    read: Callable[[bytes, Path], Iterable[Record]]


LAYOUTS = {
    "JSON": Layout((".json",), _json_records),
    "JSONL": Layout((".jsonl", ".ndjson"), _jsonl_records),
    "CSV": Layout((".csv",), _csv_records),
    "Parquet": Layout((".parquet", ".pq"), _parquet_records),
}
"""Every layout by name."""


def parse(content: bytes, path: Path) -> Iterable[Record]:
    """The records in the bytes of a file; `path` says by its name how they are laid out, else the content does.

    Raises:
        DataError: They cannot be parsed, or are laid out in another way.
    """
    if path.suffix.lower() == ".gz" and content and not is_compressed(content):
        raise DataError(f"{path} is not gzip-compressed although it ends in .gz; rename it or compress it")
    content = decompressed(content, path)
    if not content.strip():
        raise DataError(f"{path} is empty; {_ALLOWED}")
    return LAYOUTS[_layout(content, path)].read(content, path)


def _layout(content: bytes, path: Path) -> str:
    """Which of LAYOUTS the file is in."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_json = start[:1] in (b"{", b"[")
    is_parquet = content.startswith(_PARQUET_MAGIC)
    for name, layout in LAYOUTS.items():
        if suffixes and suffixes[-1] in layout.suffixes:
            if (is_parquet and name != "Parquet") or (is_json and name == "CSV"):
                actual = "Parquet" if is_parquet else "JSON"
                raise DataError(f"{path} is {actual} although its name ends in {suffixes[-1]}; rename it")
            return name
    if is_parquet:
        return "Parquet"
    if is_json:
        return "JSON"
    header = start.split(b"\n", 1)[0]
    if b"context" in header and b"question" in header:
        return "CSV"
    raise DataError(f"{path} is neither JSON, JSONL, CSV with a header, nor Parquet; {_ALLOWED}")


def printable(text: str) -> str:
    """Text that any terminal can print: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed(names: Sequence[str], count: int) -> str:
    """The first of `count` names, with dots for the rest."""
    shown = names[:_NUM_NAMES_SHOWN]
    text = ", ".join(printable(str(name)) for name in shown)
    return f"{text}, ..." if count > len(shown) else text
