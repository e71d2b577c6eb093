"""Single values as files hold them: answers in every way they are written, ids, numbers that became texts, truth.

Each function gives the value that is meant, None where nothing is said, and a ValueError where it cannot be told.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from qa_dist.common.parsers import ParseError, read_json
from qa_dist.data.literals import read_literal

_TEXTS = ("text", "answer_text")
_STARTS = ("answer_start", "start")
_OPENINGS = ("{", "[{", "[[", "['", '["')
_ARRAYS = ("array(", "np.array(", "numpy.array(")
_NOTHING = ("None", "nan", "NaN", "null")
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


_WHOLE_FLOAT = re.compile(r"-?\d+\.0")


class RawAnswer(NamedTuple):
    """An answer that is not placed yet: its text, and where it is said to begin; None if that is not said."""

    text: str
    start: int | None


def read_answers(raw: Any) -> list[RawAnswer] | None:
    """The answers that a value means, in any of the ways they are written.

    These are `{"text": [...], "answer_start": [...]}` (hub), `[{"text", "answer_start"}, ...]` (SQuAD files), one such
    object or text alone, `{"start", "end", "text"}` (Label Studio), texts without offsets, and any of them as JSON or
    as a Python literal in a cell of text. A whole number may stand for a text: the year 1871. An empty list or object
    means that there is no answer, None or an empty cell that nothing is known.

    Raises:
        ValueError: It is none of these.
    """
    if _is_blank_cell(raw):
        return None
    value = number_as_text(_unquoted(raw))
    if isinstance(value, str):
        return [RawAnswer(value, None)]
    if isinstance(value, Mapping):
        return _of_object(value)
    if isinstance(value, list | tuple):
        items = [_of_item(item) for item in value]
        is_known = not items or any(item is not None for item in items)
        return [answer for item in items for answer in item or ()] if is_known else None
    raise ValueError("answers are neither a list nor an object")


def _of_item(item: Any) -> list[RawAnswer] | None:
    """The answers in a member of a list; None if it says nothing."""
    if _is_null(item):
        return None
    if isinstance(item, Mapping):
        return _of_object(item)
    item = number_as_text(item)
    if isinstance(item, str):
        return [RawAnswer(item, None)]
    raise ValueError("an answer is neither an object nor a text")


def _of_object(value: Mapping[str, Any]) -> list[RawAnswer] | None:
    """The answers of one object; None if it says nothing."""
    if not value:
        return []
    texts, starts = _first(value, _TEXTS), _first(value, _STARTS)
    if texts is ...:
        raise ValueError("an answer has no text")
    starts = None if starts is ... else _unquoted(starts)
    if isinstance(starts, list) and isinstance(texts, str):
        # Both are cells of text. A text that stands for itself may well begin with a bracket.
        texts = _unquoted(texts)
    if not isinstance(texts, list | tuple):
        if isinstance(starts, list | tuple):
            if len(starts) != 1:
                raise ValueError("a text has several offsets")
            starts = starts[0]
        start = read_start(starts)
        if _is_null(texts) and start is None:
            return None
        return [_answer(texts, start)]
    if is_nothing(starts):
        starts = [None] * len(texts)
    elif not isinstance(starts, list | tuple):
        starts = [starts]
    if len(starts) != len(texts):
        raise ValueError("there are not as many offsets as texts")
    pairs = [(text, read_start(start)) for text, start in zip(texts, starts, strict=True)]
    if pairs and all(start is None and _is_null(text) for text, start in pairs):
        # What a table makes of an answer that nobody gave.
        return None
    return [_answer(text, start) for text, start in pairs]


def _first(value: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of these keys that there is, in whatever way it is spelled; ... without any."""
    if not any(name in value for name in names):
        value = {snake_case(str(name)): item for name, item in value.items()}
    return next((value[name] for name in names if name in value), ...)


def _answer(text: Any, start: int | None) -> RawAnswer:
    if _is_null(text):
        # Beside `is_impossible` it means that there is none, else it is an answer that got lost.
        text = ""
    text = number_as_text(text)
    if not isinstance(text, str):
        raise ValueError("an answer text is no text")
    return RawAnswer(text, start)


def number_as_text(value: Any) -> Any:
    """A whole number, also as `70.0`, as its digits, as answers are years and counts; any other value as it is."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def read_cell(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a cell holds as a program writes one; None for any other text, as "[sic] he wrote"."""
    if not text.lstrip().startswith((*_OPENINGS, *_ARRAYS)):
        return None
    try:
        value = _unquoted(text)
    except ValueError:
        return None
    return value if isinstance(value, list | dict) else None


def _unquoted(raw: Any) -> Any:
    """What a cell of text holds, if it is written as a list or an object; else the value as it is.

    Raises:
        ValueError: It begins and ends as one and is none.
    """
    if not isinstance(raw, str):
        return raw
    text = raw.strip()
    if not text.startswith(("[", "{", "(", *_ARRAYS)):
        return raw
    try:
        value = read_json(text)
    except ParseError:
        try:
            value = read_literal(text)
        except ValueError:
            # An answer may begin with a bracket: "[sic] he wrote", "(72 + 10) ohms".
            if text.startswith(_OPENINGS) or (text.startswith("[") and text.endswith("]")):
                raise
            return raw
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and (text.startswith("[") or all(isinstance(item, str | dict) for item in value)):
        return value
    return value if text.startswith(_ARRAYS) else raw


def read_start(value: Any) -> int | None:
    """An offset: a whole number, also as `70.0` or text; None where nothing is said.

    Raises:
        ValueError: It is something else.
    """
    if _is_blank_cell(value):
        return None
    if isinstance(value, str):
        value = float(value) if "." in value or "e" in value.lower() else int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an offset is no whole number")
    return value


def read_truth(value: Any) -> bool | None:
    """True or false, also as 0 and 1 and as text; None where nothing is said.

    Raises:
        ValueError: It is something else.
    """
    if _is_blank_cell(value):
        return None
    if isinstance(value, bool):
        return value
    truth = _TRUTH.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
    if truth is None:
        raise ValueError("it is neither true nor false")
    return truth


def read_name(value: Any) -> str | None:
    """An id or a title: text, or a whole number as text; None where nothing is said.

    Raises:
        ValueError: It is something else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("it is neither text nor a whole number")


def without_point(cell: str) -> str:
    """A whole number that a table took for a float, as "7.0", as it was; any other cell as it is."""
    return cell.removesuffix(".0") if _WHOLE_FLOAT.fullmatch(cell) else cell


def are_floats(cells: Sequence[Any]) -> bool:
    """Whether cells are whole numbers that a table took for floats, such as "7.0"; not if there are none."""
    return bool(cells) and all(isinstance(cell, str) and _WHOLE_FLOAT.fullmatch(cell) for cell in cells)


@lru_cache(maxsize=1024)
def snake_case(name: str) -> str:
    """A name in small letters, with underscores between its words: `Answer Start` and `answerStart` are the same."""
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())).lower()


def spelled(names: Iterable[str]) -> dict[str, str]:
    """The names themselves by their usual spelling; of several that come to the same, the exact one, else the first."""
    there = [*names]
    return {snake_case(str(name)): name for name in reversed(there)} | {name: name for name in there}


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, not a number, or an empty cell."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _is_null(value: Any) -> bool:
    """Whether a value is null or not a number; an empty text is something else."""
    return is_nothing(value) and not isinstance(value, str)


def _is_blank_cell(value: Any) -> bool:
    """Whether a cell says nothing, also in words, as "nan"; not for cells that hold a text, which these may be."""
    return is_nothing(value) or (isinstance(value, str) and value.strip() in _NOTHING)
