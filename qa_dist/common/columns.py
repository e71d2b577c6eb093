"""Text in columns as wide as need be, and sizes as they stand there."""

import unicodedata
from collections.abc import Collection, Iterator, Sequence


def width(text: str) -> int:
    """Columns that a terminal takes for a text: two for most characters of East Asia, none for combining marks."""
    return sum(
        2 if unicodedata.east_asian_width(character) in "WF" else not unicodedata.combining(character)
        for character in text
    )


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> Iterator[str]:
    """Rows of equally many cells as lines; those of columns in `left` begin at the left, others end at the right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for place, (cell, most) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (most - width(cell))
            cells.append(cell + blanks if place in left else blanks + cell)
        yield "  ".join(cells).rstrip()


def mib(size: int) -> str:
    """A number of bytes in whole MiB."""
    return f"{size / 2**20:,.0f}"
