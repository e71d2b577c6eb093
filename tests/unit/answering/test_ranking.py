"""Answers over several contexts, beside what is counted by hand from the answers in each of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.answering.reader import Reader
from qa_dist.answering.records import Answer, Question
from tests.tiny import WORDS

QUESTION = "what follows amber ?"


@pytest.fixture(scope="module")
def adapter(trained: Path) -> Path:
    return trained / "adapter"


@pytest.fixture(scope="module")
def readers(adapter: Path) -> dict[bool, Reader]:
    """A reader that may say that there is no answer, and one that may not."""
    return {is_allowed: Reader(adapter, device="cpu", allow_no_answer=is_allowed) for is_allowed in (False, True)}


def passages(seed: int, count: int) -> tuple[str, ...]:
    """Texts of one window and of several."""
    rng = np.random.default_rng(seed)
    return tuple(" ".join(rng.choice(WORDS, size=int(rng.integers(3, 90)))) for _ in range(count))


def pooled(reader: Reader, contexts: tuple[str, ...]) -> list[tuple[float, float, int, int, int]]:
    """Score, probability, context, start and end of every entry of all contexts, best first, with one "no answer"."""
    alone = [Question.of(QUESTION, context) for context in contexts]
    # The windows of the chunk are those of one question about all contexts, and so are its batches and its logits.
    lists = reader.answer_chunk(alone, reader.config.evaluation.n_best_size, overlap_threshold=None)
    spans = [
        (each.score, context, each.start_char, each.end_char)
        for context, answers in enumerate(lists)
        for each in sorted(answers, key=lambda answer: -answer.score)
        if not each.is_no_answer
    ]
    nulls = [
        best.score + answers[0].no_answer_odds
        for answers in lists
        if answers[0].no_answer_odds is not None
        for best in [max((each for each in answers if each.text), key=lambda answer: answer.score)]
    ]
    entries = [*spans, *([(min(nulls), -1, -1, -1)] if nulls else [])]
    entries.sort(key=lambda entry: -entry[0])
    total = sum(math.exp(entry[0]) for entry in entries)
    return [(score, math.exp(score) / total, *rest) for score, *rest in entries]


def row(answer: Answer) -> tuple[int, int, int]:
    return answer.context_index, answer.start_char, answer.end_char


@pytest.mark.parametrize("is_allowed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_contexts_are_ranked_together(readers: dict[bool, Reader], seed: int, is_allowed: bool) -> None:
    reader, contexts = readers[is_allowed], passages(seed, 4)
    expected = pooled(reader, contexts)
    found = reader.answer(QUESTION, contexts, top_k=20, overlap_threshold=None)
    assert isinstance(found, list)
    is_none = found[0].is_no_answer
    best = next(entry for entry in expected if entry[2] >= 0)
    if is_allowed:
        null = next(entry for entry in expected if entry[2] < 0)
        assert found[0].no_answer_odds == pytest.approx(null[0] - best[0], abs=1e-5)
        assert is_none == (null[0] > best[0])
    first = next(entry for entry in expected if (entry[2] < 0) == is_none)
    ordered = [first, *(entry for entry in expected if entry is not first)]
    assert [row(answer) for answer in found] == [entry[2:] for entry in ordered[:20]]
    for answer, (score, probability, context, start, end) in zip(found, ordered, strict=False):
        assert (answer.score, answer.probability) == pytest.approx((score, probability), rel=1e-5)
        assert answer.text == (contexts[context][start:end] if context >= 0 else "")
    assert reader.answer(QUESTION, contexts) == found[0]


def test_probabilities_of_all_candidates_add_up_to_one(adapter: Path) -> None:
    reader = Reader(adapter, device="cpu", n_best_size=1000)
    contexts = ("amber basin cedar", "delta amber")
    found = reader.answer(QUESTION, contexts, top_k=1000, overlap_threshold=None)
    assert isinstance(found, list)
    # All spans of three words and of two.
    assert len(found) == 6 + 3
    assert sum(answer.probability for answer in found) == pytest.approx(1)


@pytest.mark.parametrize("threshold", [-100.0, 100.0])
def test_the_threshold_holds_over_all_contexts(adapter: Path, threshold: float) -> None:
    reader = Reader(adapter, device="cpu", allow_no_answer=True, null_score_diff_threshold=threshold)
    answer = reader.answer(QUESTION, passages(1, 3))
    assert isinstance(answer, Answer)
    assert answer.is_no_answer == (threshold < 0)
    assert (answer.context_index < 0) == answer.is_no_answer


@pytest.mark.parametrize("threshold", [None, 0.0, 0.01, 0.34, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_of_answers_that_overlap_the_best_is_kept(
    readers: dict[bool, Reader], count: int, threshold: float | None
) -> None:
    contexts: Any = passages(2, count)
    everything = readers[False].answer(QUESTION, contexts, top_k=20, overlap_threshold=None)
    found = readers[False].answer(QUESTION, contexts, top_k=20, overlap_threshold=threshold)
    assert isinstance(everything, list)
    expected: list[Answer] = []
    for answer in everything:
        characters = set(range(answer.start_char, answer.end_char))
        shares = [
            len(characters & set(range(better.start_char, better.end_char)))
            / min(len(characters), better.end_char - better.start_char)
            for better in expected
            if better.context_index == answer.context_index
        ]
        if threshold is None or all(share <= threshold for share in shares):
            expected.append(answer)
    # With several contexts there are more candidates behind the first twenty.
    assert isinstance(found, list)
    assert found[: len(expected)] == expected
    assert len(found) == len(expected) or count > 1
    if threshold is not None and threshold < 1:
        assert len(expected) < len(everything)
