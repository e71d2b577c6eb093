"""What Python and numpy print for objects is read, and nothing in it is executed."""

import ast
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


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "a",
            "1 +",
            "[1",
            "{'a': 1, 'a': 2}",
            "{1: 2}",
            "{**{}}",
            "[*'ab']",
            "f'{1}'",
            "b'x'",
            "1j",
            "...",
            "{1, 2}",
        ),
        *("open('x')", "array(open('x'))", "array([1], copy=True)", "array()", "os.array([1])", "np.linalg.array([1])"),
        *(
            "__import__('os').system('x')",
            "np.load('x')",
            "np.int64(3, 4)",
            "(lambda: 1)()",
            "[x for x in 'ab']",
            "a.b",
        ),
        *("2 ** 9 ** 9", "'a' * 10 ** 9", "-'a'", "not 1", "1 if 1 else 2", "[1][0]", "array(['a', ..., 'b'])"),
        *("[" * 21 + "]" * 21, "[" * 50_000, "-" * 50_000 + "1", "9" * 5000, "'" + "a" * 100_001 + "'", "\0", "[1\0]"),
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\bis\b|cannot"):
        read_literal(text)


@given(text=st.text(st.sampled_from("[]{}()'\",:.0a -*\\\n"), max_size=30))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    try:
        read_literal(text)
    except ValueError:
        return


def test_the_reader_cannot_execute() -> None:
    source = Path(literals.__file__).read_text(encoding="utf-8")
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    called = {node.id for node in calls if isinstance(node, ast.Name)}
    assert "_value" in called
    assert not called & {"eval", "exec", "compile", "getattr", "__import__", "globals", "vars"}
