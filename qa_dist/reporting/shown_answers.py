"""Questions that are looked at one by one: those answered worst, and some by chance, with marks in their contexts.

Shapes: E questions, R runs.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qa_dist.common.arrays import Float64
from qa_dist.data.records import Example
from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.scoring import question_scores
from qa_dist.reporting.mistakes import Place, mistake, places_of
from qa_dist.reporting.questions import Questions
from qa_dist.reporting.systems import Candidates, System

AROUND = 240
"""Characters of the context before and behind what is marked."""

_LONGEST = 600
"""Characters of a place beyond which its middle is left out."""

_MAX_CHARACTERS = 500
"""Of a question or an answer."""


class Piece(NamedTuple):
    """A stretch of a context: whether a reference covers it, and whether the answer of a run does.

    A piece without text stands for what is left out.
    """

    text: str
    is_reference: bool = False
    is_answer: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run answered.

    Attributes:
        run: the number of the run.
        text: the answer, perhaps shortened; empty: none.
        exact_match: 0 or 1.
        f1: from 0 to 1.
        confidence: the probability that nbest.json gives it, from 0 to 1; None where it says nothing.
        kind: what kind of mistake it is, a key of `mistakes.KINDS`; None: right.
    """

    run: int
    text: str
    exact_match: float
    f1: float
    confidence: float | None
    kind: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A question with what was answered.

    Attributes:
        id: of the question.
        question: its text, perhaps shortened.
        title: of the article; empty without one.
        references: the texts of the reference answers, each once; empty: there is no answer.
        pieces: the context around what is marked.
        answers: of every run, [R].
    """

    id: str
    question: str
    title: str
    references: tuple[str, ...]
    pieces: tuple[Piece, ...]
    answers: tuple[Answer, ...]


def shown_answers(
    systems: Mapping[int, System],
    questions: Questions,
    rules: Normalization,
    *,
    num_worst: int = 50,
    num_random: int = 20,
    seed: int = 0,
) -> tuple[list[Shown], list[Shown]]:
    """The questions that were answered worst, and as many by chance.

    Worst is what has the lowest F1, the mean over the runs, and of equal ones what the runs were surest of. What
    matches exactly in every run is left out. Those by chance are drawn from all, in the order of the data.

    Args:
        systems: the predictions by the number of their run; each answers every question.
        questions: the questions.
        rules: what counts as the same.
        num_worst: how many, at most.
        num_random: how many, at most.
        seed: of the draw.
    """
    scores = _Scores.of(systems, questions, rules)
    order = np.lexsort((np.arange(len(questions)), -scores.sure_E, scores.f1_RE.mean(axis=0)))
    worst = [row for row in order.tolist() if not scores.exact_RE[:, row].all()][:num_worst]
    random = np.random.default_rng(seed)
    drawn = random.choice(len(questions), size=min(num_random, len(questions)), replace=False)

    def shown(rows: Sequence[int]) -> list[Shown]:
        return [_shown(row, systems, questions, rules, scores) for row in rows]

    return shown(worst), shown(sorted(drawn.tolist()))


class _Scores(NamedTuple):
    """What is known of every answer.

    Attributes:
        exact_RE: float64, 0 or 1.
        f1_RE: float64, from 0 to 1.
        sure_E: float64, the mean confidence of the runs; what is not known counts as 0.
        candidates: the n-best lists by the number of the run.
    """

    exact_RE: Float64
    f1_RE: Float64
    sure_E: Float64
    candidates: Mapping[int, Candidates]

    @classmethod
    def of(cls, systems: Mapping[int, System], questions: Questions, rules: Normalization) -> "_Scores":
        references = questions.references
        found = [
            question_scores(references.answers, system.texts, version_2=references.version_2, rules=rules)
            for system in systems.values()
        ]
        exact_RE, f1_RE = (
            np.array([[scores[column][key] for key in references.answers] for scores in found], np.float64)
            for column in (0, 1)
        )
        candidates = {run: system.candidates() for run, system in systems.items()}
        sure_RE = [
            [_confidence(system.texts[key], candidates[run], key) or 0.0 for key in references.answers]
            for run, system in systems.items()
        ]
        return cls(exact_RE, f1_RE, np.mean(sure_RE, axis=0), candidates)


def _shown(
    row: int, systems: Mapping[int, System], questions: Questions, rules: Normalization, scores: _Scores
) -> Shown:
    """One question of the data, with its answers."""
    example = questions.examples[row]
    answers: list[Answer] = []
    answer_places: list[Place] = []
    for at, (run, system) in enumerate(systems.items()):
        text, candidates = system.texts[example.id], scores.candidates[run]
        noted = _noted(text, candidates, example.id)
        exact, f1 = float(scores.exact_RE[at, row]), float(scores.f1_RE[at, row])
        kind = mistake(example, text, bool(exact), rules, noted)
        confidence = _confidence(text, candidates, example.id)
        answers.append(Answer(run, shortened(text), exact, f1, confidence, kind))
        answer_places += _nearest(places_of(example.context, text, noted), example)
    references = sorted({(answer.start_char, answer.end_char) for answer in example.answers})
    texts = dict.fromkeys(shortened(text) for text in questions.references.answers[example.id])
    pieces = tuple(marked(example.context, references, answer_places))
    return Shown(example.id, shortened(example.question), example.title or "", tuple(texts), pieces, tuple(answers))


def shortened(text: str) -> str:
    """The text, or its beginning and dots."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}\u2026"


def _confidence(text: str, candidates: Candidates, key: str) -> float | None:
    """The probability of an answer, if its n-best list has one."""
    for entry in candidates.get(key, ()):
        if entry["text"] == text:
            value = entry.get("probability")
            return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None
    return None


def _noted(text: str, candidates: Candidates, key: str) -> list[Place]:
    """Where the run found the answer; of several entries with its text the best was chosen."""
    return [
        (entry["start_char"], entry["end_char"])
        for entry in candidates.get(key, ())
        if text and entry["text"] == text and entry["start_char"] >= 0
    ][:1]


def _nearest(places: Sequence[Place], example: Example) -> list[Place]:
    """Of the places of an answer, the one that is nearest to a reference; none of none."""
    starts = [answer.start_char for answer in example.answers] or [0]
    return [min(places, key=lambda place: min(abs(place[0] - start) for start in starts))] if places else []


def marked(
    context: str, references: Sequence[Place], answers: Sequence[Place], around: int = AROUND
) -> Iterator[Piece]:
    """A context in pieces: what is marked, and the characters around it; without a mark its beginning.

    What the pieces cover is in order and without overlap, and begins and ends between words where there are any.
    """
    spans = [*references, *answers]
    windows: list[list[int]] = []
    for start, end in sorted(_windows(context, spans, around)):
        if windows and start <= windows[-1][1]:
            windows[-1][1] = max(end, windows[-1][1])
        else:
            windows.append([start, end])
    for start, end in windows:
        if start > 0:
            yield Piece("")
        edges = {start, end, *(edge for span in spans for edge in span if start < edge < end)}
        cuts = sorted(edges)
        for begin, until in itertools.pairwise(cuts):
            is_in = [[place[0] <= begin and until <= place[1] for place in group] for group in (references, answers)]
            yield Piece(context[begin:until], *map(any, is_in))
    if windows and windows[-1][1] < len(context):
        yield Piece("")


def _windows(context: str, spans: Sequence[Place], around: int) -> Iterator[Place]:
    """What is shown of a context, as stretches that may overlap."""
    if not spans:
        yield 0, _word_end(context, 2 * around)
    for start, end in spans:
        if end - start <= _LONGEST:
            yield _word_start(context, start - around), _word_end(context, end + around)
        else:
            yield _word_start(context, start - around), _word_end(context, start + around)
            yield _word_start(context, end - around), _word_end(context, end + around)


def _word_start(context: str, place: int) -> int:
    """The place, or that behind the next white space, if it is near."""
    if place <= 0:
        return 0
    found = re.compile(r"\s+").search(context, place - 1, place + 30)
    return found.end() if found else place


def _word_end(context: str, place: int) -> int:
    """The place, or the last white space before it, if it is near."""
    if place >= len(context):
        return len(context)
    tail = context[place - 30 : place + 1]
    blanks = [at for at, character in enumerate(tail) if character.isspace()]
    return place - 30 + blanks[-1] if blanks else place
