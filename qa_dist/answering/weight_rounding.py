"""Weights of matrix products as integers of 8 bits, so that the products change as little as possible.

Weights are rounded one row after the other, and what that changes in the products is taken back by the rows after it,
as far as what they multiply goes together (GPTQ, Frantar et al. 2022, section 3, with the rows in their order).

Processors with AVX2 and without VNNI multiply bytes without sign, of what is multiplied, by bytes with sign, of the
weight, and add each two neighbours in 16 bits, cutting off what is larger (vpmaddubsw in Intel's manual). Nothing is
cut off where of each two neighbours those of one sign add up to 128 at most, as 255 * 128 < 2^15. Weights of 7 bits all
do, and are coarser: two neighbours are seldom large together.

Shapes: K rows of a weight, which are the channels of what it multiplies, N columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qa_dist.common.arrays import Float32, Float64, Int8

LARGEST = 127
"""Largest absolute value of a weight."""

LARGEST_PAIR = 128
"""Largest sum of the weights of one sign in rows 2i and 2i + 1 of a column."""

LEVELS = (np.inf, 4.0, 3.0, 2.0, 1.5, 1.0)
"""Channels may be brought down to so many times the median of their largest values; inf: they stay as they are."""

SEEN_ROWS = 2048
"""Rows that are kept of what products multiply, to see what each of `LEVELS` does to it."""

DAMPING = 0.01
"""What is added to the mean squares of channels, as a share of their mean (GPTQ, section 3.3)."""

_SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares of `LARGEST` that a column's largest weight may be rounded to; with half of it no pair is too large."""

_BLOCK = 128
"""Rows whose changes are gathered before the rows behind them are changed; it decides the speed alone."""


class Channels:
    """What the channels of some value were.

    Attributes:
        largest: largest absolute value of each channel, float32 [channels].
        rows: the first of its rows, float32 [rows, channels].
        moments: mean product of each two, float64 [channels, channels].
    """

    def __init__(self, num_channels: int) -> None:
        self.largest = np.zeros(num_channels, np.float32)
        self.rows = np.empty((0, num_channels), np.float32)
        self._products = np.zeros((num_channels, num_channels))
        self._num_rows = 0

    def add(self, rows: Float32) -> None:
        """Take in some rows, [rows, channels]."""
        self.largest = np.maximum(self.largest, np.abs(rows).max(axis=0))
        self.rows = np.concatenate((self.rows, rows[: SEEN_ROWS - len(self.rows)]))
        self._products += rows.T @ rows
        self._num_rows += len(rows)

    @property
    def moments(self) -> Float64:
        return self._products / self._num_rows


class Columns(NamedTuple):
    """How the columns of a weight are rounded.

    Attributes:
        scales: what one step is, float32 [N].
        errors: mean square of what rounding changes in the products, if each weight is rounded by itself, [N].
    """

    scales: Float32
    errors: Float32


def best_columns(weight: Float32, squares: Float32) -> Columns:
    """Of a few scales of each column the one with the least error of products.

    Args:
        weight: [K, N].
        squares: Mean squares of the channels that it multiplies, [K].
    """
    largest: Float32 = np.abs(weight).max(axis=0)
    largest[largest == 0] = 1
    best = Columns(largest, np.full(weight.shape[1], np.inf, np.float32))
    for share in _SHARES:
        scales = largest / np.float32(LARGEST * share)
        values = np.rint(weight / scales)
        low, high = _limits(values[:-1:2])
        values[1::2] = np.clip(values[1::2], low, high)
        errors = squares @ np.square(values * scales - weight)
        is_better = errors < best.errors
        best = Columns(np.where(is_better, scales, best.scales), np.where(is_better, errors, best.errors))
    return best


def best_factors(weights: Sequence[Float32], channels: Channels) -> Float32:
    """What channels are divided by, and their rows of weights multiplied by, float32 [K], each 1 or more.

    Rounding adds noise to all channels of a row alike, a twelfth of a squared step, which goes by the row's largest
    value. The lower the largest channels, the smaller it is; but their rows of the weights grow, and with them the
    steps of these. Of a few levels that channels are brought down to, the one is taken that is best for the products.

    Args:
        weights: What the channels are multiplied by, each [K, N].
        channels: What they were.
    """
    squares = np.diag(channels.moments).astype(np.float32)
    median = np.median(channels.largest)
    found, least = np.ones_like(channels.largest), np.inf
    for level in LEVELS if median > 0 else ():
        factors = np.maximum(channels.largest / (level * median), 1).astype(np.float32)
        squared_step = mean_square_step(channels.rows / factors)
        error = 0.0
        for weight in weights:
            leveled = weight * factors[:, None]
            of_inputs = squared_step / 12 * np.square(leveled).sum()
            of_weights = best_columns(leveled, squares / np.square(factors)).errors.sum()
            error += float(of_inputs + of_weights)
        if error < least:
            found, least = factors, error
    return found


def mean_square_step(rows: Float32) -> float:
    """The mean square of a step of [rows, K] that are rounded to 8 bits after each was divided by its largest value."""
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    divided = rows / largest
    span = max(float(divided.max()), 0.0) - min(float(divided.min()), 0.0)
    return float(np.square(largest).mean()) * (span / 255) ** 2


def compensation(moments: Float64) -> Float32:
    """How a row's error is spread over the rows after it: the upper Cholesky factor of the inverse, float32 [K, K].

    Args:
        moments: Mean products of each two channels of what is multiplied, [K, K].
    """
    damped = moments.copy()
    mean = float(np.diag(moments).mean())
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T, dtype=np.float32)


def rounded(weight: Float32, scales: Float32, factor: Float32) -> Int8:
    """A weight as integers, int8 [K, N]: `weight` is about `rounded(...) * scales`.

    Args:
        weight: [K, N].
        scales: Those of `best_columns`, [N].
        factor: What `compensation` gave for what it multiplies, [K, K].
    """
    rest = weight.astype(np.float32)
    values = np.zeros(weight.shape, np.float32)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
        errors = np.zeros((end - start, rest.shape[1]), np.float32)
        for row in range(start, end):
            low, high = _limits(values[row - 1]) if row % 2 else (-LARGEST, LARGEST)
            values[row] = np.clip(np.rint(rest[row] / scales), low, high)
            errors[row - start] = (rest[row] - values[row] * scales) / factor[row, row]
            rest[row + 1 : end] -= np.outer(factor[row, row + 1 : end], errors[row - start])
        rest[end:] -= factor[start:end, end:].T @ errors
    return values.astype(np.int8)


def _limits(values: Float32) -> tuple[Float32, Float32]:
    """Lowest and highest values of the row after an even one, of the same shape as its values."""
    low = np.maximum(-LARGEST, np.maximum(-values, 0) - LARGEST_PAIR)
    high = np.minimum(LARGEST, LARGEST_PAIR - np.maximum(values, 0))
    return low, high
