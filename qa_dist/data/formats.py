"""Files of users turned into values: JSON, JSONL, CSV or Parquet, plain or gzipped.

`parse` is the way in for questions, `load` for other lists. `FORMATS` has a row for each kind of file, with the
function that turns bytes into values; a new one needs such a function and a row. How questions are laid out in the
values is for `layouts` to tell, and `checking` looks at the records.
"""

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfoNotFoundError

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json
from qa_dist.common.reading import decoded, decompressed, is_compressed
from qa_dist.data.layouts import ALLOWED, lay_out, require_columns
from qa_dist.data.rows import Reading, with_whole_ids

PARQUET_MAGIC = b"PAR1"
_SEPARATORS = ",;\t|"
_FORMATS = "files are JSON, JSONL, CSV, TSV or Parquet, each plain or .gz"


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        value: as JSON has it.
        word: what messages call a member of it, if it is a list.
        columns: names of the columns, where the file has a header.
        shifted: positions of rows with more values than there are columns.
    """

    value: Any
    word: str = "row"
    columns: tuple[str, ...] | None = None
    shifted: frozenset[int] = frozenset()


def _load_json(content: bytes, path: Path) -> Content:
    text = decoded(content, path)
    try:
        value = read_json(text)
    except ParseError as error:
        # Many tools write one object per line into a file called .json.
        first, _, rest = text.lstrip().partition("\n")
        if rest.strip() and is_object(first):
            return _load_jsonl(content, path)
        raise DataError(f"{path} is not JSON that can be used: {error}; mend the file") from error
    return Content(value)


def is_object(line: str) -> bool:
    """Whether a line is a JSON object of its own."""
    try:
        return isinstance(read_json(line), dict)
    except ParseError:
        return False


def _load_jsonl(content: bytes, path: Path) -> Content:
    text = decoded(content, path)
    rows: list[Any] = []
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(read_json(line))
        except ParseError as error:
            if not rows and (whole := _document(text)) is not None:
                return whole
            what = f"{error.reason} at line {number}" + (f", column {error.column}" if error.column else "")
            raise DataError(f"{path} is not JSONL: {what}; write one JSON object per line") from error
    (only,) = rows if len(rows) == 1 else (None,)
    if isinstance(only, list) or (isinstance(only, dict) and isinstance(only.get("data"), list)):
        # A whole JSON file in one line.
        return Content(only, "record")
    return Content(rows, "record")


def _document(text: str) -> Content | None:
    """What a text holds that is one JSON value in several lines; None if it is none."""
    try:
        return Content(read_json(text))
    except ParseError:
        return None


def _load_csv(content: bytes, path: Path) -> Content:
    text = decoded(content, path)
    # The module's limit of 128 KiB per field is global, and shorter than some contexts.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator_of(text), strict=True)
        columns = reader.fieldnames or []
        rows: list[dict[Any, Any]] = list(reader)
    except csv.Error as error:
        # Lines are counted when a row is whole; a quote may have let this one run to the end of the file.
        where = f"in the row at line {reader.line_num + 1}"
        raise DataError(f"{path} is not CSV: {error} {where}; mend the file") from error
    finally:
        csv.field_size_limit(limit)
    # Spreadsheets end in rows of separators alone, and rows in separators without a column's name.
    while rows and not any(rows[-1].values()):
        rows.pop()
    # The reader files surplus values under None: a separator without quotes has shifted the columns.
    shifted = frozenset(number for number, row in enumerate(rows) if None in row)
    named = [{name: value for name, value in row.items() if name and name.strip()} for row in rows]
    return Content(named, columns=tuple(name for name in columns if name.strip()), shifted=shifted)


def separator_of(text: str) -> str:
    """What stands between the columns of a table: that of `_SEPARATORS` which gives its header the most of them."""
    widths = {mark: len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), ())) for mark in _SEPARATORS}
    return max(widths, key=widths.__getitem__)


def _load_parquet(content: bytes, path: Path) -> Content:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # Not `read_table`, which takes no file with two columns of one name.
        table = parquet.ParquetFile(pa.BufferReader(content)).read()
        columns = tuple(table.column_names)
        rows = table.to_pylist() if len(set(columns)) == len(columns) else []
    except (pa.ArrowException, OSError, ValueError, OverflowError, ZoneInfoNotFoundError) as error:
        # Values may be none that Python has: text that is not UTF-8, a year 200,000, a time zone that nobody knows.
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not Parquet that can be read ({reason}); write it again") from error
    return Content(rows, columns=columns)


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffixes: What names of such files end in, apart from .gz.
        load: Takes the bytes, decompressed, and the path for messages, and gives what they hold.
    """

    suffixes: tuple[str, ...]
    load: Callable[[bytes, Path], Content]


FORMATS = {
    "JSON": Format((".json",), _load_json),
    "JSONL": Format((".jsonl", ".ndjson"), _load_jsonl),
    "CSV": Format((".csv", ".tsv"), _load_csv),
    "Parquet": Format((".parquet", ".pq"), _load_parquet),
}
"""Every kind of file by name."""


def parse(content: bytes, path: Path, *, is_unpacked: bool = False) -> Reading:
    """The records in the bytes of a file of questions; `is_unpacked`: without the compression that its name tells of.

    Raises:
        DataError: They cannot be parsed, or are in no layout that is known.
    """
    loaded = load(content, path, is_unpacked=is_unpacked)
    # Parquet may hold articles or paragraphs too.
    if loaded.columns is not None and not {"paragraphs", "qas"} & {*loaded.columns}:
        require_columns(loaded.columns, path)
    value = loaded.value if loaded.columns is None else with_whole_ids(loaded.value)
    return lay_out(value, path, loaded.word, loaded.shifted)


def load(content: bytes, path: Path, *, is_unpacked: bool = False, allowed: str = ALLOWED) -> Content:
    """What the bytes of a file hold; `path` says by its name which kind of file it is, else the bytes do.

    `allowed` says for messages what there may be in such a file: by default the layouts of questions.

    Raises:
        DataError: They cannot be parsed.
    """
    if content and not is_unpacked:
        require_gzip(path, content)
        content = decompressed(content, path)
    if not content.strip():
        raise DataError(f"{path} is empty; {_FORMATS}, and {allowed}")
    return FORMATS[_format(content, path, allowed)].load(content, path)


def named_format(path: Path, *, is_json: bool, is_parquet: bool) -> str | None:
    """Which of FORMATS a file is by its name; None if that does not say.

    Raises:
        DataError: Its first bytes are those of another kind.
    """
    ending = next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "")
    for name, kind in FORMATS.items():
        if ending in kind.suffixes:
            if (is_parquet and name != "Parquet") or (is_json and name == "CSV"):
                actual = "Parquet" if is_parquet else "JSON"
                raise DataError(f"{path} is {actual} although its name ends in {ending}; rename it")
            return name
    return None


def require_gzip(path: Path, start: bytes) -> None:
    """Make sure that a file that is called so is compressed; `start` are its first bytes.

    Raises:
        DataError: It is not.
    """
    if path.suffix.lower() == ".gz" and not is_compressed(start):
        raise DataError(f"{path} is not gzip-compressed although it ends in .gz; rename it or compress it")


def _format(content: bytes, path: Path, allowed: str) -> str:
    """Which of FORMATS the file is."""
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_json = start[:1] in (b"{", b"[")
    is_parquet = content.startswith(PARQUET_MAGIC)
    if (named := named_format(path, is_json=is_json, is_parquet=is_parquet)) is not None:
        return named
    if is_parquet:
        return "Parquet"
    if is_json:
        return "JSON"
    header = start.split(b"\n", 1)[0]
    is_table = any(mark.encode() in header for mark in _SEPARATORS)
    if is_table and (b"question" in header or b"query" in header) and (b"text" in header or b"passage" in header):
        return "CSV"
    raise DataError(f"{path} is neither JSON, JSONL, CSV or TSV with a header, nor Parquet; {_FORMATS}, and {allowed}")
