"""Text in columns of a terminal: what is wide, narrow or obeyed by it is counted or shown as such."""

from collections.abc import Collection, Iterator, Sequence

from qa_dist.answering.sentences import printable
from qa_dist.common import columns

_BOLD_GREEN, _DIM, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (), indent: int = 0) -> Iterator[str]:
    """Rows of equally many cells as lines for a terminal, in columns as wide as need be.

    Args:
        rows: The cells.
        left: Columns that are written from the left; others end at the right.
        indent: Blanks before each line.
    """
    for line in columns.aligned([[printable(cell) for cell in row] for row in rows], left=left):
        yield " " * indent + line


def bright(text: str, *, has_colours: bool) -> str:
    """Text that matters, in colour where there are colours."""
    return f"{_BOLD_GREEN}{text}{_PLAIN}" if has_colours else text


def dim(text: str, *, has_colours: bool) -> str:
    """Text that matters less."""
    return f"{_DIM}{text}{_PLAIN}" if has_colours else text
