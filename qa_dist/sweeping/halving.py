"""Successive halving (Jamieson and Talwalkar 2016): who goes on from a rung."""

import math
from collections.abc import Mapping, Sequence


def better_half(scores: Mapping[str, Sequence[float | None]]) -> list[str]:
    """The methods that go on: the better half by the mean of their scores, rounded up, in the order given.

    Methods and not single runs go on, so that no seed is dropped. Where one of a method's runs has no score (it failed,
    or diverged) the method does not go on. Of equal means the method that was given first is taken.

    Args:
        scores: For each method, the score of each seed; greater is better, None: there is none.
    """
    means = {
        name: sum(values) / len(values)  # type: ignore[arg-type]
        for name, values in scores.items()
        if values and all(value is not None and math.isfinite(value) for value in values)
    }
    places = {name: place for place, name in enumerate(scores)}
    ranked = sorted(means, key=lambda name: (-means[name], places[name]))
    kept = set(ranked[: math.ceil(len(scores) / 2)])
    return [name for name in scores if name in kept]
