"""Lists of passages for one question, as a server takes them: lines of JSONL and rows of Parquet may have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json
from qa_dist.common.reading import decoded
from qa_dist.data.rows import Columns
from qa_dist.data.values import read_cell

PASSAGES = "contexts"

TWO_KINDS = f"it has a context and {PASSAGES} beside it; leave out the one that is not to be read"
"""What is wrong with a row that has both: either would be passed over."""

_INSTEAD = "write a line of JSONL for each question, or a row for each context"


def refuse_passages(content: bytes, path: Path) -> None:
    """Make sure that no question of a JSON document has them: there they would be passed over.

    Raises:
        DataError: One has.
    """
    # Most documents do without, and are not parsed twice. Inside of texts there is a backslash before the mark.
    if b'"contexts"' not in content:
        return
    try:
        value = read_json(decoded(content, path))
    except ParseError:
        return
    if isinstance(value, dict):
        value = value.get("data", [value])
    if isinstance(value, list) and any(isinstance(row, dict) and _asks_about_passages(row) for row in value):
        raise DataError(
            f"{path} has a list of contexts for a question, which is not read of JSON documents; {_INSTEAD}"
        )


def _asks_about_passages(row: Mapping[str, Any]) -> bool:
    return PASSAGES in row and Columns.of(list(row)).question is not None


def problem_of_cells(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a row of a table whose cell holds such a list: it would be one text."""
    found = read_cell(str(values.get(PASSAGES) or ""))
    return f"{PASSAGES} is a list in a cell, which would be one text; {_INSTEAD}" if isinstance(found, list) else None
