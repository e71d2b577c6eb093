"""Where answers are found, and what offsets may count."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.data.placing import UNITS, Span, at, find_unit, is_apart, occurrences, place

HARBOUR = "The Mayoress opened the mill in June. Her party danced until dawn."


@pytest.mark.parametrize(
    ("text", "start", "context", "found"),
    [
        ("the mill", 20, HARBOUR, (20, 28)),
        # Not at its offset, but once elsewhere; wherever the offset points.
        *[("the mill", start, HARBOUR, (20, 28)) for start in (None, -1, -50, 0, 19, 60, 66, 5000, 10**30)],
        # At its offset it counts whatever is around it: annotators mark parts of words.
        ("May", 4, HARBOUR, (4, 7)),
        # Elsewhere it does not count inside a word.
        *[("May", start, HARBOUR, None) for start in (None, -1, 5, 29)],
        ("art", 0, HARBOUR, None),
        ("19", None, "Built in 1911.", None),
        ("70", None, "It is 70km away", None),
        ("km", None, "It is 70 km-posts away", (9, 11)),
        ("5", 0, "It weighs 1.5 tons", None),
        ("1", 0, "It weighs 1,000 tons", None),
        ("000", None, "It weighs 1,000 tons", None),
        ("1.5", None, "It weighs 1.5 tons", (10, 13)),
        ("5", None, "It weighs 5. 1,2 or 3", (10, 11)),
        ("Ada", None, "This is Ada's mill", (8, 11)),
        # Of several places, the one that is near when the next is far.
        ("mill", 6, f"A mill {'x' * 30} a mill", (2, 6)),
        ("lake", 0, "Mora lies on a lake. The lake is deep.", None),
        ("lake", None, "Mora lies on a lake. The lake is deep.", None),
        ("lake", 21, f"Mora lies on a lake. {'y' * 40} The lake is deep.", (15, 19)),
        # Equally near on both sides.
        ("mill", 10, "the mill or mill road", None),
    ],
)
def test_where_an_answer_stands(text: str, start: int | None, context: str, found: tuple[int, int] | None) -> None:
    assert place(text, start, context) == found


@pytest.mark.parametrize(
    ("text", "context", "found"),
    [
        ("九克朗", "费用是每天九克朗。", True),  # Chinese
        ("東京", "私は東京へ行く", True),  # Japanese
        ("メリカ", "アメリカ", True),
        ("กรุงเทพ", "ฉันอยู่กรุงเทพมหานคร", True),  # Thai
        ("ກ", "ຂກຂ", True),  # Lao
        ("1911", "于1911年建成", True),
        ("11", "于1911年建成", False),
        ("iPhone", "新iPhone手机", True),
        ("서울", "나는 서울은 좋다", True),  # Korean: particles follow without a blank
        ("울은", "나는 서울은 좋다", False),
        ("Straße", "Hauptstraßen und Straßenbahn", False),
        ("мир", "мирный человек", False),  # Cyrillic
        ("الرصيف", "عند الرصيفين", False),  # Arabic
        ("cafe", "the cafe\u0301 opened", False),  # the accent belongs to the letter
        ("ก", "กินข้าว", False),  # and so does a Thai vowel sign
        ("नम", "नमस्ते", False),  # Devanagari
    ],
)
def test_an_occurrence_between_letters_or_digits_does_not_count_where_words_are_written_apart(
    text: str, context: str, found: bool
) -> None:
    assert bool(occurrences(text, context)) == found


@pytest.mark.parametrize("blank", ["\u00a0", "  ", "\r\n", "\t", "\u3000", "\u202f", "\u200b ", " \u00a0"])
def test_white_space_is_compared_loosely(blank: str) -> None:
    context = f"Boats moor at the{blank}north{blank}quay. The fee is nine crowns."
    start, end = context.index("the"), context.index("quay") + 4
    assert at("the north quay", start, context) == (start, end)
    assert place("the north quay", start - 1, context) == (start, end)
    assert place("the north quay", -1, context) == (start, end)
    assert place(" the north quay ", start, context) == (start, end)
    assert place(f"the{blank}north quay", None, "Boats moor at the north quay.") == (14, 28)
    assert place("thenorth quay", None, context) is None


@given(text=st.text(st.sampled_from("ab é1中 "), min_size=1, max_size=4), context=st.text(st.sampled_from("ab é1中 ")))
def test_every_place_is_one_by_brute_force(text: str, context: str) -> None:
    found = {tuple(span) for span in occurrences(text, context)}
    exact = {
        (start, start + len(text))
        for start in range(len(context))
        if context[start : start + len(text)] == text and is_apart(context, Span(start, start + len(text)))
    }
    assert exact <= found
    for start, end in found:
        assert context[start:end].split() == text.split() or context[start:end] == text


CONTEXT = "Café Ö 🦉:\r\nnine crowns.\r\nWarden: Åda 🦉 Kerrow\nthe end"


def offsets(unit: str, text: str) -> int:
    """Where the text begins in CONTEXT, counted in this unit."""
    return length(unit, CONTEXT[: CONTEXT.index(text)])


def length(unit: str, before: str) -> int:
    """The offset of what stands behind this text, counted in this unit: the oracle of the conversions."""
    return {
        "UTF-8 bytes": len(before.encode()),
        "UTF-16 units": len(before.encode("utf-16-le")) // 2,
        "CR LF as one character": len(before.replace("\r\n", "\n")),
        "line ends as two characters": len(before) + before.count("\n"),
        "UTF-8 bytes, with CR LF as one": len(before.replace("\r\n", "\n").encode()),
        "UTF-16 units, with CR LF as one": len(before.replace("\r\n", "\n").encode("utf-16-le")) // 2,
    }[unit]


TEXTS = ("Café", "nine crowns", "Åda", "Kerrow", "end")


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_found_and_converted(unit: str) -> None:
    answers = [(text, offsets(unit, text), CONTEXT) for text in TEXTS]
    assert find_unit(answers) == unit
    for text, start, context in answers:
        assert UNITS[unit](start, context) == CONTEXT.index(text)


def test_a_file_whose_offsets_do_not_all_fit_is_not_converted() -> None:
    answers: list[Any] = [(text, offsets("UTF-8 bytes", text), CONTEXT) for text in TEXTS]
    assert find_unit([*answers, ("Kerrow", 3, CONTEXT)]) is None
    # What stands nowhere says nothing of units, for or against.
    assert find_unit([*answers, ("a mill", 3, CONTEXT)]) == "UTF-8 bytes"
    assert find_unit([("a mill", 3, CONTEXT), ("Café", 0, CONTEXT)]) is None
    assert find_unit((text, CONTEXT.index(text), CONTEXT) for text in TEXTS) is None
    assert find_unit([]) is None


@pytest.mark.parametrize("unit", UNITS)
@given(context=st.text(st.sampled_from("aé中🦉\r\n "), max_size=20))
def test_any_offset_is_converted_or_refused(unit: str, context: str) -> None:
    # Where CR LF is one character, no position is inside one.
    inside = {match.start() + 1 for match in re.finditer("\r\n", context)} if "as one" in unit else set()
    positions = [place for place in range(len(context) + 1) if place not in inside]
    by_offset = {length(unit, context[:place]): place for place in positions}
    assert len(by_offset) == len(positions)
    for start in range(max(by_offset) + 5):
        assert UNITS[unit](start, context) == by_offset.get(start), start
