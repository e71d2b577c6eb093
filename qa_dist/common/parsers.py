"""JSON and YAML, read without silent losses.

Of two equal keys the usual parsers keep the last without a word; YAML 1.1 reads `no` as false, 012 as ten and 1:30 as
ninety; aliases can make a few lines of YAML larger than any memory. Here each of these is plain text or an error.

The standard library is enough for JSON, so that scoring starts at once.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE | re.ASCII)
_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,18})", re.ASCII)
_PLAIN = {"": None, "~": None, "null": None, "true": True, "false": False}


class ParseError(ValueError):
    """Text that cannot be taken as it is, such as "Expecting value at line 1, column 5".

    Attributes:
        reason: what is wrong, a clause without the place.
        line: where, counted from 1; None if the reason says it, or nobody knows.
        column: likewise.
    """

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        self.reason, self.line, self.column = reason, line, column
        super().__init__(reason if line is None else f"{reason} at line {line}, column {column}")


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ParseError: It is not JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ParseError(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error
    except ParseError:
        raise
    except ValueError as error:
        # The one other thing that the module refuses.
        raise ParseError("it holds a number of thousands of digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ParseError(f"one object holds {_repeated(key for key, _ in pairs)} more than once")
    return value


def _repeated(keys: Iterable[str]) -> str:
    """The first few keys that occur twice."""
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for key in keys:
        if key in seen:
            twice[key] = None
        seen.add(key)
    listed = ", ".join(repr(key) for key in list(twice)[:3]) + (", ..." if len(twice) > 3 else "")
    return f"the key{'s' if len(twice) > 1 else ''} {listed}"


def read_yaml(text: str) -> Any:
    """The value of a YAML document: mappings with text keys, lists, texts, numbers, true, false, and None.

    Of unquoted words only `true`, `false`, `null` and plain decimal numbers have a type. All else is text, and whoever
    knows what it should be can read it: `no`, 012, 1:30, 2e-5, dates.

    Raises:
        ParseError: It is not YAML, has a key twice, or uses tags or aliases.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _value(node, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (None, None)
        reason = str(error.problem or error.context)
        if reason.startswith("but "):
            reason = f"{error.context}, {reason}"
        raise ParseError(reason, *place) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ParseError(reason.replace('in "<unicode string>", position', "at place")) from error
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error


def _value(node: Any, seen: set[int]) -> Any:
    """The value of a node; `seen` holds the identities of those visited, because an alias is the node it stands for."""
    line = node.start_mark.line + 1
    if id(node) in seen:
        raise ParseError(f"the alias of what stands at line {line} is not allowed; write the value out")
    seen.add(id(node))
    kind = node.tag.removeprefix(_TAG)
    if kind == "map" and isinstance(node.value, list):
        pairs = [(_key(key), value) for key, value in node.value]
        mapping = {key: _value(value, seen) for key, value in pairs}
        if len(mapping) != len(pairs):
            raise ParseError(f"{_repeated(key for key, _ in pairs)} is there more than once; keep one")
        return mapping
    if kind == "seq" and isinstance(node.value, list):
        return [_value(item, seen) for item in node.value]
    if isinstance(node.value, str):
        if kind == "str":
            return node.value
        if kind in ("null", "bool", "int", "float", "timestamp", "merge", "value"):
            return _scalar(node.value)
    raise ParseError(f"the tag {node.tag.replace(_TAG, '!!')} at line {line} is not allowed; write the plain value")


def _key(node: Any) -> str:
    if isinstance(node.value, str):
        return node.value
    raise ParseError(f"the key at line {node.start_mark.line + 1} is not text")


def _scalar(text: str) -> Any:
    """What an unquoted word means."""
    if text.lower() in _PLAIN:
        return _PLAIN[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    # Digits alone that are no integer above begin with a zero, or are more than any option takes.
    if _NUMBER.fullmatch(text) and not re.fullmatch(r"[-+]?(0\d.*|\d+)", text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def type_name(value: Any) -> str:
    """What a JSON value is, in words for messages."""
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
