"""Files that are scored: references, predictions and null odds, as people have them.

References are read by the reader of training data, so that whatever can be evaluated on can be scored.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import type_name
from qa_dist.common.reading import read_bytes, read_json_file
from qa_dist.data.formats import load
from qa_dist.data.layouts import rows_by_column, split_rows
from qa_dist.data.rows import IDS, listed
from qa_dist.data.values import are_floats, number_as_text, read_name, spelled
from qa_dist.evaluation.scoring import counted

if TYPE_CHECKING:
    from qa_dist.data.rows import Reading

_TEXTS = ("prediction_text", "prediction", "text", "answer")
_ALLOWED = (
    "predictions are an object from question ids to texts, or rows with id and prediction_text as JSON, JSONL, CSV, "
    "TSV or Parquet"
)


@dataclass(frozen=True, slots=True)
class References:
    """The reference answers of a data set.

    Attributes:
        answers: the texts of the reference answers of each question, in the order of the file.
        version_2: whether the data set may hold unanswerable questions.
        notes: what was taken in another way than usual.
        unlabelled: ids of questions whose answers are not known, which are not scored.
    """

    answers: dict[str, tuple[str, ...]]
    version_2: bool
    notes: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()


def load_references(path: str | Path) -> References:
    """The reference answers in a file of questions, in any layout that training reads: see `references_in`.

    Raises:
        DataError: the file cannot be read, or its questions cannot be told.
    """
    from qa_dist.data.sources import file_source

    return references_in(file_source(str(path), "validation").records(), path)


def references_in(reading: "Reading", path: str | Path) -> References:
    """The reference answers among the records of a file that was read.

    Version 2 is what calls itself so, says `is_impossible` of any question, or does not call itself version 1 and has a
    question without an answer. Contexts are not looked at. Questions whose answers are not known are left out.

    Args:
        reading: the records.
        path: where they are from, for messages.

    Raises:
        DataError: its questions cannot be told, or no answer of them is known.
    """
    from qa_dist.data.checking import reference_texts

    found = reference_texts(reading)
    if found.problems:
        raise DataError(f"{path}: {'; '.join(problem.text() for problem in found.problems)}; mend them.")
    if found.repeated:
        raise DataError(
            f"{path} holds {counted(found.repeated, 'id')} more than once; every question needs its own id."
        )
    if not found.texts:
        raise DataError(f"{path} holds no questions; give the file that the predictions answer.")
    answers = {key: texts for key, texts in found.texts.items() if texts is not None}
    unknown = [key for key, texts in found.texts.items() if texts is None]
    if not answers:
        raise DataError(
            f"{path} holds no answers (answers is missing for {counted(unknown, 'question')}), so nothing "
            "can be scored by it; give a file with answers."
        )
    notes = list(found.notes)
    if unknown:
        notes.append(f"{counted(unknown, 'question')} without known answers are not scored")
    may_lack_answers = reading.is_version_2 is None and not all(answers.values())
    version_2 = bool(reading.is_version_2) or found.has_impossible or may_lack_answers
    return References(answers, version_2, tuple(notes), tuple(unknown))


class Predictions(NamedTuple):
    """Predicted texts by question id, and what was taken in another way than usual."""

    texts: dict[str, str]
    notes: tuple[str, ...] = ()


def load_predictions(path: str | Path) -> Predictions:
    """The predicted text of each question in a file, also gzipped.

    It is an object from ids to texts, or to lists of candidates of which the first is taken (`nbest.json`), or rows of
    `id` and `prediction_text`, as the metrics of the `evaluate` library take them: JSON (also by column), JSONL, CSV,
    TSV or Parquet. A whole number may stand for a text.

    Raises:
        DataError: the file cannot be read or is none of these, a row has more values than the header has columns, or
            an id occurs twice.
    """
    path = Path(path)
    content = load(read_bytes(path), path, allowed=_ALLOWED)
    if content.shifted:
        raise DataError(_surplus(content.shifted, path))
    value = content.value
    if content.word == "record" and isinstance(value, list) and len(value) == 1 and _is_whole(value[0]):
        # A whole JSON file in one line.
        (value,) = value
    if not isinstance(value, dict):
        return _of_rows(value, path, is_table=content.columns is not None)
    rows = _rows_of_object(value)
    return _of_object(value, path) if rows is None else _of_rows(rows, path)


def _surplus(shifted: Collection[int], path: Path) -> str:
    """What to say of a table with rows, at these positions, whose columns are shifted."""
    from qa_dist.data.checking import PROBLEMS

    rows = listed([f"row {index + 1}" for index in sorted(shifted)], len(shifted))
    what = f"{len(shifted):,} where {PROBLEMS['surplus_values']} ({rows})"
    return f"{path}: {what}; put quotation marks around each text that holds what separates the columns."


def _is_whole(line: Any) -> bool:
    """Whether the only line of a file is an object of predictions and not one row of them."""
    if not isinstance(line, dict):
        return False
    return _is_by_column(line) or (_named(line, IDS) is None and _named(line, _TEXTS) is None)


def _rows_of_object(value: Mapping[str, Any]) -> list[Any] | None:
    """The rows in an object: a table as pandas writes it, a list under `data`, or one row; None if it is no such."""
    if _is_row(value) or _is_by_column(value):
        by_column = rows_by_column(value)
        return [value] if by_column is None else by_column
    data = split_rows(value) or value.get("data")
    return data if isinstance(data, list) else None


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether an object is one row and not a table of ids."""
    return "prediction_text" in value and _named(value, IDS) is not None


def _is_by_column(value: Mapping[str, Any]) -> bool:
    """Whether an object has the values of all rows, in lists or by their numbers, under the names of columns."""
    found = [value[name] for name in (_named(value, IDS), _named(value, _TEXTS)) if name is not None]
    return len(found) == 2 and (
        all(isinstance(column, list) for column in found) or all(isinstance(column, dict) for column in found)
    )


def _of_object(value: Mapping[str, Any], path: Path) -> Predictions:
    texts, notes = dict(value), []
    if value and all(isinstance(entry, list) and entry and isinstance(entry[0], dict) for entry in value.values()):
        texts = {key: entry[0].get("text") for key, entry in value.items()}
        notes.append("the first candidate of each question is scored")
    texts = {key: number_as_text(text) for key, text in texts.items()}
    strange = [key for key, text in texts.items() if not isinstance(text, str)]
    if strange:
        raise DataError(
            f"{path} must map question ids to texts, but does not for {counted(strange, 'id')}; {_ALLOWED}."
        )
    return Predictions(texts, tuple(notes))


def _of_rows(rows: Any, path: Path, *, is_table: bool = False) -> Predictions:
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type_name(rows)}; {_ALLOWED}.")
    texts: dict[str, str] = {}
    repeated = []
    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    identity, text = _named(names, IDS), _named(names, _TEXTS)
    if identity is None or text is None:
        what = f"rows with {', '.join(map(str, names))}" if names else "a list without rows"
        raise DataError(f"{path} holds {what}; {_ALLOWED}.")
    # As of questions: an id in JSON is the text that it is.
    has_floats = is_table and are_floats([row.get(identity) for row in rows if isinstance(row, dict)])
    for number, row in enumerate(rows, 1):
        try:
            key = read_name(row.get(identity)) if isinstance(row, dict) else None
        except ValueError:
            key = None
        if key is not None and has_floats:
            key = key.removesuffix(".0")
        predicted = number_as_text(row.get(text)) if isinstance(row, dict) else None
        if key is None or not isinstance(predicted, str):
            raise DataError(f"{path}: row {number} has no {identity if key is None else text} that is text; mend it.")
        if key in texts:
            repeated.append(key)
        texts[key] = predicted
    if repeated:
        raise DataError(f"{path} holds {counted(repeated, 'id')} more than once; keep one prediction for each.")
    odds = "no_answer_probability is not used; qa-dist score takes it in a file of its own, as --null_odds"
    return Predictions(texts, (odds,) if "no_answer_probability" in names else ())


def _named(names: Mapping[str, Any], wanted: tuple[str, ...]) -> str | None:
    known = spelled(names)
    return next((known[name] for name in wanted if name in known), None)


def load_null_odds(path: str | Path) -> dict[str, float]:
    """The null odds of each question in a JSON object (also gzipped).

    Raises:
        DataError: the file cannot be read or is not an object of numbers, or an id occurs twice.
    """
    odds = read_json_file(path)
    if not isinstance(odds, dict):
        raise DataError(f"{path} must hold a JSON object from question ids to numbers, not {type_name(odds)}.")
    strange = [key for key, value in odds.items() if not isinstance(value, int | float)]
    if strange:
        raise DataError(f"{path} must map question ids to numbers, but does not for {counted(strange, 'id')}.")
    strange = [key for key, value in odds.items() if isinstance(value, bool) or not _is_finite(value)]
    if strange:
        raise DataError(f"{path}: the null odds of {counted(strange, 'question')} are not finite numbers; mend them.")
    return odds


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
