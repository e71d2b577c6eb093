"""The ceiling: the best scores that any model could reach on the examples of a store.

A model answers with a span of tokens. Where a tokenizer puts an answer and its neighbours into one token, where an
answer is longer than `--max_answer_length`, or where no window holds all of it, the right text cannot be given at all.
The ceiling of a question is the best exact match and the best F1 over all spans that may be answered: those of any of
its windows, of at most so many tokens, and, where questions may have no answer, none.

Most questions have a reference that is a span, which `_is_reachable` finds at once. For the others `_Search` looks at
spans, those with the highest bound first. Shapes: C context tokens of a window, S spans of a window.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Int64
from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.scoring import Gold, f1_of_no_answers, matchable, no_f1, score_answer
from qa_dist.features.store import FeatureStore
from qa_dist.features.table import FeatureMap

Offsets = npt.NDArray[np.int32]

REASONS = {
    "off_token_boundaries": "do not begin and end with tokens",
    "too_long": "are longer than --max_answer_length",
    "in_no_window": "are in no window as a whole",
    "not_in_context": "are not in the context",
}
"""Why no reference of a question can be answered, by the name that files have for it. Of several references the one
that comes nearest counts: a window holds it, or its ends are ends of tokens, or it is in the context."""

MAX_SPANS = 20_000
"""Spans of a question that are tried before the bound on the others is taken for its ceiling. Only long answers of
common words need so many."""

MAX_TOKENS = 20_000_000
"""Context tokens of all questions that are searched, about a minute of one core, before a bound of 1 is taken for the
others. Only thousands of answers that no model can give, in contexts of thousands of words, need so many."""

_BLANK = re.compile(r"\s")
_PLAIN = re.compile(r"[\w!-/:-@\[-`{-~]*")


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best scores that any model could reach.

    Attributes:
        exact_match: in percent.
        f1: in percent.
        num_examples: questions with known references; the others are left out.
        out_of_reach: how many of them cannot be answered exactly, by reason; reasons that do not occur are left out.
        num_unsearched: how many of them count as answered exactly because looking would have taken too long.
    """

    exact_match: float
    f1: float
    num_examples: int
    out_of_reach: dict[str, int]
    num_unsearched: int = 0


class Window(NamedTuple):
    """The context part of a feature: the first character of each token, and one past the last, int32 [C] each."""

    starts: Offsets
    ends: Offsets


def ceiling(store: FeatureStore, rules: Normalization, *, max_answer_length: int, version_2: bool) -> Ceiling | None:
    """The ceiling of the examples of a store; None if it has none with known references.

    It is exact, but for questions of which more than `MAX_SPANS` spans would have to be tried, and those that are left
    when `MAX_TOKENS` tokens were searched: there it is a bound.

    Args:
        store: The examples and their features.
        rules: What counts as the same answer.
        max_answer_length: Tokens of the longest answer.
        version_2: Whether the null answer is a choice, and scores are those of SQuAD v2.0.
    """
    budget = Budget()
    found = summed(reaches(store, rules, max_answer_length=max_answer_length, version_2=version_2, budget=budget))
    return None if found is None else dataclasses.replace(found, num_unsearched=budget.num_unsearched)


class Reach(NamedTuple):
    """What the scores of one question can reach.

    Attributes:
        example_index: its place in the store.
        exact_match: the best one, 0 or 1.
        f1: the best one, from 0 to 1.
        reason: why it cannot be answered exactly, a key of `REASONS`; None if it can.
    """

    example_index: int
    exact_match: float
    f1: float
    reason: str | None


class Budget:
    """What may be searched of many questions.

    Attributes:
        num_left: context tokens that may still be searched; the last search may take more.
        num_unsearched: questions that there was nothing left for.
    """

    def __init__(self, num_tokens: int | None = None) -> None:
        """Allow for so many context tokens; None: `MAX_TOKENS`."""
        self.num_left = MAX_TOKENS if num_tokens is None else num_tokens
        self.num_unsearched = 0

    def try_spend(self, question: "Question") -> bool:
        """Take a question's tokens off what is left; False, and one more unsearched question, if nothing is."""
        if self.num_left <= 0:
            self.num_unsearched += 1
            return False
        self.num_left -= sum(len(window.starts) for window in question.windows)
        return True


def reaches(
    store: FeatureStore,
    rules: Normalization,
    *,
    max_answer_length: int,
    version_2: bool,
    budget: Budget | None = None,
) -> Iterator[Reach]:
    """What every question of a store with known references can reach, in order.

    The arguments are as of `ceiling`; `budget` is for the searches, None: they may take as long as they need.
    """
    windows = _windows_by_example(store.feature_map(), store.num_examples)
    for index, context in enumerate(store.contexts):
        if (references := store.references(index)) is not None:
            question = Question(context, references, windows[index], rules, max_answer_length, version_2)
            yield reach_of(question, index, budget)


def reach_of(question: "Question", example_index: int, budget: Budget | None = None) -> Reach:
    """What one question can reach; 1 where it would have to be searched and the budget does not allow it."""
    exact, f1 = best_scores(question, budget)
    return Reach(example_index, exact, f1, reason_of(question) if exact < 1 else None)


def summed(reaches: Iterable[Reach]) -> Ceiling | None:
    """The ceiling of some questions; None of none."""
    exact_total = f1_total = 0.0
    num_examples = 0
    reasons: Counter[str] = Counter()
    for reach in reaches:
        exact_total += reach.exact_match
        f1_total += reach.f1
        num_examples += 1
        if reach.reason is not None:
            reasons[reach.reason] += 1
    if not num_examples:
        return None
    counts = {name: reasons[name] for name in REASONS if reasons[name]}
    return Ceiling(100.0 * exact_total / num_examples, 100.0 * f1_total / num_examples, num_examples, counts)


@dataclass(frozen=True, slots=True)
class Question:
    """What decides a question's ceiling.

    Attributes:
        context: the text that answers are parts of.
        references: text and first character of each reference; -1 where it has no place. None: unanswerable.
        windows: its windows.
        rules: what counts as the same answer.
        max_answer_length: tokens of the longest answer.
        version_2: whether the null answer is a choice.
    """

    context: str
    references: Sequence[tuple[str, int]]
    windows: Sequence[Window]
    rules: Normalization
    max_answer_length: int
    version_2: bool

    def golds(self) -> list[Gold]:
        """The references that answers are compared with."""
        texts = list(dict.fromkeys(text for text, _ in self.references))
        return [Gold(text, self.rules) for text in (matchable(texts, self.rules) if self.version_2 else texts)]

    def score(self, golds: Sequence[Gold], text: str) -> tuple[float, float]:
        """Exact match and F1 of an answer, from 0 to 1."""
        return score_answer(golds, text, self.rules, f1_of_no_answers if self.version_2 else no_f1)

    def places(self) -> Iterator[tuple[int, int]]:
        """First character, and one past the last, of each reference that has a place."""
        for text, start in self.references:
            if start >= 0:
                yield start, start + len(text)


def best_scores(question: Question, budget: Budget | None = None) -> tuple[float, float]:
    """The best exact match and the best F1 of a question, from 0 to 1 and each by itself, over all its answers.

    Both are 1, which is a bound, where the question would have to be searched and the budget does not allow it.
    """
    golds = question.golds()
    has_tokens = any(len(window.starts) for window in question.windows)
    best = (0.0, 0.0)
    # Without a token to answer with, the answer is none in every mode.
    if question.version_2 or not has_tokens:
        best = question.score(golds, "")
    for start, end in question.places():
        if best == (1, 1):
            break
        if any(_is_reachable(window, start, end, question.max_answer_length) for window in question.windows):
            best = _better(best, question.score(golds, question.context[start:end]))
    if best == (1, 1) or not has_tokens:
        return best
    return _Search(question, golds).best(best) if budget is None or budget.try_spend(question) else (1.0, 1.0)


def reason_of(question: Question) -> str:
    """Why no reference of a question can be answered exactly, a key of `REASONS`."""
    found = "not_in_context"
    for start, end in question.places():
        if any(_is_reachable(window, start, end, None) for window in question.windows):
            return "too_long"
        starts = any(_first_token(window, start) is not None for window in question.windows)
        ends = any(_last_token(window, end) is not None for window in question.windows)
        if starts and ends:
            found = "in_no_window"
        elif found == "not_in_context":
            found = "off_token_boundaries"
    return found


def _windows_by_example(features: FeatureMap, num_examples: int) -> list[list[Window]]:
    windows: list[list[Window]] = [[] for _ in range(num_examples)]
    bounds = features.first_offset_N1.tolist()
    for example, (first, end) in zip(features.example_index_N.tolist(), itertools.pairwise(bounds), strict=True):
        offsets = features.context_offsets_T2[first:end]
        windows[example].append(Window(offsets[:, 0], offsets[:, 1]))
    return windows


def _better(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return max(one[0], other[0]), max(one[1], other[1])


def _first_token(window: Window, start: int) -> int | None:
    """The last token that begins with a character: before it there may be others, which have no characters."""
    place = int(np.searchsorted(window.starts, start, side="right")) - 1
    return place if place >= 0 and window.starts[place] == start else None


def _last_token(window: Window, end: int) -> int | None:
    """The first token that ends before a character."""
    place = int(np.searchsorted(window.ends, end))
    return place if place < len(window.ends) and window.ends[place] == end else None


def _is_reachable(window: Window, start: int, end: int, longest: int | None) -> bool:
    """Whether tokens of a window begin and end with these characters, at most `longest` of them; None: any number."""
    first, last = _first_token(window, start), _last_token(window, end)
    return first is not None and last is not None and first <= last and (longest is None or last - first < longest)


class _Search:
    """The best scores over all spans of a question, without looking at most of them.

    With the reference "the Eiffel Tower" and the text "They built, of iron, the tower of Eiffel.", only the blocks
    "tower" and "Eiffel." have the characters of a unit: a span that begins or ends elsewhere loses nothing by being cut
    to one that begins and ends in these. So three spans are looked at in the place of 36.

    Units of answers (words, say) do not reach over the places that `Normalization.cuts` describes. A *block* is what
    lies between two such places that no token crosses: the units of a span are those of its parts in each block, one
    after the other. A block that has not all characters of any unit of a reference, nor its parts, gives no unit that
    counts. If the first block of a span is such a block, the span without it has as many units in common and no more
    in all, so its F1 is as high; and if the span matches exactly, that block gives no unit, and the rest matches too.
    Likewise at the end. So only spans matter whose first and last block have the characters of some unit.

    The bound on the F1 of a span is that of m units in common and n in all: m counts those units of its blocks that
    some reference has too, n all of them, and both are at most or at least what they are in a first or last block of
    which only a part is in the span. Spans are tried in the order of this bound, until it is no better than what was
    found.
    """

    def __init__(self, question: Question, golds: Sequence[Gold]) -> None:
        self._question = question
        self._golds = golds
        self._wanted = {unit for gold in golds for unit in gold.units}
        self._letters = [_letters(unit) for unit in self._wanted]
        # With nothing to find, or with blanks at an end, what gives no units matters too: all blocks are looked at.
        self._is_odd = any(not gold.units or gold.text != gold.text.strip() for gold in golds)
        self._cuts = re.compile(f"[{question.rules.cuts}]")
        # Windows overlap, and words come again: long contexts have many times more blocks than different ones.
        self._known_blocks: dict[tuple[str, bool], tuple[int, int, int, int]] = {}

    def best(self, best: tuple[float, float]) -> tuple[float, float]:
        """Exact match and F1, each the higher of `best` and of what any span has."""
        starts, ends, bounds = self._spans()
        if not len(starts):
            return best
        order = np.argsort(-bounds, kind="stable")
        tried: set[tuple[int, int]] = set()
        for start, end, bound in zip(starts[order].tolist(), ends[order].tolist(), bounds[order].tolist(), strict=True):
            # What matches exactly has a bound of 1, or nothing to find.
            can_match = best[0] < 1 and (bound >= 1 or self._is_odd)
            if bound <= best[1] and not can_match:
                break
            if (start, end) in tried:
                continue
            if len(tried) >= MAX_SPANS:
                return 1.0 if can_match else best[0], max(best[1], bound)
            tried.add((start, end))
            best = _better(best, self._question.score(self._golds, self._question.context[start:end]))
            if best == (1, 1):
                break
        return best

    def _spans(self) -> tuple[Int64, Int64, npt.NDArray[np.float64]]:
        """First character, one past the last, and bound of F1, of the spans that matter in any window."""
        context = self._question.context
        num_blanks_before = _num_before(_BLANK, context)
        is_cut_by_blanks = self._cuts.pattern == f"[{_BLANK.pattern}]"
        num_cuts_before = num_blanks_before if is_cut_by_blanks else _num_before(self._cuts, context)
        num_letters_before = np.arange(len(context) + 1) - num_blanks_before
        parts = [
            self._spans_of(window, num_cuts_before, num_letters_before)
            for window in self._question.windows
            if len(window.starts)
        ]
        starts, ends, bounds = (np.concatenate(column) for column in zip(*parts, strict=True))
        return starts, ends, bounds

    def _spans_of(
        self, window: Window, num_cuts_before: Int64, num_letters_before: Int64
    ) -> tuple[Int64, Int64, npt.NDArray[np.float64]]:
        starts, ends = window.starts.astype(np.int64), np.maximum.accumulate(window.ends.astype(np.int64))
        # Between a token and the next: the characters beside that place, and blanks. Other characters that no token
        # has, such as accents that BERT drops, are in the answer all the same: they belong to the block.
        left, right = np.maximum(ends[:-1] - 1, 0), np.minimum(starts[1:] + 1, len(num_cuts_before) - 1)
        has_cut = num_cuts_before[right] > num_cuts_before[np.minimum(left, right)]
        is_apart = (ends[:-1] <= starts[1:]) & (num_letters_before[starts[1:]] <= num_letters_before[ends[:-1]])
        begins_block = np.concatenate([[True], has_cut & is_apart])
        block_C = np.cumsum(begins_block) - 1
        first_C = np.flatnonzero(begins_block)
        last_C = np.append(first_C[1:], len(starts)) - 1
        context, known = self._question.context, self._known_blocks
        places = zip(starts[first_C].tolist(), ends[last_C].tolist(), (first_C == last_C).tolist(), strict=True)
        texts = [(context[start:end], is_whole) for start, end, is_whole in places]
        blocks = _Blocks.of([known.get(block) or self._block(*block) for block in texts])
        matters_C = (blocks.most_shared > 0)[block_C]
        first = np.flatnonzero(matters_C)
        last = first[:, None] + np.arange(min(self._question.max_answer_length, len(starts)))
        is_span = (last < len(starts)) & matters_C[np.minimum(last, len(starts) - 1)]
        first_S, last_S = np.broadcast_to(first[:, None], last.shape)[is_span], last[is_span]
        shared_S, total_S = blocks.between(block_C[first_S], block_C[last_S])
        bound_S = np.zeros(len(first_S))
        for size in {len(gold.units) for gold in self._golds if gold.units}:
            common_S = np.minimum(shared_S, size)
            precision_S, recall_S = common_S / np.maximum(np.maximum(total_S, common_S), 1), common_S / size
            # The terms of `scoring`, in its order, so that a bound that is reached is the score to the last digit.
            bound_S = np.maximum(bound_S, (2 * precision_S * recall_S) / np.maximum(precision_S + recall_S, 1e-300))
        return starts[first_S], window.ends[last_S].astype(np.int64), bound_S

    def _block(self, text: str, is_whole: bool) -> tuple[int, int, int, int]:
        """A row of `_Blocks`, kept for when the block comes again; one of one token `is_whole` wherever it occurs."""
        self._known_blocks[text, is_whole] = row = self._counts(text, is_whole)
        return row

    def _counts(self, text: str, is_whole: bool) -> tuple[int, int, int, int]:
        units = self._question.rules.units(self._question.rules.text(text))
        shared, total = sum(unit in self._wanted for unit in units), len(units)
        if is_whole:
            return shared, total, max(shared, int(self._is_odd)), total
        return shared, total, max(shared, self._most_shared(text)), 0

    def _most_shared(self, text: str) -> int:
        """How many units that some reference has too a part of a block may have, at most."""
        letters = _letters(text) | _letters(text.lower())
        if not self._is_odd and not any(wanted <= letters for wanted in self._letters):
            return 0
        # Words between blanks: one, but where an article stands between marks that stay, or in the middle of a word.
        if self._question.rules.cuts == r"\s" and _PLAIN.fullmatch(text) and "ال" not in text:
            return 1
        return max(1, len("".join(text.split())))


class _Blocks(NamedTuple):
    """Counts of units of the blocks of a window, int64 [number of blocks] each.

    Attributes:
        shared: units that some reference has too.
        total: all units.
        most_shared: units that some reference has too, in any part of the block at most; 0: it does not matter.
        least_total: all units, in any part of the block at least.
    """

    shared: Int64
    total: Int64
    most_shared: Int64
    least_total: Int64

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int]]) -> "_Blocks":
        """The blocks with these counts."""
        return cls(*np.fromiter(itertools.chain.from_iterable(rows), np.int64, 4 * len(rows)).reshape(-1, 4).T)

    def between(self, first_S: Int64, last_S: Int64) -> tuple[Int64, Int64]:
        """Most shared units, and fewest of all, of spans from some part of a block to some part of another."""
        counts = []
        for within, at_end in ((self.shared, self.most_shared), (self.total, self.least_total)):
            before = np.concatenate([[0], np.cumsum(within)])
            inside_S = np.maximum(before[last_S] - before[np.minimum(first_S + 1, last_S)], 0)
            counts.append(at_end[first_S] + np.where(last_S > first_S, at_end[last_S] + inside_S, 0))
        return counts[0], counts[1]


def _num_before(pattern: re.Pattern[str], text: str) -> Int64:
    """How many characters that match a pattern are before each place in a text, int64 [its length + 1]."""
    is_match = np.zeros(len(text), np.int64)
    is_match[[match.start() for match in pattern.finditer(text)]] = 1
    return np.concatenate([[0], np.cumsum(is_match)])


def _letters(text: str) -> set[str]:
    """The characters of a text, without quotation marks, which nltk writes in another way, and with one small sigma."""
    return set(text.replace("\N{GREEK SMALL LETTER FINAL SIGMA}", "\N{GREEK SMALL LETTER SIGMA}")) - set("`'\"")
