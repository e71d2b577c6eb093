"""What Python and numpy print for objects is read, and nothing in it is executed."""

import ast
import builtins
import io
import itertools
import json
import re
import tokenize
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.data import literals
from qa_dist.data.literals import read_literal

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=values)
def test_what_python_prints_is_read_back(value: Any) -> None:
    assert read_literal(repr(value)) == value == ast.literal_eval(repr(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "{'text': array(['a b'], dtype=object), 'answer_start': array([70])}",
            {"text": ["a b"], "answer_start": [70]},
        ),
        ("{'text': array([], dtype=object), 'answer_start': array([], dtype=int64)}", {"text": [], "answer_start": []}),
        ("array([70., 80.])", [70.0, 80.0]),
        ("array(['a', 'b'], dtype='<U1')", ["a", "b"]),
        ("np.array([np.int64(70), np.float64(1.5)])", [70, 1.5]),
        ("[np.str_('a'), None, nan, True]", ["a", None, None, True]),
        ("array([{'text': 'a', 'answer_start': -1}], dtype=object)", [{"text": "a", "answer_start": -1}]),
        # As numpy prints without commas: two texts are two texts, and not one.
        ("['a' 'b']", ["a", "b"]),
        ("['a'\n 'b']", ["a", "b"]),
        ("[70 80]", [70, 80]),
        ("('a', 'b')", ["a", "b"]),
        ("[\"it's\", '\"']", ["it's", '"']),
    ],
)
def test_what_numpy_prints_is_read(text: str, value: Any) -> None:
    assert read_literal(text) == value


REFUSED = {
    "it is no Python literal": (
        *("", "1 +", "[1", "a := 1", "import os", "x = 1", "\0", "[1\0]"),
        *("[" * 50_000, "-" * 50_000 + "1", "9" * 5000),
    ),
    "it is nested too deeply": ("[" * 21 + "]" * 21, "{'a': " * 21 + "1" + "}" * 21),
    "it is longer than 100,000 characters": ("'" + "a" * 100_001 + "'", "(" * 100_001),
    "a key is no text, or there twice": ("{'a': 1, 'a': 2}", "{1: 2}", "{None: 2}", "{**{}}"),
    "Name is no literal": ("a", "[inf]", "[1, os]"),
    "Attribute is no literal": ("a.b", "np.pi"),
    "Starred is no literal": ("[*'ab']",),
    "JoinedStr is no literal": ("f'{1}'",),
    "Constant is no literal": ("b'x'", "1j", "...", "array(['a', ..., 'b'])"),
    "Set is no literal": ("{1, 2}",),
    "BinOp is no literal": ("2 ** 9 ** 9", "'a' * 10 ** 9", "1 + 2j"),
    "UnaryOp is no literal": ("-'a'", "-True", "-[1]", "not 1", "~1"),
    "IfExp is no literal": ("1 if 1 else 2",),
    "Subscript is no literal": ("[1][0]",),
    "ListComp is no literal": ("[x for x in 'ab']",),
    "Lambda is no literal": ("[lambda: 1]",),
    "Call is no literal": (
        *("open('x')", "array(open('x'))", "array([1], copy=True)", "array()", "os.array([1])", "np.linalg.array([1])"),
        *("__import__('os').system('x')", "np.load('x')", "np.int64(3, 4)", "np.int64(3, dtype=int)", "(lambda: 1)()"),
    ),
}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(text, sentence) for sentence, texts in REFUSED.items() for text in texts],
    ids=lambda value: value[:36],
)
def test_everything_else_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_literal(text)


def _bracketed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A text, or some of them with commas between them or without, in brackets of each kind."""
    one = st.builds(str.format, st.sampled_from(["-{}", "({},)", "{{'k': {}}}", "array({}, dtype=object)"]), inner)
    joined = st.builds(str.join, st.sampled_from([", ", " ", "\n "]), st.lists(inner, max_size=3))
    return one | st.builds(str.format, st.sampled_from(["[{}]", "({})", "{{{}}}", "array([{}])"]), joined)


atoms = ["0", "1.5", "'a'", '"b"', "None", "True", "nan", "...", "b'x'", "1j", "np.int64(7)"]
texts = st.text(st.sampled_from("[]{}()'\",:.0a -*\\\n"), max_size=30)
likely_texts = st.recursive(st.sampled_from(atoms), _bracketed, max_leaves=6)


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(inner) for key, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _evaluated(text: str) -> Any:
    """What Python itself makes of a text; ... where it makes nothing of it, or one text of two."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ...
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
    kinds = [kind for kind in kinds if kind != tokenize.NL]
    return ... if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds) else value


@given(text=texts | likely_texts)
def test_any_text_is_a_value_as_json_has_it_or_refused(text: str) -> None:
    try:
        value = read_literal(text)
    except ValueError:
        return
    # Compared as they are printed: 0, 0.0 and False are equal.
    assert repr(json.loads(json.dumps(value))) == repr(value)
    expected = _evaluated(text)
    if expected is not ...:
        assert repr(value) == repr(_with_lists(expected))


def test_the_reader_cannot_execute() -> None:
    """All that it calls, and all of Python's own that it could hand to others to call, is known to execute nothing."""
    nodes = list(ast.walk(ast.parse(Path(literals.__file__).read_text(encoding="utf-8"))))
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    names = {node.id for node in nodes if isinstance(node, ast.Name) and hasattr(builtins, node.id)}
    imported = {ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}
    assert "ast.parse" in called, "which makes a tree and no program"
    harmless = {"all", "dict", "isinstance", "len", "map", "set", "type", "zip", "ValueError"}
    assert called <= {
        *harmless,
        *("_called", "_value", "_with_commas", "text.strip", "words.append", "' '.join"),
        *("ast.parse", "io.StringIO", "itertools.pairwise", "tokenize.generate_tokens"),
        *("warnings.catch_warnings", "warnings.simplefilter"),
    }
    types = {"bool", "float", "int", "list", "str"}
    assert names <= {*harmless, *types, "MemoryError", "RecursionError", "SyntaxError"}
    assert imported <= {
        *("import ast", "import io", "import itertools", "import tokenize", "import warnings"),
        "from typing import Any",
    }
