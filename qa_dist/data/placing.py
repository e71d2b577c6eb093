"""Where an answer stands in its context: at its offset, at another place that is certain, or nowhere.

White space is compared loosely: a no-break or doubled blank, or a line end, in one of the two texts is a blank in the
other. An occurrence inside a word does not count, in scripts that write words apart.

Offsets of other programs count other things than characters. `find_unit` tells by all answers of a file which.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import NamedTuple

_GAP = r"[\s\u200b\u2060\ufeff]"
_GAPS = re.compile(f"{_GAP}+")

_NEAR = 20
"""Characters: an offset that is off by at most this much is near."""
_FAR_FACTOR = 4
_FAR_MARGIN = 10
"""The next occurrence is far if it is this many times as far off as the nearest, and this many characters more."""

# Unicode blocks of scripts that do not write blanks between words, first and last code point. Source: Unicode 16.0,
# Blocks.txt, and UAX #14, classes SA (Thai, Lao, Khmer, Myanmar, ...), ID and CJ (Chinese and Japanese).
_TOGETHER = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Lanna
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3031, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # ideographs
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar Extended-B
    (0xAA60, 0xAADF),  # Myanmar Extended-A, Tai Viet
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_TOGETHER_STARTS = [first for first, _ in _TOGETHER]
# Korean writes words apart but joins particles to their ends.
_HANGUL = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))


class Span(NamedTuple):
    """Characters of a context: the first, and one past the last."""

    start: int
    end: int


def place(text: str, start: int | None, context: str) -> Span | None:
    """Where an answer stands; None if that is not certain.

    Args:
        text: The answer, not blank.
        start: Where it is said to begin; None or a negative number if that is not said.
        context: The context.

    Returns:
        The place that is said, if the text is there. Else its only occurrence, or of several the one nearest to that
        place if it is near (20 characters) and the next is far (four times as far, and ten characters more).
    """
    stated = start is not None and start >= 0
    if stated and start is not None and (span := at(text, start, context) or _behind_gap(text, start, context)):
        return span
    found = occurrences(text, context)
    if len(found) <= 1:
        return found[0] if found else None
    if not stated or start is None:
        return None
    ordered = sorted(found, key=lambda span: abs(span.start - start))
    nearest, following = (abs(span.start - start) for span in ordered[:2])
    is_certain = nearest <= _NEAR and following >= max(_FAR_FACTOR * nearest, nearest + _FAR_MARGIN)
    return ordered[0] if is_certain else None


def at(text: str, start: int, context: str) -> Span | None:
    """The characters of `context` from `start` on that are `text`, white space apart; None if there are none."""
    if not 0 <= start < len(context):
        return None
    if context.startswith(text, start):
        return Span(start, start + len(text))
    pattern = _loose(text)
    if pattern is None:
        return None
    match = pattern.match(context, start)
    return Span(*match.span()) if match else None


def _behind_gap(text: str, start: int, context: str) -> Span | None:
    """As `at`, where the offset points to the white space before the answer."""
    gap = _GAPS.match(context, start) if start < len(context) else None
    return at(text, gap.end(), context) if gap else None


def occurrences(text: str, context: str) -> list[Span]:
    """Everywhere that `text` stands in `context` as words of its own: as it is, or else with other white space."""
    found = []
    start = context.find(text)
    while start >= 0:
        found.append(Span(start, start + len(text)))
        start = context.find(text, start + 1)
    if not found and (pattern := _loose(text)):
        match = pattern.search(context)
        while match:
            found.append(Span(*match.span()))
            match = pattern.search(context, match.start() + 1)
    return [span for span in found if is_apart(context, span)]


@lru_cache(maxsize=64)
def _loose(text: str) -> re.Pattern[str] | None:
    """A pattern of the text in which white space stands for any other; None for a blank text."""
    words = [re.escape(word) for word in _GAPS.split(text) if word]
    return re.compile(f"{_GAP}+".join(words)) if words else None


def is_apart(context: str, span: Span) -> bool:
    """Whether an occurrence does not begin or end between two letters or digits of a script that writes words apart."""
    return not _joins(context, span.start, at_end=False) and not _joins(context, span.end, at_end=True)


def _joins(context: str, border: int, *, at_end: bool) -> bool:
    """Whether the characters on both sides of a border belong to one word."""
    if not 0 < border < len(context):
        return False
    before, after = context[border - 1], context[border]
    if unicodedata.category(after).startswith("M"):
        # An accent or a vowel sign belongs to the letter before it, in every script.
        return True
    if not (is_of_word(before) and is_of_word(after)):
        return _is_in_number(context, border)
    if _is_together(before) or _is_together(after):
        return False
    return not (at_end and _is_hangul(after))


def _is_in_number(context: str, border: int) -> bool:
    """Whether a border lies beside the point or comma of a number: "5" is no part of its own in "1.5"."""
    return any(
        0 < mark < len(context) - 1
        and context[mark] in ".,"
        and context[mark - 1].isdecimal()
        and context[mark + 1].isdecimal()
        for mark in (border - 1, border)
    )


@cache
def is_of_word(character: str) -> bool:
    """Whether it is a letter, a digit or an accent."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _is_together(character: str) -> bool:
    index = bisect_right(_TOGETHER_STARTS, ord(character)) - 1
    return index >= 0 and ord(character) <= _TOGETHER[index][1]


def _is_hangul(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _HANGUL)


# ------------------------------------------------------------------------------------------------------------- units


def _from_utf8(start: int, context: str) -> int | None:
    return _from_encoded(start, context, "utf-8", 1)


def _from_utf16(start: int, context: str) -> int | None:
    return _from_encoded(start, context, "utf-16-le", 2)


def _from_encoded(start: int, context: str, encoding: str, width: int) -> int | None:
    content = context.encode(encoding, "surrogatepass")
    if start * width > len(content):
        return None
    try:
        before = content[: start * width].decode(encoding, "surrogatepass")
    except UnicodeDecodeError:
        return None
    # Half a surrogate pair is decoded, and is inside a character all the same.
    return len(before) if context.startswith(before) else None


def _from_single_line_ends(start: int, context: str) -> int | None:
    found = start
    for match in re.finditer("\r\n", context):
        if match.start() >= found:
            break
        found += 1
    return found if found <= len(context) else None


def _from_double_line_ends(start: int, context: str) -> int | None:
    found = start
    for match in re.finditer("\n", context):
        if match.start() >= found:
            break
        found -= 1
        if found == match.start():
            # Between the two characters of a line end that has one here.
            return None
    return found if found <= len(context) else None


def _behind(convert: Callable[[int, str], int | None]) -> Callable[[int, str], int | None]:
    """The conversion of offsets that count as `convert` says, in a text whose line ends were one character each."""

    def converted(start: int, context: str) -> int | None:
        within = convert(start, context.replace("\r\n", "\n"))
        return None if within is None else _from_single_line_ends(within, context)

    return converted


Convert = Callable[[int, str], int | None]

UNITS: dict[str, Convert] = {
    "UTF-8 bytes": _from_utf8,
    "UTF-16 units": _from_utf16,
    "CR LF as one character": _from_single_line_ends,
    "line ends as two characters": _from_double_line_ends,
    "UTF-8 bytes, with CR LF as one": _behind(_from_utf8),
    "UTF-16 units, with CR LF as one": _behind(_from_utf16),
}
"""What offsets may count, and how to turn one into characters (None: it is no offset of this kind)."""


def find_unit(answers: Iterable[tuple[str, int, str]]) -> str | None:
    """What the offsets of a file count, a key of `UNITS`; None if that is characters, or nothing that fits all.

    Answers that stand nowhere in their contexts fit nothing, and say nothing of it.

    Args:
        answers: Text, offset and context of all answers that have an offset of 0 or more.
    """
    placed: list[tuple[str, int, str]] = []
    off: list[tuple[str, int, str]] = []
    for text, start, context in answers:
        if at(text, start, context) is not None:
            placed.append((text, start, context))
        elif _stands(text, context):
            off.append((text, start, context))
    if not off:
        return None
    # Those that tell most come first: the search for another unit mostly ends with the first of them.
    for name, convert in UNITS.items():
        if all(_fits(convert, *answer) for answer in (*off, *placed)):
            return name
    return None


def _fits(convert: Convert, text: str, start: int, context: str) -> bool:
    converted = convert(start, context)
    return converted is not None and at(text, converted, context) is not None


def _stands(text: str, context: str) -> bool:
    """Whether an answer stands anywhere in its context."""
    pattern = None if text in context else _loose(text)
    return pattern is None or pattern.search(context) is not None
