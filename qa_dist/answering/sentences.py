"""An answer where it stands: the sentence around it, fit for a terminal. No torch."""

import re
import unicodedata
from dataclasses import dataclass

_CLOSING = "\"')\\]\u201d\u2019\u300d\u300f\uff09"
_END = re.compile(
    rf"[.!?\u2026]+[{_CLOSING}]*(?=\s)|[\u3002\uff01\uff1f\uff0e]+[{_CLOSING}]*|\n\s*\n|\n(?=\s*[-*\u2022\d])"
)
"""Where a sentence ends: a full stop and what closes with it, a blank line, the item of a list."""

_LONGEST_SIDE = 200
"""Characters of a sentence that are shown before and behind an answer; what is longer is cut at a blank."""

_INITIAL = re.compile(r"\b[^\W\d_]$")
"""A single letter: the full stop behind it is mostly that of an initial, as in J. Smith."""

_LAST_WORD = re.compile(r"\b[^\W\d_]+$")
_ABBREVIATIONS = frozenset(
    ("Dr", "Mr", "Mrs", "Ms", "Prof", "St", "No", "Fig", "vs", "etc", "approx", "ca", "Approx", "Ca", "fig")
)
"""Words whose full stop mostly ends no sentence. "No" has its capital: "no" is the end of many."""

_LONGEST_WORD = max(map(len, _ABBREVIATIONS)) + 1


@dataclass(frozen=True, slots=True)
class Sentence:
    """An answer with what stands around it, each on one line.

    Attributes:
        before: what precedes the answer in its sentence.
        answer: the answer.
        after: what follows it.
    """

    before: str
    answer: str
    after: str


def sentence_around(context: str, start_char: int, end_char: int) -> Sentence:
    """The sentence, or sentences, that context[start_char:end_char] is in.

    What is printed of a text is on one line and holds nothing that moves the cursor of a terminal, or changes its
    colours or its title.
    """
    first = max(0, start_char - 4 * _LONGEST_SIDE)
    begin = first
    for end in _END.finditer(context, first, start_char):
        if not _is_abbreviation(context, end.start()):
            begin = end.end()
    finish = min(len(context), end_char + 4 * _LONGEST_SIDE)
    # From the answer's last character on, as the answer may take in the full stop.
    for end in _END.finditer(context, max(start_char, end_char - 1), finish):
        if end.end() >= end_char and not _is_abbreviation(context, end.start()):
            finish = end.end()
            break
    before, after = context[begin:start_char].lstrip(), context[end_char:finish].rstrip()
    if len(before) > _LONGEST_SIDE:
        before = "… " + before[-_LONGEST_SIDE:].partition(" ")[2]
    if len(after) > _LONGEST_SIDE:
        after = after[:_LONGEST_SIDE].rpartition(" ")[0] + " …"
    return Sentence(printable(before), printable(context[start_char:end_char]), printable(after))


def printable(text: str) -> str:
    """`text` on one line, without characters that a terminal would obey instead of showing."""
    shown = []
    for character in text:
        if character.isspace():
            shown.append(" ")
        # Control and format characters: escapes, and marks that turn the direction of what follows.
        elif unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS:
            shown.append("\N{REPLACEMENT CHARACTER}")
        else:
            shown.append(character)
    return re.sub(" {2,}", " ", "".join(shown))


_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks by which text can be shown in another order than it has."""


def _is_abbreviation(context: str, stop: int) -> bool:
    """Whether what ends at context[stop] is a full stop behind an initial or a common abbreviation."""
    if context[stop] != ".":
        return False
    before = context[max(0, stop - _LONGEST_WORD) : stop]
    word = _LAST_WORD.search(before)
    return _INITIAL.search(before) is not None or (word is not None and word.group() in _ABBREVIATIONS)
