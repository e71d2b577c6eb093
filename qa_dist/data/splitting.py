"""Questions split off a data set by article, so that nothing on one side has its context on the other."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from qa_dist.common.errors import DataError
from qa_dist.data.records import Example


class Parts(NamedTuple):
    """A data set in two.

    Attributes:
        off: What was split off, in its order.
        rest: All questions of the other articles.
        titles: The articles that were split off, in the order in which they were drawn.
        num_left_out: Questions of these articles that were not wanted; they are in neither part.
    """

    off: Sequence[Example]
    rest: Sequence[Example]
    titles: Sequence[str]
    num_left_out: int


def split_articles(
    examples: Sequence[Example], num_questions: int, *, per_article: int | None = None, seed: int = 42
) -> Parts:
    """Split `num_questions` questions off, of articles drawn at random.

    Args:
        examples: The data set.
        num_questions: How many are wanted. Of the last article that is drawn, as many as it takes. Articles that have
            contexts in common are drawn together.
        per_article: The most that are taken of an article, its first ones; None: all.
        seed: What the articles are drawn with.

    Raises:
        DataError: The examples name no articles, or too few questions or articles would be left.
    """
    sizes = Counter(example.title for example in examples)
    if "" in sizes or len(sizes) < 2:
        num_titles = len(sizes) - ("" in sizes)
        raise DataError(
            f"{sizes.get('', 0):,} of {len(examples):,} questions name no article and there are {num_titles:,} titles; "
            "splitting needs a title for each question, and at least two of them"
        )
    titles = sorted(sizes)
    random.Random(seed).shuffle(titles)
    together = _sharing(examples)
    room: dict[str, int] = {}
    wanted = num_questions
    for title in titles:
        if wanted and title not in room:
            for each in (title, *sorted(together[title] - {title})):
                room[each] = min(wanted, sizes[each], per_article or wanted)
                wanted -= room[each]
    most = sum(min(size, per_article or size) for size in sizes.values())
    if most < num_questions <= len(examples):
        raise DataError(
            f"--per_article {per_article:,} leaves {most:,} questions to split off, and {num_questions:,} are wanted; "
            "raise it, or lower --questions"
        )
    if wanted or len(room) == len(titles):
        raise DataError(
            f"splitting {num_questions:,} questions off would leave no article of {len(titles):,}; lower --questions"
        )
    drawn = tuple(room)
    off, rest = [], []
    for example in examples:
        if example.title not in room:
            rest.append(example)
        elif room[example.title]:
            room[example.title] -= 1
            off.append(example)
    return Parts(off, rest, drawn, len(examples) - len(off) - len(rest))


def _sharing(examples: Sequence[Example]) -> dict[str, set[str]]:
    """By the title of each article, those of all articles that are split with it: they have contexts in common.

    They have them directly or through others, as copies of an article under another title do.
    """
    together: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for example in examples:
        own = together.setdefault(example.title, {example.title})
        other = together[first.setdefault(example.context, example.title)]
        if own is not other:
            other |= own
            together.update(dict.fromkeys(own, other))
    return together
