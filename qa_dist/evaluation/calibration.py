"""Whether answers are right as often as their probabilities say, and the temperature that makes it so.

The *confidence* in an answer is the softmax of its score over the n-best list, the null answer included, with all
scores divided by a temperature (Guo et al. 2017, section 4.2). Here the temperature is the one for which the
confidences of the answers that were chosen are the likeliest, given which of them match exactly.

Shapes: E questions, W entries of an n-best list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Float64, Int64

NUM_BINS = 15
"""As Guo et al. (2017) have it."""

_LEAST, _MOST = 0.01, 100.0
"""Temperatures that are tried: where answers are nearly all right, or all wrong, the likeliest is 0 or infinite."""

_NUM_TRIED = 41
_TOLERANCE = 1e-6
_GOLDEN = (5**0.5 - 1) / 2


class Choices(NamedTuple):
    """Answers that were chosen from n-best lists.

    Attributes:
        score_EW: float64; -inf beyond the end of a list.
        chosen_E: int64, the entry that is the answer.
        right_E: bool, whether it matches exactly.
    """

    score_EW: Float64
    chosen_E: Int64
    right_E: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, lists: Sequence[Sequence[float]], chosen: Sequence[int], right: Sequence[bool]) -> "Choices":
        """The choices from lists of any lengths, none of them empty."""
        score_EW = np.full((len(lists), max(map(len, lists))), -np.inf)
        for row, scores in zip(score_EW, lists, strict=True):
            row[: len(scores)] = scores
        return cls(score_EW, np.array(chosen, np.int64), np.array(right, bool))

    def only(self, is_kept_E: npt.NDArray[np.bool_]) -> "Choices":
        """Those of some of the questions."""
        return Choices(self.score_EW[is_kept_E], self.chosen_E[is_kept_E], self.right_E[is_kept_E])

    def confidence(self, temperature: float = 1.0) -> Float64:
        """The probability of each answer, float64 [E]."""
        scaled = (self.score_EW - self.score_EW.max(axis=1, keepdims=True)) / temperature
        weights = np.exp(scaled)
        found: Float64 = weights[np.arange(len(weights)), self.chosen_E] / weights.sum(axis=1)
        return found


def fitted_temperature(choices: Choices) -> float:
    """The temperature that makes what happened likeliest, from 0.01 to 100.

    Answers from lists of a single entry have probability 1 at any temperature and are left out; 1 without any others.
    Wrong answers make the likelihood of one with several hills, of which a method that follows the gradient, as LBFGS
    does, climbs the nearest; so the best of a grid comes first, and then golden sections between its neighbours.
    """
    used = choices.only(np.isfinite(choices.score_EW).sum(axis=1) > 1)
    if not len(used.right_E):
        return 1.0
    below_EW = used.score_EW - used.score_EW.max(axis=1, keepdims=True)
    rows = np.arange(len(below_EW))

    def negative_log_likelihood(log_temperature: float) -> float:
        """Mean over the answers, in nats."""
        weights_EW = np.exp(below_EW / np.exp(log_temperature))
        total_E = weights_EW.sum(axis=1)
        chosen_E = weights_EW[rows, used.chosen_E].copy()
        weights_EW[rows, used.chosen_E] = 0
        # Summed without the answer: what is left of 1 behind a confidence near it would be rounding.
        happened_E = np.where(used.right_E, chosen_E, weights_EW.sum(axis=1))
        return -float(np.log(np.maximum(happened_E, np.finfo(np.float64).tiny) / total_E).mean())

    grid = np.linspace(np.log(_LEAST), np.log(_MOST), _NUM_TRIED)
    best = int(np.argmin([negative_log_likelihood(each) for each in grid]))
    low, high = float(grid[max(0, best - 1)]), float(grid[min(_NUM_TRIED - 1, best + 1)])
    while high - low > _TOLERANCE:
        first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if negative_log_likelihood(first) <= negative_log_likelihood(second):
            high = second
        else:
            low = first
    return float(np.exp((low + high) / 2))


def kept_temperature(choices: Choices) -> tuple[float, dict[str, float] | None]:
    """The temperature to keep for a model, and the fitted one where that is not kept: as JSON has it.

    The likeliest temperature is not always the one with the least expected calibration error. Where it does not lower
    that of the answers that it was fitted on, 1 is kept, as it makes probabilities no worse; and where it is the first
    or the last that is tried, as with an untrained model, as a likelier one would be beyond.

    Returns:
        The temperature; None, or the fitted `temperature` with the errors of the same answers `before` (with 1) and
        `after` (with it), in percent points, and with `is_at_end` (true) where it is the first or the last.
    """
    fitted = fitted_temperature(choices)
    if fitted == 1:
        return fitted, None
    before, after = (
        calibration_error(reliability(choices.confidence(each), choices.right_E)) for each in (1.0, fitted)
    )
    is_at_end = min(fitted / _LEAST, _MOST / fitted) < 1 + 10 * _TOLERANCE
    if after < before and not is_at_end:
        return fitted, None
    not_kept = {"temperature": fitted, "before": before, "after": after}
    return 1.0, {**not_kept, "is_at_end": True} if is_at_end else not_kept


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of like confidence.

    Attributes:
        num_questions: how many.
        confidence: their mean confidence, in percent.
        exact_match: how many match exactly, in percent.
    """

    num_questions: int
    confidence: float
    exact_match: float


def reliability(confidence_E: Float64, right_E: npt.NDArray[np.bool_], *, adaptive: bool = False) -> list[Bin]:
    """The answers in 15 bins: of equal width from 0 to 1 (a bin has its upper end), or of equally many answers.

    Empty bins are left out.
    """
    if adaptive:
        # Of equal confidences those stay together that NumPy keeps in their order.
        parts = np.array_split(np.argsort(confidence_E, kind="stable"), NUM_BINS)
    else:
        number_E = np.clip(np.ceil(confidence_E * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        parts = [np.flatnonzero(number_E == number) for number in range(NUM_BINS)]
    return [
        Bin(len(part), 100 * float(confidence_E[part].mean()), 100 * float(right_E[part].mean()))
        for part in parts
        if len(part)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error, in percent points: the mean of |confidence - exact match| over answers.

    Source: Naeini et al. (2015); with bins of equally many answers, Nguyen and O'Connor (2015).
    """
    total = sum(each.num_questions for each in bins)
    return sum(each.num_questions * abs(each.confidence - each.exact_match) for each in bins) / total


def agreement(confidence_E: Float64, right_E: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Both expected calibration errors, and the bins of equal width, in percent: as JSON has them."""
    bins = reliability(confidence_E, right_E)
    return {
        "ece": calibration_error(bins),
        "adaptive_ece": calibration_error(reliability(confidence_E, right_E, adaptive=True)),
        "bins": [
            {"n": each.num_questions, "confidence": each.confidence, "exact_match": each.exact_match} for each in bins
        ],
    }
