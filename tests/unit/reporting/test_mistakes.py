"""Every answer is right or of one kind, whatever the texts; and the kinds are what docs/analysis.md says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.data.records import Answer, Example
from qa_dist.evaluation.normalization import NORMALIZATIONS, SQUAD
from qa_dist.evaluation.scoring import question_scores
from qa_dist.reporting.mistakes import KINDS, mistake
from qa_dist.reporting.sentences import sentence_around, sentence_starts

CONTEXT = "Ada Kerrow built the mill in 1911. The old mill burned in 1911, said Mr. Hale. Nobody rebuilt it."
YEAR = CONTEXT.index("1911")


def asked(*answers: tuple[str, int], others: tuple[str, ...] = (), context: str = CONTEXT) -> Example:
    return Example("q", "?", context, tuple(Answer(*answer) for answer in answers), other_texts=others)


def kind_of(example: Example, text: str | None, *noted: tuple[int, int]) -> str | None:
    texts = [*(answer.text for answer in example.answers), *example.other_texts]
    predictions = {} if text is None else {"q": text}
    exact, _ = question_scores({"q": texts}, predictions, version_2=True, allow_missing=True)
    return mistake(example, text, bool(exact.get("q")), SQUAD, noted)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1911", None),
        ("the 1911", None),
        ("in 1911", "too_long"),
        ("mill in 1911. The", "too_long"),
        ("19", "too_short"),
        ("911. The", "shifted"),
        ("Ada Kerrow", "wrong_words"),
        ("Nobody", "wrong_sentence"),
        ("mill", "wrong_words"),
        ("old mill", "wrong_sentence"),
        ("1912", "place_unknown"),
        ("", "unanswered"),
        ("the", "unanswered"),
        (None, "no_prediction"),
    ],
)
def test_kinds(text: str | None, kind: str | None) -> None:
    assert kind_of(asked(("1911", YEAR)), text) == kind


def test_questions_without_an_answer() -> None:
    assert kind_of(asked(), "") is None
    assert kind_of(asked(), "the") is None
    assert kind_of(asked(), "1911") == "answered_unanswerable"
    assert kind_of(asked(), "of another text") == "answered_unanswerable"


def test_the_place_that_a_run_noted_decides() -> None:
    second = CONTEXT.index("1911", YEAR + 1)
    example = asked(("1911", YEAR))
    assert kind_of(example, "1911", (YEAR, YEAR + 4)) is None
    assert kind_of(example, "1911", (second, second + 4)) == "right_text_elsewhere"
    assert kind_of(example, "mill", (CONTEXT.index("old mill") + 4, CONTEXT.index("old mill") + 8)) == "wrong_sentence"
    # A place that does not have the text is of another context.
    assert kind_of(example, "1911", (0, 4)) is None
    # The only place of a text is its place.
    assert kind_of(asked(("1911", second)), "in 1911", (YEAR - 3, YEAR + 4)) == "wrong_sentence"
    assert kind_of(asked(("mill", CONTEXT.index("mill"))), "the mill") is None
    assert kind_of(asked(("mill", CONTEXT.index("mill"))), "The mill") is None


def test_references_without_a_place() -> None:
    assert kind_of(asked(others=("1912",)), "1911") == "place_unknown"
    assert kind_of(asked(("1911", YEAR), others=("Kerrow",)), "Kerrow") is None
    assert kind_of(asked(("1911", YEAR), others=("Hale",)), "Ada") == "wrong_words"


def test_of_several_references_the_one_shared_most_with_decides() -> None:
    example = asked(("Kerrow", 4), ("Ada Kerrow built", 0))
    assert kind_of(example, "Ada Kerrow") == "too_short"
    assert kind_of(asked(("Kerrow", 4), ("built the mill in 1911", 11)), "Kerrow built") == "too_long"


TEXTS = st.lists(st.sampled_from(["a", "the", "Mr.", "x", "X.", "y!", " ", "  ", ",", "z", "。"]), max_size=9).map(
    "".join
)


@given(context=TEXTS, references=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=3), data=st.data())
def test_every_answer_is_right_or_of_exactly_one_kind(
    context: str, references: list[tuple[int, int]], data: st.DataObject
) -> None:
    rules = NORMALIZATIONS[data.draw(st.sampled_from(["squad", "none", "korquad"]))]
    placed = [(context[start : start + size], start) for start, size in references]
    example = asked(*(answer for answer in placed if answer[0].strip()), context=context)
    start, size = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 6))
    text = data.draw(st.one_of(st.none(), TEXTS, st.just(context[start : start + size])))
    noted = data.draw(st.lists(st.just((start, start + size)), max_size=1))
    predictions = {} if text is None else {"q": text}
    exact, f1 = question_scores(
        {"q": [answer.text for answer in example.answers]}, predictions, version_2=True, allow_missing=True, rules=rules
    )
    kind = mistake(example, text, bool(exact.get("q")), rules, noted)
    assert kind is None or kind in KINDS
    if not exact.get("q"):
        assert kind is not None
    elif kind is not None:
        assert kind == "right_text_elsewhere"
    # What each kind says, by looking at the texts alone.
    if kind in ("too_short", "too_long", "shifted", "wrong_words", "wrong_sentence"):
        assert text
        assert text in context
        assert not example.is_unanswerable
    if kind == "too_short":
        assert any(text in answer.text for answer in example.answers)
    if kind == "too_long":
        assert any(answer.text in str(text) for answer in example.answers)
    if kind == "wrong_sentence":
        assert not any(text in sentence_around(context, each.start_char, each.end_char) for each in example.answers)
        assert len(sentence_starts(context)) > 1
    if kind in ("unanswered", "answered_unanswerable", "no_prediction"):
        assert f1.get("q", 0) == 0
    assert (kind == "answered_unanswerable") <= example.is_unanswerable
    assert (kind == "unanswered") <= (not example.is_unanswerable)


# ----------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", [""]),
        ("One.", ["One."]),
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ('He said "no." Then he left.', ['He said "no." ', "Then he left."]),
        ("It cost 3.5 million, i.e. little. It sank.", ["It cost 3.5 million, i.e. little. ", "It sank."]),
        ("J. R. Hale met Dr. Kerrow. They left.", ["J. R. Hale met Dr. Kerrow. ", "They left."]),
        ("A title\n\nA sentence. 2 more.", ["A title\n\n", "A sentence. ", "2 more."]),
        ("他来了。她走了！真的？", ["他来了。", "她走了！", "真的？"]),
        ("  Blanks first. End.  ", ["  Blanks first. ", "End.  "]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    starts = sentence_starts(text)
    assert [text[start:end] for start, end in zip(starts, (*starts[1:], None), strict=True)] == sentences


def test_the_sentences_around_an_answer() -> None:
    assert sentence_around("One. Two. Three.", 5, 8) == "Two. "
    assert sentence_around("One. Two. Three.", 0, 7) == "One. Two. "
    assert sentence_around("One. Two. Three.", 10, 16) == "Three."
