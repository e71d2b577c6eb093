"""Which characters each token came from, made exact where a tokenizer is not.

Four kinds of fast tokenizers are not. Byte-level ones that put a blank before a text count it as a character of that
text. SentencePiece's (Metaspace), and byte-level ones that do not trim, count the blank before a word to the word. And
some cover no character at all of a word's beginning: RobBERT's pre-tokenizer cuts words out and puts a blank before
each, whose width its post-processor then takes off the word's first letter. And many cover no accent or vowel sign that
is a character of its own: they drop it, or make one character of it and the letter before it, where that letter stood.

Legend: C context tokens.
"""

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from qa_dist.common.arrays import Int32
from qa_dist.data.placing import is_of_word

_WORDS = "Amsterdam is a 7 b 1871 Kerrow (Ada) Größe quay, Москва 서울 東京 deltas"
_PROBES = (_WORDS, f" {_WORDS}")
"""Words with single blanks between them, among them words of one letter, in several scripts; and with one before."""


def ordered(offsets: Sequence[tuple[int, int]] | Int32) -> Int32:
    """Offsets int32 [C, 2] in which a token without characters stands no further than the next token begins.

    Where a byte-level tokenizer puts a blank before a text, as it does behind every added token, it takes that blank's
    width off the offsets of the text's first character.
    """
    starts, ends = np.array(offsets, np.int32).reshape(-1, 2).T
    earliest = np.minimum.accumulate(starts[::-1])[::-1]
    return np.stack((earliest, np.where(starts == ends, earliest, ends)), 1)


def exact_offsets(context: str, offsets: Sequence[tuple[int, int]], *, are_exact: bool) -> Int32:
    """The characters of each token, int32 [C, 2], as they should be.

    Args:
        context: The text.
        offsets: The characters of each of its C tokens, as the tokenizer says.
        are_exact: Whether it says it rightly, of texts without accents that are characters of their own.
    """
    in_order = ordered(offsets)
    if not are_exact:
        return mended(context, in_order)
    return _with_lost_letters(context, in_order) if has_accents(context) else in_order


def cover_words(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens cover all letters and digits of words."""
    return all(
        {place for place, character in enumerate(text) if is_of_word(character)} <= _covered(backend, text)
        for text in _PROBES
    )


def leave_blanks_out(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens cover no blank before or between words."""
    return all(not any(text[place].isspace() for place in _covered(backend, text)) for text in _PROBES)


def _covered(backend: tokenizers.Tokenizer, text: str) -> set[int]:
    """Places of the characters of a text that some token covers."""
    offsets = ordered(backend.encode(text, add_special_tokens=False).offsets)
    return set(itertools.chain.from_iterable(range(start, end) for start, end in offsets.tolist()))


def has_accents(context: str) -> bool:
    """Whether a text has accents or vowel signs that are characters of their own (Unicode's categories M)."""
    return not context.isascii() and any(unicodedata.category(character)[0] == "M" for character in set(context))


def without_trimming(description: Any) -> Any:
    """The JSON of a tokenizer's post-processor, in which no part takes blanks off the offsets of tokens."""
    if isinstance(description, dict):
        return {key: False if key == "trim_offsets" else without_trimming(value) for key, value in description.items()}
    return [without_trimming(value) for value in description] if isinstance(description, list) else description


def mended(context: str, offsets: Int32) -> Int32:
    """Offsets without the blanks around words, and with the letters of words that no token covers.

    Such a letter goes to the token of the same word behind it, else to the one before it, else to a token without
    characters that stands there. A letter that left no token stays uncovered.

    Args:
        context: The text.
        offsets: int32 [C, 2], as from `ordered`.

    Returns:
        int32 [C, 2].
    """
    blank = np.fromiter(map(str.isspace, context), bool, len(context))
    starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
    places = np.arange(len(context) + 1, dtype=np.int32)
    # For each place, the first character from there on, and one past the last character before it, that is no blank.
    following = np.minimum.accumulate(np.where(np.append(blank, False), len(context), places)[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(np.insert(blank, 0, False), 0, places))
    starts = np.minimum(following[starts], ends).astype(np.int32)
    ends = np.maximum(preceding[ends], starts).astype(np.int32)
    return _with_lost_letters(context, np.stack((starts, ends), 1))


def _with_lost_letters(context: str, offsets: Int32) -> Int32:
    """Offsets int32 [C, 2] with the letters, digits and accents that no token covers."""
    starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
    changes = np.zeros(len(context) + 1, np.int64)
    np.add.at(changes, starts, 1)
    np.add.at(changes, ends, -1)
    uncovered = np.flatnonzero(np.cumsum(changes[:-1]) == 0).tolist()
    lost = [place for place in uncovered if is_of_word(context[place])]
    if lost:
        _give(lost, context, starts, ends)
    return ordered(np.stack((starts, ends), 1))


def _give(lost: list[int], context: str, starts: Int32, ends: Int32) -> None:
    """Give the characters at `lost` places, in ascending order, to tokens: `starts` and `ends` change in place."""
    has_width = starts < ends
    token_at = {int(starts[token]): token for token in np.flatnonzero(has_width)[::-1].tolist()}
    token_until = {int(ends[token]): token for token in np.flatnonzero(has_width).tolist()}
    empty_at = {int(starts[token]): token for token in np.flatnonzero(~has_width)[::-1].tolist()}
    for _, group in itertools.groupby(enumerate(lost), lambda pair: pair[1] - pair[0]):
        run = [place for _, place in group]
        first, end = run[0], run[-1] + 1
        is_accent = unicodedata.category(context[first]).startswith("M")
        here = next((empty_at[place] for place in range(first, end + 1) if place in empty_at), None)
        behind = token_at.get(end) if end < len(context) and is_of_word(context[end]) else None
        before = token_until.get(first) if first and is_of_word(context[first - 1]) else None
        if before is not None and (is_accent or behind is None):
            ends[before] = end
        elif behind is not None and not is_accent:
            starts[behind] = first
        elif here is not None:
            starts[here], ends[here] = first, end
