"""Questions made of texts alone: a sentence with a gap asks for what stood in it.

A model that learns to find the gap's words in the text learns most of what reading for answers is, before the first
labelled question (Dhingra et al. 2018, "Simple and Effective Semi-Supervised Question Answering"; Lewis et al. 2019,
"Unsupervised Question Answering by Cloze Translation", whose noise in the words of a question, section 2.4, is used
here too: else the sentence could be found again by its spelling).

The rules are for English: capitals make names, and words such as "the" end a phrase.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from qa_dist.common.reading import decoded, decompressed, read_bytes
from qa_dist.data.records import Answer, Example

Kind = Literal["number", "name", "phrase"]

_SHARES: Mapping[Kind, float] = {"number": 0.22, "name": 0.38, "phrase": 0.40}
"""How often an answer is of a kind, as far as the text has some; about as in SQuAD (Rajpurkar et al. 2016, table 2)."""

_MAX_WORDS = 14
_FEWEST_WORDS = 4
"""Words of a question, one of which asks."""

_MAX_DROPPED = 0.35
"""Share of a question's words that are left out, at most; the share is drawn anew for each question."""

_SHUFFLED_WITHIN = 3
"""How many places a word may move where words are shuffled (Lewis et al. 2019, section 2.4)."""

_LONGEST_PHRASE = 4
"""Words of a phrase that is asked for, at most."""

_SHORTEST_PHRASE = 4
"""Characters of it, at least: shorter words say little."""

_TRIES = 3
"""Draws for each question that is wanted of a text; some of them give too few words."""

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NUMBER = re.compile(
    rf"(?:{_MONTH}\s(?:\d{{1,2}},?\s)?\d{{4}}|\d{{1,2}}\s{_MONTH}(?:\s\d{{4}})?|{_MONTH}\s\d{{1,2}}"
    r"|[$£€]?\d(?:[\d,.]*\d)?%?)(?:\s(?:percent|million|billion|trillion|years|people|km|miles|meters|metres))?"
)
_NAME = re.compile(r"[A-Z][\w'\u2019-]*\w(?:\s(?:(?:of|the|de|for|and)\s)?[A-Z](?:[\w'\u2019-]*\w)?\b)*")
_WORD = re.compile(r"[\w'\u2019-]+")
_END = re.compile(r"(?<=[.!?])[\"\u201d)]?\s+(?=[\"\u201c(]?[A-Z0-9])")
_DATE = re.compile(rf"(?:1\d|20)\d\d|.*{_MONTH}.*")
_COMMON = frozenset(
    "a about after against all also although an and another any are as at be because been before being between both "
    "but by can could did do does during each few for from had has have he her him his how however i if in into is it "
    "its many may might more most much must no nor not of off on one only or other our out over shall she should "
    "since so some such than that the their them then there these they this those though through to under until up "
    "very was we were what when where which while who whom whose will with would you".split()
)
"""Function words: not names where they have a capital, and not part of a phrase."""


def read_texts(path: Path) -> dict[str, str]:
    """The texts in a file of plain text, plain or gzip-compressed, with the file's name as the title of each.

    A text is what stands between empty lines; its own line breaks become blanks.

    Raises:
        DataError: The file cannot be read or is not UTF-8.
    """
    content = decoded(decompressed(read_bytes(path), path), path)
    texts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", content))
    return {text: path.name for text in texts if text}


class Gap(NamedTuple):
    """What a question may ask for.

    Attributes:
        kind: what it looks like.
        sentence: first character of its sentence, and one past the last.
        start_char: its first character.
        end_char: one past its last.
    """

    kind: Kind
    sentence: tuple[int, int]
    start_char: int
    end_char: int


def cloze_examples(titles: Mapping[str, str], per_context: int, *, seed: int) -> list[Example]:
    """Questions about texts.

    Args:
        titles: The title of each text, by the text.
        per_context: How many questions are made of each; of a short one, or one with no gaps, fewer.
        seed: What they are drawn with. The questions about a text do not depend on the other texts.

    Returns:
        Examples named cloze-0, cloze-1 and so on, in the order of the texts, each with one answer.
    """
    found: list[Example] = []
    for context, title in titles.items():
        rng = random.Random(f"{seed} {context}")
        for gap, question in itertools.islice(_questions(context, rng, _TRIES * per_context), per_context):
            answer = Answer(context[gap.start_char : gap.end_char], gap.start_char)
            found.append(Example(f"cloze-{len(found)}", question, context, (answer,), title))
    return found


def _questions(context: str, rng: random.Random, tries: int) -> Iterator[tuple[Gap, str]]:
    """Gaps of a text, no two alike, with a question about each."""
    by_kind: dict[Kind, list[Gap]] = {kind: [] for kind in _SHARES}
    for gap in gaps(context):
        by_kind[gap.kind].append(gap)
    shares = {kind: share for kind, share in _SHARES.items() if by_kind[kind]}
    used: set[int] = set()
    num_starts = len({gap.start_char for each in by_kind.values() for gap in each})
    for _ in range(tries if shares else 0):
        if len(used) == num_starts:
            return
        (kind,) = rng.choices(list(shares), list(shares.values()))
        gap = rng.choice(by_kind[kind])
        if gap.start_char in used:
            continue
        used.add(gap.start_char)
        words = _words(context, gap, rng)
        if len(words) >= _FEWEST_WORDS:
            question = " ".join(words)
            yield gap, f"{question[0].upper()}{question[1:]}?"


def gaps(text: str) -> Iterator[Gap]:
    """All that could be asked for in a text: numbers and dates, names, and phrases of up to four words."""
    starts = [0, *(match.end() for match in _END.finditer(text))]
    ends = [*(match.start() for match in _END.finditer(text)), len(text)]
    for start, end in zip(starts, ends, strict=True):
        if len(text[start:end].split()) <= _FEWEST_WORDS:
            continue
        for match in _NUMBER.finditer(text, start, end):
            yield Gap("number", (start, end), *match.span())
        for match in _NAME.finditer(text, start, end):
            # A sentence begins with a capital, whatever the word.
            if match.group().lower() not in _COMMON and (match.start() > start or " " in match.group()):
                yield Gap("name", (start, end), *match.span())
        for first, last in _phrases(text, start, end):
            yield Gap("phrase", (start, end), first, last)


def _phrases(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of words in small letters with nothing but a blank between them, and no common word among them."""
    run: list[re.Match[str]] = []
    for word in itertools.chain(_WORD.finditer(text, start, end), [None]):
        is_part = word is not None and word.group().islower() and word.group() not in _COMMON
        if run and not (word is not None and is_part and text[run[-1].end() : word.start()] == " "):
            first, last = run[0].start(), run[-1].end()
            if len(run) <= _LONGEST_PHRASE and last - first >= _SHORTEST_PHRASE:
                yield first, last
            run = []
        if word is not None and is_part:
            run.append(word)


def _words(text: str, gap: Gap, rng: random.Random) -> list[str]:
    """The words of a question: some of those around the gap, and one that asks in its place or before them all."""
    start, end = gap.sentence
    most = rng.randint(6, _MAX_WORDS)
    left, right = _WORD.findall(text[start : gap.start_char]), _WORD.findall(text[gap.end_char : end])
    num_left = min(len(left), max(rng.randint(0, most), most - len(right)))
    left, right = left[len(left) - num_left :], right[: most - num_left]
    dropped = rng.uniform(0.0, _MAX_DROPPED)
    left, right = ([word for word in side if rng.random() > dropped] for side in (left, right))
    asking = _asking(gap.kind, text[gap.start_char : gap.end_char], rng)
    order = rng.random()
    if order < 0.4:
        return [*left, asking, *right]
    if order < 0.7:
        return [asking, *right, *left]
    return [asking, *_shuffled([*left, *right], rng)]


def _shuffled(words: Sequence[str], rng: random.Random) -> list[str]:
    """Words, each moved a few places at most."""
    places = {index: index + rng.uniform(0, _SHUFFLED_WITHIN) for index in range(len(words))}
    return [words[index] for index in sorted(places, key=places.__getitem__)]


def _asking(kind: Kind, answer: str, rng: random.Random) -> str:
    """The question word, or words; drawn for a name, which may be that of a person, a place or a thing."""
    if kind == "name":
        return rng.choice(("who", "what", "which", "where", "who", "what"))
    if kind == "phrase":
        return "what"
    if _DATE.fullmatch(answer):
        return rng.choice(("when", "what year", "in what year"))
    if "%" in answer or "percent" in answer:
        return rng.choice(("what percentage", "how much"))
    return "how much" if answer[0] in "$£€" else "how many"
