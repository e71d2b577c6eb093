"""Python literals and numpy's `array(...)` in cells of text, as pandas writes them into CSV; nothing is executed.

`pandas.DataFrame.to_csv` writes a cell that holds an object with `str`: `{'text': array(['a'], dtype=object)}`. Such
text is parsed into a syntax tree, and the tree is read here node by node: literals, `array` of a list, and numpy's
scalars. Everything else, and whatever is long or deep, is refused.
"""

import ast
import io
import itertools
import tokenize
import warnings
from typing import Any

_LONGEST = 100_000
_DEEPEST = 20
_NUM_ARGUMENTS = 1
_ARRAYS = ("array", "asarray")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "longlong")
_SCALARS = (*_INTEGERS, "float16", "float32", "float64", "str_", "bool_")
_NAMES = {"nan": None, "NaN": None, "null": None, "true": True, "false": False}
_VALUES = (str, int, float, bool, type(None))


def read_literal(text: str) -> Any:
    """The value of a Python literal: lists, tuples (as lists), dictionaries, texts, numbers, True, False, None, nan.

    `array([...], dtype=...)` is its list, `np.int64(3)` its number. A list that numpy wrote without commas, as
    `['a' 'b']`, has as many members as it shows.

    Raises:
        ValueError: It is none, or longer than 100,000 characters, or nested deeper than 20 times.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST:,} characters")
    try:
        with warnings.catch_warnings():
            # A backslash before a letter is a warning to somebody who writes a program.
            warnings.simplefilter("ignore")
            tree = ast.parse(_with_commas(text), mode="eval")
            return _value(tree.body)
    except (SyntaxError, tokenize.TokenError, MemoryError, RecursionError) as error:
        raise ValueError("it is no Python literal") from error


def _with_commas(text: str) -> str:
    """The text in one line, with a comma between two texts or numbers that stand side by side."""
    depth = 0
    words: list[str] = []
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    kept = [token for token in tokens if token.type not in skipped]
    for before, token in itertools.pairwise([None, *kept]):
        if token is None:
            continue
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        is_value = token.type in (tokenize.STRING, tokenize.NUMBER)
        if before is not None and is_value and before.type in (tokenize.STRING, tokenize.NUMBER):
            words.append(",")
        words.append(token.string)
    return " ".join(words)


def _value(node: ast.expr) -> Any:
    """The value of a node.

    Raises:
        ValueError: It is no literal.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, _VALUES):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key is not None else ... for key in node.keys]
        if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise ValueError("a key is no text, or there twice")
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.Call) and len(node.args) == _NUM_ARGUMENTS:
        name = _called(node.func)
        if name in _ARRAYS and all(keyword.arg == "dtype" for keyword in node.keywords):
            value = _value(node.args[0])
            return value if isinstance(value, list) else [value]
        if name in _SCALARS and not node.keywords:
            return _value(node.args[0])
    raise ValueError(f"{type(node).__name__} is no literal")


def _called(function: ast.expr) -> str:
    """The name of what is called, without `np.` or `numpy.` before it."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.attr if function.value.id in ("np", "numpy") else ""
    return function.id if isinstance(function, ast.Name) else ""
