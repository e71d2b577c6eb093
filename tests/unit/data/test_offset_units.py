"""Offsets in other units than characters: random records written in each of them read back to the same examples."""

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings

from qa_dist.data.placing import UNITS, at
from tests.unit.data.layout_writers import Rows, lines
from tests.unit.data.test_layouts import drawn_rows, expected, read

COUNTS: dict[str, Callable[[str], int]] = {
    "UTF-8 bytes": lambda before: len(before.encode()),
    "UTF-16 units": lambda before: len(before.encode("utf-16-le")) // 2,
    "CR LF as one character": lambda before: len(before.replace("\r\n", "\n")),
    "line ends as two characters": lambda before: len(before) + before.count("\n"),
    "UTF-8 bytes, with CR LF as one": lambda before: len(before.replace("\r\n", "\n").encode()),
    "UTF-16 units, with CR LF as one": lambda before: len(before.replace("\r\n", "\n").encode("utf-16-le")) // 2,
}
"""What the text before an answer counts in each unit; of several that fit, the first is taken."""


def fits_all(count: Callable[[str], int], rows: Rows) -> bool:
    """Whether every answer of the rows stands at a place whose offset, counted so, is the one that is written."""
    answers = ((row["context"], *pair) for row in rows for pair in zip(*row["answers"].values(), strict=True))
    return all(
        any(count(context[:place]) == start and at(text, place, context) for place in range(len(context)))
        for context, text, start in answers
    )


@pytest.mark.parametrize("unit", UNITS)
@settings(max_examples=25, deadline=None)
@given(rows=drawn_rows(answerable=True))
def test_random_records_in_each_unit_read_back_to_the_same_examples(unit: str, rows: Rows) -> None:
    assert [*COUNTS] == [*UNITS]
    for each in rows:
        each["context"] = each["context"].replace("\n", "\r\n" if "CR LF" in unit else "\n")
        found = {}
        for text in each["answers"]["text"]:
            text = text.replace("\n", "\r\n" if "CR LF" in unit else "\n")
            found[text] = each["context"].index(text)
        each["answers"] = {"text": [*found], "answer_start": [*found.values()]}
    wanted = expected(rows)
    count = COUNTS[unit]
    written = [
        {
            **each,
            "answers": {
                "text": each["answers"]["text"],
                "answer_start": [count(each["context"][:start]) for start in each["answers"]["answer_start"]],
            },
        }
        for each in rows
    ]
    is_other = [each["answers"] for each in written] != [each["answers"] for each in rows]
    # Repeated letters let all answers fit as characters, or as a unit that is tried before this one. The test itself
    # looks for that, as what the reader says might be wrong.
    before = [*COUNTS.values()][: [*COUNTS].index(unit)]
    assume(not is_other or not any(fits_all(each, written) for each in (len, *before)))
    examples, report = read("a.jsonl", lines(written))
    assert [(e.id, e.context, e.question, e.answers) for e in examples] == wanted
    assert report.notes == ((f"offsets count {unit} and were converted",) if is_other else ())
