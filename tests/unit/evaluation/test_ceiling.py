"""The best scores that any model could reach: against every span tried, one after the other."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from qa_dist.evaluation import ceiling as module
from qa_dist.evaluation.ceiling import REASONS, Budget, Question, Window, best_scores, reason_of
from qa_dist.evaluation.normalization import NORMALIZATIONS, SQUAD
from qa_dist.evaluation.scoring import score_v1, score_v2
from tests.unit.evaluation.oracles import skip_without_package_of


def window(*tokens: tuple[int, int]) -> Window:
    offsets = np.array(tokens, np.int32).reshape(-1, 2)
    return Window(offsets[:, 0], offsets[:, 1])


def every_answer(question: Question) -> set[str]:
    """The text of each span that may be answered."""
    texts = {
        question.context[start : ends[last]]
        for starts, ends in question.windows
        for first, start in enumerate(starts)
        for last in range(first, min(len(ends), first + question.max_answer_length))
    }
    return texts | ({""} if question.version_2 or not any(len(each.starts) for each in question.windows) else set())


def tried_one_by_one(question: Question) -> tuple[float, float]:
    """The best scores, as the scorer gives them for one question with each of its answers."""
    texts = [text for text, _ in question.references]
    found = []
    for answer in every_answer(question):
        if question.version_2:
            scores = score_v2({"q": texts}, {"q": answer}, rules=question.rules)
            found.append((scores["exact"], scores["f1"]))
        else:
            scores = score_v1({"q": texts}, {"q": answer}, rules=question.rules)
            found.append((scores["exact_match"], scores["f1"]))
    return max(exact for exact, _ in found), max(f1 for _, f1 in found)


PIECES = [
    *("mill", "mills", "the", "a", "Ada", "x", "of", "1871", "–", "-", ",", ".", "(", ")", " ", " ", " ", "  ", "\n"),
    *("九", "克", "朗，", "。", "서", "울", "은", "《", "ال", "كتاب", "der", "la", "Σ", "ΑΣ", '"', "it's", "U.S."),
]


def random_tokens(draw: random.Random, context: str) -> list[tuple[int, int]]:
    """Tokens as tokenizers make them: several words in one, blanks in front or left out, pieces of one character."""
    tokens, start = [], 0
    while start < len(context):
        end = min(len(context), start + draw.choice([1, 1, 2, 2, 3, 5]))
        kind = draw.random()
        if kind < 0.05:
            tokens.append((start, start))
        if kind < 0.1:
            tokens.append((start, end))
        if kind < 0.9 and not (context[start:end].isspace() and kind < 0.7):
            tokens.append((start, end))
        start = end
    return tokens


def random_question(draw: random.Random, name: str, *, version_2: bool) -> Question:
    context = draw.choice(["", " "]).join(draw.choices(PIECES, k=draw.randint(1, 14)))
    tokens = random_tokens(draw, context)
    size = draw.randint(1, 12)
    windows = [window(*tokens[start : start + size]) for start in range(0, max(1, len(tokens)), max(1, size - 2))]
    references = []
    for _ in range(draw.randint(0 if version_2 else 1, 3)):
        start = draw.randint(0, len(context) - 1)
        text = context[start : start + draw.choice([1, 3, 5, 8, 12, 16])]
        references.append((text, draw.choice([start, -1])) if draw.random() < 0.8 else (draw.choice(PIECES), -1))
    return Question(context, references, windows, NORMALIZATIONS[name], draw.choice([1, 2, 3, 30]), version_2)


@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_the_best_of_the_search_is_the_best_of_all_spans(name: str, version_2: bool) -> None:
    skip_without_package_of(name)
    draw = random.Random(f"{name} {version_2}")
    num_partial = 0
    for _ in range(80):
        question = random_question(draw, name, version_2=version_2)
        exact, f1 = best_scores(question)
        assert (100.0 * exact, 100.0 * f1) == tried_one_by_one(question), question
        num_partial += 0 < f1 < 1
    assert num_partial > 3


def test_a_search_that_ends_early_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SPANS", 1)
    draw = random.Random(5)
    num_higher = 0
    for _ in range(150):
        question = random_question(draw, "squad", version_2=False)
        found, wanted = best_scores(question), tried_one_by_one(question)
        assert 100.0 * found[0] >= wanted[0], question
        assert 100.0 * found[1] >= wanted[1], question
        num_higher += 100.0 * found[1] > wanted[1]
    assert num_higher > 2


def test_what_a_budget_leaves_unsearched_has_a_bound_of_one() -> None:
    draw = random.Random(11)
    questions = [random_question(draw, "squad", version_2=False) for _ in range(60)]
    exact = [best_scores(question) for question in questions]
    budget = Budget(100)
    bounded = [best_scores(question, budget) for question in questions]
    first = next(place for place in range(60) if bounded[place] != exact[place])
    assert 5 < first < 50
    assert bounded[:first] == exact[:first]
    # Those that need no search are exact all the same.
    assert {bounded[place] for place in range(first, 60) if bounded[place] != exact[place]} == {(1.0, 1.0)}
    assert sum(one != other for one, other in zip(bounded, exact, strict=True)) <= budget.num_unsearched < 60 - first


def test_a_word_that_comes_again_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    counts = module._Search._counts
    monkeypatch.setattr(
        module._Search, "_counts", lambda self, text, is_whole: counted.append(text) or counts(self, text, is_whole)
    )
    context = " ".join(["mill", "river", "flood"] * 100)
    windows = [words(context), words(context)]
    assert best_scores(Question(context, [("mill pond", -1)], windows, SQUAD, 30, False))[1] == pytest.approx(2 / 3)
    assert sorted(counted) == ["flood", "mill", "river"]


def test_most_spans_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(7)
    context = " ".join(draw.choice(["mill", "river", "of", "the", "flood", f"w{place}"]) for place in range(400))
    answer = f"{context.split(' ')[200][1:]} and so on"
    tried = []
    score = module.score_answer
    monkeypatch.setattr(module, "score_answer", lambda *given: tried.append(given[1]) or score(*given))
    question = Question(context, [(answer, -1), ("the old mill river", -1)], [words(context)], SQUAD, 30, False)
    exact, f1 = best_scores(question)
    assert (exact, f1) == (0, pytest.approx(2 * 2 / (2 + 3)))
    assert 0 < len(tried) < 200
    assert len(every_answer(question)) > 10_000


def words(context: str) -> Window:
    """A token for each word between blanks."""
    starts = [place for place, c in enumerate(context) if c != " " and (not place or context[place - 1] == " ")]
    return window(*((start, start + len(context[start:].split(" ")[0])) for start in starts))


CONTEXT = "It closed in 1911 after the great flood of that year."


def asked(
    answer: str, *, longest: int = 30, windows: Sequence[Window] | None = None, version_2: bool = False
) -> Question:
    references = [(answer, CONTEXT.find(answer))]
    return Question(CONTEXT, references, windows or [words(CONTEXT)], SQUAD, longest, version_2)


def test_known_ceilings_and_their_reasons() -> None:
    reached = asked("the great flood")
    assert best_scores(reached) == (1, 1)
    inside = asked("191")
    assert (best_scores(inside), reason_of(inside)) == ((0, 0), "off_token_boundaries")
    mark = asked("that year")
    assert best_scores(mark) == (1, 1), "the full stop in the token is no part of the normal form"
    long = asked("1911 after the great flood", longest=3)
    # after the great; great flood of: two of four words, in two or three
    assert best_scores(long) == (0, pytest.approx(2 * 2 / (2 + 4)))
    assert reason_of(long) == "too_long"
    tokens = words(CONTEXT)
    halves = [Window(tokens.starts[:5], tokens.ends[:5]), Window(tokens.starts[4:], tokens.ends[4:])]
    split = asked("1911 after the great flood", windows=halves)
    assert best_scores(split) == (0, pytest.approx(2 * 3 / (3 + 4)))
    assert reason_of(split) == "in_no_window"
    absent = asked("a mill")
    assert (best_scores(absent), reason_of(absent)) == ((0, 0), "not_in_context")
    assert set(REASONS) == {"off_token_boundaries", "too_long", "in_no_window", "not_in_context"}


def test_of_several_references_the_nearest_counts() -> None:
    references = [("a mill", -1), ("191", CONTEXT.find("191")), ("1911 after the great", CONTEXT.find("1911"))]
    question = Question(CONTEXT, references, [words(CONTEXT)], SQUAD, 2, False)
    assert reason_of(question) == "too_long"
    assert best_scores(question) == (0, pytest.approx(2 * 2 / (2 + 3)))


def test_without_tokens_and_without_answers_the_null_answer_is_left() -> None:
    nothing = [window()]
    assert best_scores(asked("1911", windows=nothing)) == (0, 0)
    unanswerable = Question(CONTEXT, [], [words(CONTEXT)], SQUAD, 30, True)
    assert best_scores(unanswerable) == (1, 1)
