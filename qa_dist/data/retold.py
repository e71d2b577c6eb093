"""Questions in the words of another text: a sentence elsewhere says the same of an answer.

A question whose words are those around its answer can be found by its spelling. One that is made of a sentence in
another text, which has the same answer and some of the words around it, must be understood (Fabbri et al. 2020,
"Template-Based Question Generation from Retrieved Sentences for Improved Unsupervised Question Answering").
"""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qa_dist.data.cloze import (
    COMMON,
    FEWEST_WORDS,
    SHARES,
    WORD,
    Gap,
    as_question,
    gaps,
    question_words,
)
from qa_dist.data.records import Answer, Example

_LEAST_SHARED = 10.0
"""What the words that a question shares with the sentence of its answer weigh at least, in nats: two or three names."""

_MOST_SHARED = 0.8
"""Share of a sentence's words that the answer's own sentence may have too; above it they are copies of each other."""

_RARE = 4.0
"""A single word is an answer only if it weighs as much: if one text in 55 has it, or fewer."""

_SENTENCES = 3
_DRAWS = 3
"""The other sentences that are tried for an answer, those that share most, and the questions drawn of each."""

_MOST_OTHERS = 100
"""Other places of an answer that are compared with one of its places; what is in more of them is drawn."""


class _Retold(NamedTuple):
    """A question, and what the words that it shares with the sentence of its answer weigh."""

    shared: float
    gap: Gap
    words: Sequence[str]


def retold_examples(titles: Mapping[str, str], per_context: int, *, seed: int) -> list[Example]:
    """Questions about texts, each of the words of another text with the same title.

    The question of an answer is the one that shares most with the sentence of the answer, weighed by how rare a word is
    (the logarithm of how many texts there are for each that has it); no other sentence of the text shares as much.

    Args:
        titles: The title of each text, by the text.
        per_context: How many questions are made of each; where fewer answers are found elsewhere, fewer.
        seed: What they are drawn with.

    Returns:
        Examples named retold-0, retold-1 and so on, in the order of the texts, each with one answer.
    """
    index = _Index(titles)
    found: list[Example] = []
    for text, (context, title) in enumerate(titles.items()):
        numbers = random.Random(f"{seed} {context}")
        for each in itertools.islice(_by_share(_best(index, text, numbers), numbers), per_context):
            answer = Answer(context[each.gap.start_char : each.gap.end_char], each.gap.start_char)
            found.append(Example(f"retold-{len(found)}", as_question(each.words), context, (answer,), title))
    return found


class _Index:
    """The gaps of all texts, and where else their answers are."""

    def __init__(self, titles: Mapping[str, str]) -> None:
        self.texts = list(titles)
        self._titles = list(titles.values())
        self._num_texts_with: Counter[str] = Counter()
        for text in self.texts:
            self._num_texts_with.update({word.lower() for word in WORD.findall(text)})
        self._sentences: dict[tuple[int, tuple[int, int]], frozenset[str]] = {}
        self.gaps = [[gap for gap in gaps(text) if self._is_telling(text, gap)] for text in self.texts]
        self._places: dict[tuple[str, str], list[tuple[int, Gap]]] = defaultdict(list)
        for text, each in enumerate(self.gaps):
            for gap in each:
                self._places[self._titles[text], self.answer(text, gap)].append((text, gap))

    def _is_telling(self, text: str, gap: Gap) -> bool:
        words = WORD.findall(text[gap.start_char : gap.end_char])
        return len(words) > 1 or self.weight(words) >= _RARE

    def answer(self, text: int, gap: Gap) -> str:
        return self.texts[text][gap.start_char : gap.end_char]

    def weight(self, words: Iterator[str] | Sequence[str] | frozenset[str]) -> float:
        """How much words tell together, in nats: the sum of their inverse document frequencies."""
        num_texts = len(self.texts)
        # Sorted, as the order of a set of strings is another one in each process, and sums depend on it.
        rare = sorted(lower for word in words if (lower := word.lower()) not in COMMON)
        return sum(math.log(num_texts / self._num_texts_with[word]) for word in rare if word in self._num_texts_with)

    def sentence(self, text: int, place: tuple[int, int]) -> frozenset[str]:
        """The words of a sentence that tell something, in small letters."""
        if (text, place) not in self._sentences:
            self._sentences[text, place] = telling(WORD.findall(self.texts[text][slice(*place)]))
        return self._sentences[text, place]

    def elsewhere(self, text: int, gap: Gap, numbers: random.Random) -> list[tuple[int, Gap]]:
        """Other texts of the title with the same answer, in sentences that share the most with the gap's."""
        places = self._places[self._titles[text], self.answer(text, gap)]
        if len(places) > _MOST_OTHERS:
            places = numbers.sample(places, _MOST_OTHERS)
        own = telling(WORD.findall(self.answer(text, gap)))
        here = self.sentence(text, gap.sentence) - own
        shared: list[tuple[float, int, Gap]] = []
        for other, place in places:
            there = self.sentence(other, place.sentence) - own
            if other != text and len(there & here) <= _MOST_SHARED * len(there):
                shared.append((self.weight(there & here), other, place))
        shared = [each for each in shared if each[0] >= _LEAST_SHARED]
        shared.sort(key=lambda each: -each[0])
        return [(other, place) for _, other, place in shared[:_SENTENCES]]


def telling(words: Sequence[str]) -> frozenset[str]:
    """Words in small letters, without those that any sentence could have."""
    return frozenset(word.lower() for word in words) - COMMON


def _best(index: _Index, text: int, numbers: random.Random) -> list[_Retold]:
    """The best question of each answer of a text for which there is one."""
    sentences = sorted({gap.sentence for gap in index.gaps[text]})
    best: dict[str, _Retold] = {}
    for gap in index.gaps[text]:
        answer = index.answer(text, gap)
        own = telling(WORD.findall(answer))
        for other, place in index.elsewhere(text, gap, numbers):
            for _ in range(_DRAWS):
                words = question_words(index.texts[other], place, numbers)
                asked = telling(words) - own
                shared = {each: index.weight(asked & index.sentence(text, each) - own) for each in sentences}
                here = shared.pop(gap.sentence)
                if len(words) < FEWEST_WORDS or here < _LEAST_SHARED or any(it >= here for it in shared.values()):
                    continue
                if answer not in best or here > best[answer].shared:
                    best[answer] = _Retold(here, gap, words)
    return list(best.values())


def _by_share(found: Sequence[_Retold], numbers: random.Random) -> Iterator[_Retold]:
    """Questions in an order that is drawn, each kind of answer as often as it is asked for."""
    by_kind = {kind: [each for each in found if each.gap.kind == kind] for kind in SHARES}
    while left := [kind for kind in SHARES if by_kind[kind]]:
        (kind,) = numbers.choices(left, [SHARES[each] for each in left])
        yield by_kind[kind].pop(numbers.randrange(len(by_kind[kind])))
