"""One order for the answers to a question, over all its contexts.

Each context is decoded as an example of its own, into an n-best list (`evaluation.answers`). Here the lists of a
question become one: scores of different contexts can be compared, because they are sums of logits of one model, and the
probability of an answer is the softmax over all entries of all lists. "No answer" is one entry, however many contexts
there are: each of them has to agree, so it scores the least of what it scores in any.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qa_dist.answering.records import Answer
from qa_dist.evaluation.answers import Answers, softmax


class _Entry(NamedTuple):
    """An entry of the list of a question; `context` is -1 for no answer."""

    context: int
    start_char: int
    end_char: int
    score: float
    probability: float


def ranked(
    answers: Answers,
    first: int,
    count: int,
    *,
    top_k: int,
    overlap_threshold: float | None,
    threshold: float,
    temperature: float = 1.0,
) -> list[Answer]:
    """The answers to a question, best first: at least one, at most `top_k`.

    Args:
        answers: Answers to the question in each of its contexts, among others.
        first: Place of the question in its first context.
        count: Number of its contexts; they follow each other.
        top_k: Most answers.
        overlap_threshold: An answer is left out if it shares more than this share of its characters, or of those of a
            better one in the same context, with that one; None: nothing is left out.
        threshold: How much better than the best answer "no answer" must be.
        temperature: What scores are divided by before the softmax over all contexts, as `answers` have it for one.
    """
    if count == 1:
        if top_k == 1:
            # Building lists would take longer than all other decoding.
            entries, chosen = [_entry(answers, first, int(answers.chosen_E[first]))], 0
        else:
            entries = [_entry(answers, first, column) for column in range(int(answers.num_entries_E[first]))]
            chosen = int(answers.chosen_E[first])
        odds = None if answers.null_odds_E is None else float(answers.null_odds_E[first])
    else:
        entries = _of_several(answers, range(first, first + count), temperature)
        chosen, odds = 0, None
        if answers.null_odds_E is not None:
            chosen, odds = _choice(entries, threshold)
    kept: list[_Entry] = []
    for place in (chosen, *(place for place in range(len(entries)) if place != chosen)):
        entry = entries[place]
        if overlap_threshold is None or not any(overlap(entry, better) > overlap_threshold for better in kept):
            kept.append(entry)
        if len(kept) == top_k:
            break
    return [_answer(entry, answers.contexts, first, odds) for entry in kept]


def overlap(one: _Entry, other: _Entry) -> float:
    """Characters that two entries share, as a share of the shorter one; 0 in different contexts, and for no answer."""
    if one.context != other.context:
        return 0.0
    shared = min(one.end_char, other.end_char) - max(one.start_char, other.start_char)
    shortest = min(one.end_char - one.start_char, other.end_char - other.start_char)
    return shared / shortest if shared > 0 else 0.0


def _entry(answers: Answers, example: int, column: int) -> _Entry:
    """An entry of the n-best list of a question about one context."""
    start = int(answers.start_char_EW[example, column])
    return _Entry(
        context=0 if start >= 0 else -1,
        start_char=start,
        end_char=int(answers.end_char_EW[example, column]),
        score=float(answers.score_EW[example, column]),
        probability=float(answers.probability_EW[example, column]),
    )


def _of_several(answers: Answers, examples: range, temperature: float) -> list[_Entry]:
    """The entries of all n-best lists of a question, best first; "no answer" comes once, behind its equals."""
    found: list[tuple[float, int, int, int]] = []
    nulls: list[float] = []
    for context, example in enumerate(examples):
        count = int(answers.num_entries_E[example])
        for start, end, score in zip(
            answers.start_char_EW[example, :count].tolist(),
            answers.end_char_EW[example, :count].tolist(),
            answers.score_EW[example, :count].tolist(),
            strict=True,
        ):
            if start >= 0:
                found.append((score, context, start, end))
            else:
                nulls.append(score)
    # Where "no answer" is no choice, a context has it only for want of any token.
    if nulls and (answers.null_odds_E is not None or not found):
        found.append((min(nulls), -1, -1, -1))
    # Stable: contexts keep their order among equals.
    found.sort(key=lambda entry: -entry[0])
    scores = np.array([[score for score, *_ in found]], np.float32)
    probabilities = softmax(scores, np.array([len(found)]), temperature).tolist()[0]
    return [
        _Entry(context, start, end, score, probability)
        for (score, context, start, end), probability in zip(found, probabilities, strict=True)
    ]


def _choice(entries: Sequence[_Entry], threshold: float) -> tuple[int, float]:
    """Place of the answer among the entries of several contexts, and the odds of no answer, as in decoding."""
    null = next(place for place, entry in enumerate(entries) if entry.context < 0)
    with_text = next((place for place, entry in enumerate(entries) if entry.end_char > entry.start_char), None)
    largest = float(np.finfo(np.float32).max)
    if with_text is None:
        return null, largest
    odds = entries[null].score - entries[with_text].score
    odds = 0.0 if odds != odds else min(max(odds, -largest), largest)
    return (null if odds > threshold else with_text), odds


def _answer(entry: _Entry, contexts: Sequence[str], first: int, odds: float | None) -> Answer:
    is_none = entry.context < 0
    return Answer(
        text="" if is_none else contexts[first + entry.context][entry.start_char : entry.end_char],
        start_char=entry.start_char,
        end_char=entry.end_char,
        score=entry.score,
        probability=entry.probability,
        is_no_answer=is_none,
        no_answer_odds=odds,
        context_index=entry.context,
    )
