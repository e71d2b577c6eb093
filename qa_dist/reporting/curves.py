"""Curves of many steps as few points that look the same: extremes stay."""

import numpy as np

from qa_dist.common.arrays import Float64, Int64


def kept_points(y: Float64, most: int) -> Int64:
    """The places of at most `most` points of a curve, int64, in order: the least and greatest of each stretch.

    Points that are not finite are left out. A curve of few enough points keeps them all.

    Args:
        y: the values, float64 [S].
        most: an even number.
    """
    places = np.flatnonzero(np.isfinite(y))
    if len(places) <= most:
        return places
    kept: list[int] = []
    for part in np.array_split(places, most // 2):
        values = y[part]
        kept += sorted({int(part[values.argmin()]), int(part[values.argmax()])})
    return np.array(kept, np.int64)


def smoothed(y: Float64, width: int) -> Float64:
    """The mean of up to `width` values around each, float64 [S]; of values that are not finite, none counts."""
    is_there = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_there, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_there)])
    places = np.arange(len(y))
    first = np.maximum(0, places - width // 2)
    last = np.minimum(len(y), places + (width + 1) // 2)
    number = counts[last] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Float64 = np.where(number > 0, (sums[last] - sums[first]) / number, np.nan)
    return found
