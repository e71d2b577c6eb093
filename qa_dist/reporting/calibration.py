"""Whether answers are right as often as their probabilities say, and what makes it so: a temperature, a null threshold.

The *confidence* in an answer is the softmax of its score over the n-best list, the null answer included, with all
scores divided by a temperature (Guo et al. 2017, section 4.2). Here the temperature is the one for which the
confidences of the answers that were chosen are the likeliest, given which of them match exactly.

Shapes: E questions, W entries of an n-best list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.scoring import score_v2
from qa_dist.reporting.intervals import Float64, Int64
from qa_dist.reporting.systems import Candidates

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
    Wrong answers make the likelihood of one with several hills, so the best of a grid comes first, and then golden
    sections between its neighbours.
    """
    used = choices.only(np.isfinite(choices.score_EW).sum(axis=1) > 1)
    if not len(used.right_E):
        return 1.0
    below_EW = used.score_EW - used.score_EW.max(axis=1, keepdims=True)
    rows = np.arange(len(below_EW))

    def unlikelihood(log_temperature: float) -> float:
        """The negative logarithm of the likelihood."""
        weights_EW = np.exp(below_EW / np.exp(log_temperature))
        total_E = weights_EW.sum(axis=1)
        chosen_E = weights_EW[rows, used.chosen_E].copy()
        weights_EW[rows, used.chosen_E] = 0
        # Summed without the answer: what is left of 1 behind a confidence near it would be rounding.
        happened_E = np.where(used.right_E, chosen_E, weights_EW.sum(axis=1))
        return -float(np.log(np.maximum(happened_E, np.finfo(np.float64).tiny) / total_E).mean())

    grid = np.linspace(np.log(_LEAST), np.log(_MOST), _NUM_TRIED)
    best = int(np.argmin([unlikelihood(each) for each in grid]))
    low, high = float(grid[max(0, best - 1)]), float(grid[min(_NUM_TRIED - 1, best + 1)])
    while high - low > _TOLERANCE:
        first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if unlikelihood(first) <= unlikelihood(second):
            high = second
        else:
            low = first
    return float(np.exp((low + high) / 2))


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


def best_null_threshold(
    references: Mapping[str, Sequence[str]],
    candidates: Candidates,
    null_odds: Mapping[str, float],
    rules: Normalization,
) -> dict[str, float]:
    """`best_f1`, in percent, and `best_f1_thresh` by the rule of evaluate-v2.0.py, for `--null_score_diff_threshold`.

    The best answer of each question that is one is let in where its null odds do not exceed the threshold.

    Args:
        references: the reference answers of each question; none means unanswerable.
        candidates: n-best lists of the same questions.
        null_odds: score of the null answer minus score of the best other, of the same questions.
        rules: what counts as the same.

    Raises:
        ScoringError: The three are not of the same questions.
    """
    texts = {
        key: next((entry["text"] for entry in entries if entry["text"]), "") for key, entries in candidates.items()
    }
    scores = score_v2(references, texts, null_odds=null_odds, rules=rules)
    return {name: float(scores[name]) for name in ("best_f1", "best_f1_thresh")}


def calibration(
    keys: Sequence[str],
    texts: Mapping[str, str],
    right_E: npt.NDArray[np.bool_],
    context_E: Int64,
    candidates: Candidates,
) -> dict[str, Any] | None:
    """How well confidences agree with exact match, before and after a temperature; None without n-best lists.

    What is said of after is held out: the contexts are halved, and the answers about each half have the temperature
    that was fitted on the other. `temperature` is that of all.

    Args:
        keys: the ids of the questions, [E].
        texts: the answers; a question is counted if its answer is in its n-best list.
        right_E: whether they match exactly.
        context_E: the number of each question's context.
        candidates: the n-best lists.
    """
    lists, chosen, rows = [], [], []
    for row, key in enumerate(keys):
        entries = candidates.get(key, ())
        place = next((place for place, entry in enumerate(entries) if entry["text"] == texts.get(key)), None)
        if place is not None:
            lists.append([float(entry["score"]) for entry in entries])
            chosen.append(place)
            rows.append(row)
    if not rows:
        return None
    choices = Choices.of(lists, chosen, right_E[rows].tolist())
    after_E = np.empty(len(rows))
    is_even_E = context_E[rows] % 2 == 0
    for half_E in (is_even_E, ~is_even_E):
        if half_E.any():
            after_E[half_E] = choices.only(half_E).confidence(fitted_temperature(choices.only(~half_E)))
    return {
        "temperature": fitted_temperature(choices),
        "num_questions": len(rows),
        "before": _agreement(choices.confidence(), choices.right_E),
        "after": _agreement(after_E, choices.right_E),
    }


def _agreement(confidence_E: Float64, right_E: npt.NDArray[np.bool_]) -> dict[str, Any]:
    bins = reliability(confidence_E, right_E)
    return {
        "ece": calibration_error(bins),
        "adaptive_ece": calibration_error(reliability(confidence_E, right_E, adaptive=True)),
        "bins": [
            {"n": each.num_questions, "confidence": each.confidence, "exact_match": each.exact_match} for each in bins
        ],
    }
