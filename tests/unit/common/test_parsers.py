"""JSON and YAML without silent losses."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.common.parsers import ParseError, read_json, read_yaml, type_name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[("5", 5), ("-5", -5), ("+7", 7), ("0", 0), ("1.5", 1.5), (".5", 0.5), ("-.inf", -math.inf)],
        # What YAML 1.1 makes something else of.
        *[("no", "no"), ("on", "on"), ("012", "012"), ("1:30", "1:30"), ("1_000", "1_000"), ("0x10", "0x10")],
        *[("2026-01-01", "2026-01-01"), ("2e-5", "2e-5"), ("9" * 5000, "9" * 5000)],
        *[('"5"', "5"), ("'null'", "null"), ("|\n  no\n", "no\n"), ("!!str 5", "5"), ("[a, 1]", ["a", 1])],
    ],
)
def test_words_mean_what_they_look_like(text: str, value: object) -> None:
    found = read_yaml(f"key: {text}")["key"]
    assert (found, type(found)) == (value, type(value))


def test_a_document_may_be_anything_plain() -> None:
    assert read_yaml("# only a comment\n") is None
    assert read_yaml("\ufeffkey: 1") == {"key": 1}
    assert read_yaml("a: [1, {b: c}]\n1: x") == {"a": [1, {"b": "c"}], "1": "x"}


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(value=st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True), values, max_size=4))
def test_what_the_usual_writers_write_reads_back_the_same(value: object) -> None:
    assert read_json(json.dumps(value)) == value
    # Escaped, because PyYAML does not read back the line ends of Unicode that it writes.
    assert read_yaml(yaml.safe_dump(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "one object holds the key 'a' more than once"),
        ('[{"x": {"a": 1, "b": 1, "a": 1, "b": 1, "a": 1}}]', "the keys 'a', 'b' more than once"),
        ('{"a": 1,}', "at line 1, column 9"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "thousands of digits"),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        read_json(text)


def test_a_place_is_told_apart_from_the_reason() -> None:
    with pytest.raises(ParseError) as caught:
        read_json('{"a":\n1,}')
    assert (caught.value.line, caught.value.column) == (2, 3)
    assert "line" not in caught.value.reason


@pytest.mark.parametrize(
    ("value", "name"),
    [({}, "an object"), ([], "a list"), ("", "a string"), (True, "true or false"), (1.5, "a number"), (None, "null")],
)
def test_values_have_names(value: object, name: str) -> None:
    assert type_name(value) == name
