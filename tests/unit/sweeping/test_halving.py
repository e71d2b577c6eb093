"""Who goes on from a rung."""

import pytest

from qa_dist.sweeping.halving import better_half

LOST = None


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({"a": [1.0], "b": [3.0], "c": [2.0], "d": [0.0]}, ["b", "c"]),
        # The means of the seeds count, not the best seed; the half is rounded up.
        ({"a": [9.0, 1.0], "b": [6.0, 6.0], "c": [5.0, 5.5]}, ["b", "c"]),
        # Equal means: the first one given.
        ({"a": [1.0], "b": [1.0]}, ["a"]),
        # Without a score of every seed, a method does not go on, and its place stays empty.
        ({"a": [50.0, LOST], "b": [1.0, 1.0], "c": [2.0, float("nan")]}, ["b"]),
        ({"a": [3.0], "b": [2.0], "c": [1.0], "d": [LOST], "e": [LOST]}, ["a", "b", "c"]),
        ({"a": [LOST]}, []),
        ({"a": [0.0]}, ["a"]),
    ],
)
def test_the_better_half_goes_on(scores: dict[str, list[float | None]], kept: list[str]) -> None:
    assert better_half(scores) == kept
