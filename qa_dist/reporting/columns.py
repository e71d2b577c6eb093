"""Text in columns of a terminal: what is wide, narrow or obeyed by it is counted or shown as such."""

import unicodedata
from collections.abc import Collection, Iterator, Sequence

from qa_dist.answering.sentences import printable

_BOLD_GREEN, _DIM, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def width(text: str) -> int:
    """Columns that a terminal takes for a text: two for most characters of East Asia, none for combining marks."""
    return sum(
        2 if unicodedata.east_asian_width(character) in "WF" else not unicodedata.combining(character)
        for character in text
    )


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (), indent: int = 0) -> Iterator[str]:
    """Rows of equally many cells as lines, in columns as wide as need be.

    Args:
        rows: The cells.
        left: Columns that are written from the left; others end at the right.
        indent: Blanks before each line.
    """
    cleaned = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*cleaned, strict=True)]
    for row in cleaned:
        cells = []
        for place, (cell, most) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (most - width(cell))
            cells.append(cell + blanks if place in left else blanks + cell)
        yield " " * indent + "  ".join(cells).rstrip()


def bright(text: str, *, has_colours: bool) -> str:
    """Text that matters, in colour where there are colours."""
    return f"{_BOLD_GREEN}{text}{_PLAIN}" if has_colours else text


def dim(text: str, *, has_colours: bool) -> str:
    """Text that matters less."""
    return f"{_DIM}{text}{_PLAIN}" if has_colours else text
