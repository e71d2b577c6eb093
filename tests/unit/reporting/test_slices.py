"""Slices by hand: who is in which, in which order, and what is said of small ones."""

import numpy as np
import pytest

from qa_dist.data.records import Answer, Example
from qa_dist.evaluation.normalization import SQUAD, normalization
from qa_dist.evaluation.score_files import References
from qa_dist.reporting.questions import Questions
from qa_dist.reporting.slices import LEAST, labels, question_word, slice_scores, window_labels

CONTEXT = "Ada Kerrow built the old mill in 1911. It burned."


def example(question: str = "?", answer: str | None = None, context: str = CONTEXT, title: str = "") -> Example:
    answers = () if answer is None else (Answer(answer, context.index(answer)),)
    return Example("q", question, context, answers, title)


def questions(*examples: Example, version_2: bool = False) -> Questions:
    named = tuple(
        Example(str(number), each.question, each.context, each.answers, each.title, each.other_texts)
        for number, each in enumerate(examples)
    )
    texts = {each.id: (*(answer.text for answer in each.answers), *each.other_texts) for each in named}
    return Questions.of("here.json", References(texts, version_2), named)


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who built it?", "who"),
        ("In what year did it burn?", "what"),
        ("How many mills were there?", "how many"),
        ("HOW  MUCH did it cost?", "how much"),
        ("How did it burn, and when?", "how"),
        ("Whose mill was it?", "whose"),
        ("Whatever burned?", "other"),
        ("Name the mill.", "other"),
    ],
)
def test_question_words(question: str, word: str) -> None:
    assert question_word(example(question)) == word


def test_labels_of_all_slicings() -> None:
    found = labels(
        questions(
            example("Who built the old mill?", "Ada Kerrow", title="Mills"),
            example("When did Ada build it?", "1911", title="Mills"),
            example("What burned?", "It burned", title="Fires"),
            example("Why?", None),
            version_2=True,
        ),
        SQUAD,
    )
    assert list(found) == [
        *("has_answer", "question_word", "answer_length", "context_length", "answer_position", "overlap", "title")
    ]
    assert found["has_answer"] == [*["has an answer"] * 3, "has no answer"]
    assert found["question_word"] == ["who", "when", "what", "why"]
    assert found["answer_length"] == ["2", "1", "2", None]
    assert found["context_length"] == ["under 500"] * 4
    assert found["answer_position"] == ["first quarter", "third quarter", "last quarter", None]
    # "built old mill": all in the sentence; "did ada build it": one of four; "burned": in the second.
    assert found["overlap"] == ["75 % or more", "25-49 %", "75 % or more", None]
    assert found["title"] == ["Mills", "Mills", "Fires", None]


def test_what_says_nothing_is_left_out() -> None:
    found = labels(questions(example("Wer baute das?", "Ada Kerrow"), example("Wann?", "1911")), SQUAD)
    assert list(found) == ["answer_length", "context_length", "answer_position", "overlap"]


def test_answers_are_as_long_as_the_rules_count() -> None:
    asked = questions(example("?", "九克朗", context="每天九克朗。"))
    assert labels(asked, SQUAD)["answer_length"] == ["1"]
    assert labels(asked, normalization("mlqa:zh"))["answer_length"] == ["3-4"]
    # A reference that is all articles counts as none where others are left, and the shortest counts.
    several = Example(
        "q", "?", CONTEXT, (Answer("the", 17), Answer("the old mill", 17)), other_texts=("the very old mill",)
    )
    assert labels(questions(several), SQUAD)["answer_length"] == ["2"]


def test_windows() -> None:
    assert window_labels(np.array([1, 2, 3, 4, 9], np.int32)) == ["1", "2", "3", "4 or more", "4 or more"]


def test_scores_of_slices() -> None:
    scores = np.array([[1, 1], [0, 0.5], [1, 1], [0, 0], [0, 0.2]])
    found = slice_scores(
        {"title": ["b", "a", "a", "a", None], "windows": ["2", "1", "2", "1", "1"]},
        scores,
        np.array([0, 0, 1, 1, 2]),
        200,
        0,
    )
    assert [(each.by, each.value, each.num_questions, each.num_contexts) for each in found] == [
        ("title", "a", 3, 2),
        ("title", "b", 1, 1),
        ("windows", "1", 3, 3),
        ("windows", "2", 2, 2),
    ]
    assert found[0].exact_match.value == pytest.approx(100 / 3)
    assert found[0].f1.value == pytest.approx(50)
    # Of the contexts with 0 of 1 and 1 of 2 either is drawn twice, or both are.
    assert (found[0].exact_match.low, found[0].exact_match.high) == (0, 50)
    assert (found[1].f1.value, found[1].f1.low, found[1].f1.high) == (100, None, None)
    assert found[1].to_json()["n"] == 1


@pytest.mark.parametrize(
    ("num_questions", "num_contexts", "warning"),
    [
        (LEAST - 1, LEAST - 1, "under 30 questions"),
        (LEAST, LEAST - 1, "under 30 contexts"),
        (LEAST, LEAST, None),
    ],
)
def test_small_slices_say_so(num_questions: int, num_contexts: int, warning: str | None) -> None:
    context_E = np.arange(num_questions) % num_contexts
    (found,) = slice_scores({"title": ["a"] * num_questions}, np.ones((num_questions, 2)), context_E, 100, 0)
    assert found.warning == warning
    assert found.to_json()["warning"] == warning
