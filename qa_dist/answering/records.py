"""What a reader is asked and what it answers. Neither torch nor numpy is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qa_dist.common.errors import DataError

OVERLAP_THRESHOLD = 0.01
"""Share of a shorter answer's characters that it may have in common with a better one: as Haystack's reader has it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a question, or that there is none.

    Attributes:
        text: the words of the context; "" for no answer.
        start_char: where they start in their context; -1 for no answer.
        end_char: one past their last character; -1 for no answer.
        score: start logit + end logit, less what the length penalty takes off; of no answer the smallest sum of any
            window, as each has to agree.
        probability: softmax of the score among all that were weighed for the question.
        is_no_answer: whether this says that the contexts hold no answer.
        no_answer_odds: score of "no answer" minus that of the best answer with a text; the same for all answers to a
            question, None where "no answer" was not a choice.
        context_index: the context, counted from 0; -1 for no answer.
    """

    text: str
    start_char: int
    end_char: int
    score: float
    probability: float
    is_no_answer: bool
    no_answer_odds: float | None
    context_index: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by their names, in this order, as JSON has them."""
        return {name: getattr(self, name) for name in self.__slots__}


def record_of(answers: Sequence[Answer], *, with_nbest: bool) -> dict[str, Any]:
    """The answers to a question as JSON has them: the fields of the best one, and if asked for all in `nbest`."""
    record = answers[0].as_dict()
    if with_nbest:
        record["nbest"] = [answer.as_dict() for answer in answers]
    return record


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one context or several; `of` makes one of anything that may be one."""

    question: str
    contexts: tuple[str, ...]

    @classmethod
    def of(cls, question: Any, context: Any) -> "Question":
        """The question about a context, or about the contexts in a sequence.

        Raises:
            DataError: One of them is no text, is empty, or cannot be written as UTF-8.
        """
        contexts = (context,) if isinstance(context, str) else context
        if not isinstance(contexts, Sequence) or isinstance(contexts, bytes | bytearray):
            raise DataError(f"the context is {_kind(context)}; give a text, or a list of texts")
        if not contexts:
            raise DataError("there is no context: the list is empty; give at least one text")
        _check("question", question)
        for index, text in enumerate(contexts):
            _check("context" if len(contexts) == 1 else f"context {index}", text)
        return cls(question, tuple(contexts))


class InvalidQuestionError(DataError):
    """A question among several that cannot be answered.

    Attributes:
        index: its place among them, counted from 0.
        problem: what is wrong with it, as a sentence.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"question {index}: {problem}")
        self.index = index
        self.problem = problem


def _check(name: str, text: Any) -> None:
    """Refuse what no tokenizer can read.

    Raises:
        DataError: It is no text, blank, or holds half a character.
    """
    if not isinstance(text, str):
        raise DataError(f"the {name} is {_kind(text)}; give a text")
    if not text.strip():
        raise DataError(f"the {name} is {'empty' if not text else 'nothing but blanks'}; give a text with words in it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the {name} holds half a surrogate pair at character {error.start:,}, which is no text; decode it as UTF-8"
        ) from None


def _kind(value: Any) -> str:
    """A value's type as messages name it."""
    if value is None:
        return "missing"
    if isinstance(value, bytes | bytearray):
        return "bytes, not text"
    if isinstance(value, bool):
        return f"{str(value).lower()}, not text"
    if isinstance(value, int | float):
        return "a number, not text"
    return f"of type {type(value).__name__}, not text"
