"""Where sentences begin and end, by their marks: good enough to say which sentence an answer is in.

A sentence ends behind `.`, `!`, `?` or `…`, with the quotation marks and brackets that close there, if white space
follows and then no small letter; behind the marks of Chinese, Japanese, Hindi, Urdu and Arabic wherever they stand; and
at the end of a line. A point behind a single capital letter ("J. Smith") or an English abbreviation of `_SHORT` ends
none.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

_SHORT = frozenset(
    "Mr Mrs Ms Dr Prof Rev Hon St Mt Gen Col Capt Lt Sgt Gov Sen Rep Jr Sr vs No Fig Vol ca approx".split()
)
_END = re.compile(
    r"""(?P<point>[.!?\u2026])["'\u2019\u201d)\]]*(?=\s+(?P<next>\S))"""
    r"""|[\u3002\uff01\uff1f\u0964\u06d4\u061f]["\u2019\u201d\u300d\u300f\uff09]*|\n+"""
)
_WORD_BEFORE = re.compile(r"([^\W\d_]+)$")


@lru_cache(maxsize=4096)
def sentence_starts(text: str) -> tuple[int, ...]:
    """The first character of each sentence, in order; 0 is the first.

    White space between two sentences belongs to the one before it.
    """
    starts = [0]
    for match in _END.finditer(text):
        if match["point"] is not None:
            if match["next"].islower():
                continue
            word = _WORD_BEFORE.search(text, max(0, match.start() - 20), match.start())
            is_initial = word is not None and len(word[1]) == 1 and word[1].isupper()
            if match["point"] == "." and word is not None and (is_initial or word[1] in _SHORT):
                continue
        start = match.end()
        while start < len(text) and text[start].isspace():
            start += 1
        if starts[-1] < start < len(text):
            starts.append(start)
    return tuple(starts)


def sentences_of(starts: Sequence[int], start_char: int, end_char: int) -> range:
    """The numbers of the sentences that characters lie in."""
    first = bisect_right(starts, start_char) - 1
    return range(first, max(first, bisect_right(starts, end_char - 1) - 1) + 1)


def sentence_around(text: str, start_char: int, end_char: int) -> str:
    """The sentence, or the sentences, that characters of a text lie in."""
    starts = sentence_starts(text)
    numbers = sentences_of(starts, start_char, end_char)
    return text[starts[numbers[0]] : starts[numbers[-1] + 1] if numbers[-1] + 1 < len(starts) else len(text)]
