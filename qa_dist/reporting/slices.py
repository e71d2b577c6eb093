"""Questions sorted by what may make them easy or hard.

A label names the slice that a question is in; None: it is in none of this slicing. Labels [E] are of E questions.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Float64, Int64
from qa_dist.data.records import Example
from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.scoring import matchable
from qa_dist.reporting.intervals import Groups, Interval, intervals
from qa_dist.reporting.questions import Questions
from qa_dist.reporting.sentences import sentence_around

LEAST = 30
"""Under so many questions or contexts a slice says little: its interval is too narrow."""

Labels = Sequence[str | None]

_WORDS = ("what", "which", "who", "whose", "whom", "when", "where", "why", "how")
_WORD = re.compile(rf"\b(?:how\s+(?:many|much|long|old|far|often)|{'|'.join(_WORDS)})\b", re.IGNORECASE)
OTHER = "other"


def question_word(example: Example) -> str:
    """The first English question word of a question, "how many" and the like being one; "other" without any."""
    match = _WORD.search(example.question)
    return " ".join(match[0].lower().split()) if match else OTHER


def _bin(value: float, starts: Sequence[float], names: Sequence[str]) -> str:
    return names[max(place for place, start in enumerate(starts) if value >= start)]


def _answer_length(example: Example, rules: Normalization) -> str | None:
    texts = [answer.text for answer in example.answers] + [*example.other_texts]
    lengths = [len(rules.units(rules.text(text))) for text in matchable(texts, rules)] if texts else []
    return _bin(min(lengths), (0, 1, 2, 3, 5, 9), ORDERS["answer_length"]) if lengths else None


def _context_length(example: Example) -> str:
    return _bin(len(example.context), (0, 500, 1000, 2000, 4000), ORDERS["context_length"])


def _position(example: Example) -> str | None:
    if not example.answers:
        return None
    share = min(answer.start_char for answer in example.answers) / max(1, len(example.context))
    return _bin(share, (0, 0.25, 0.5, 0.75), ORDERS["answer_position"])


def _overlap(example: Example, rules: Normalization) -> str | None:
    """By the share of the question's units, question words left out, that the sentence of the first reference has."""
    if not example.answers:
        return None
    first = example.answers[0]
    asked = set(rules.units(rules.text(_WORD.sub(" ", example.question))))
    if not asked:
        return None
    sentence = sentence_around(example.context, first.start_char, first.end_char)
    share = len(asked & set(rules.units(rules.text(sentence)))) / len(asked)
    return _bin(share, (0, 0.25, 0.5, 0.75), ORDERS["overlap"])


ORDERS: Mapping[str, tuple[str, ...]] = {
    "has_answer": ("has an answer", "has no answer"),
    "answer_length": ("0", "1", "2", "3-4", "5-8", "9 or more"),
    "context_length": ("under 500", "500-999", "1000-1999", "2000-3999", "4000 or more"),
    "answer_position": ("first quarter", "second quarter", "third quarter", "last quarter"),
    "windows": ("1", "2", "3", "4 or more"),
    "overlap": ("under 25 %", "25-49 %", "50-74 %", "75 % or more"),
}
"""Labels in the order of tables, of slicings that have a fixed one."""

SLICINGS = {
    "has_answer": "whether there is an answer",
    "question_word": "first question word (English)",
    "answer_length": "words of the shortest reference in its normal form",
    "context_length": "characters of the context",
    "answer_position": "where in the context the earliest reference begins",
    "overlap": "share of the question's words in the sentence of the first reference",
    "windows": "windows of the run's tokenizer and lengths",
    "title": "title of the article",
}
"""Every slicing, in the order of tables, and what it goes by."""


def few(num_questions: int, num_contexts: int) -> str | None:
    """What there is too little of for an interval to be trusted; None if there is enough."""
    if num_questions < LEAST:
        return f"under {LEAST} questions"
    return f"under {LEAST} contexts" if num_contexts < LEAST else None


def labels(questions: Questions, rules: Normalization) -> dict[str, Labels]:
    """The slice of each question by slicing, of all but `windows`.

    Those that say nothing are left out: `has_answer` in version 1, `question_word` where no question has an English
    one, `title` without titles.
    """
    examples = questions.examples
    functions: dict[str, Callable[[Example], str | None]] = {
        "question_word": question_word,
        "answer_length": lambda example: _answer_length(example, rules),
        "context_length": _context_length,
        "answer_position": _position,
        "overlap": lambda example: _overlap(example, rules),
        "title": lambda example: example.title or None,
    }
    if questions.references.version_2:
        functions["has_answer"] = lambda example: ORDERS["has_answer"][example.is_unanswerable]
    found: dict[str, Labels] = {name: [function(each) for each in examples] for name, function in functions.items()}
    if set(found["question_word"]) == {OTHER}:
        del found["question_word"]
    return {name: found[name] for name in SLICINGS if name in found and any(found[name])}


def window_labels(windows_E: npt.NDArray[np.integer[Any]]) -> Labels:
    """The slice of each question by its number of windows."""
    return [_bin(count, (1, 2, 3, 4), ORDERS["windows"]) for count in windows_E.tolist()]


@dataclass(frozen=True, slots=True)
class Slice:
    """The scores of a system on a part of the questions.

    Attributes:
        by: the slicing, a key of `SLICINGS`.
        value: the label.
        num_questions: how many questions are in it.
        num_contexts: how many contexts they are about.
        exact_match: in percent, over contexts.
        f1: likewise.
    """

    by: str
    value: str
    num_questions: int
    num_contexts: int
    exact_match: Interval
    f1: Interval

    @property
    def warning(self) -> str | None:
        """Why its interval is not to be trusted; None if there is no such reason."""
        return few(self.num_questions, self.num_contexts)

    def to_json(self) -> dict[str, Any]:
        """The slice as plain JSON types."""
        return {
            **{"by": self.by, "value": self.value, "n": self.num_questions, "num_contexts": self.num_contexts},
            **{"exact_match": asdict(self.exact_match), "f1": asdict(self.f1), "warning": self.warning},
        }


def slice_scores(
    found: Mapping[str, Labels], scores_EK: Float64, context_E: Int64, num_resamples: int, seed: int
) -> list[Slice]:
    """The scores of every slice; EM and F1 from 0 to 1 are the columns of float64 [E, 2]."""
    slices = []
    for by, values in found.items():
        rows: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            if value is not None:
                rows.setdefault(value, []).append(row)
        for value in _ordered(by, rows):
            members = np.array(rows[value])
            groups = Groups.of(scores_EK[members], context_E[members])
            exact_match, f1 = intervals(groups, num_resamples, seed)
            slices.append(Slice(by, value, len(members), len(groups.sizes_G), exact_match, f1))
    return slices


def _ordered(by: str, rows: Mapping[str, Sequence[int]]) -> Iterable[str]:
    if by in ORDERS:
        return (value for value in ORDERS[by] if value in rows)
    # Of equal size in the order of the file.
    return sorted(rows, key=lambda value: -len(rows[value]))
