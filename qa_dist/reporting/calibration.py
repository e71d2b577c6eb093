"""Whether answers in files of results are right as often as they say, and the null threshold that would be best there.

Shapes: E questions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Int64
from qa_dist.evaluation.calibration import Choices, agreement, fitted_temperature
from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.scoring import f1_of_silence, score_v2
from qa_dist.reporting.systems import Candidates


def best_null_threshold(
    references: Mapping[str, Sequence[str]],
    candidates: Candidates,
    null_odds: Mapping[str, float],
    rules: Normalization,
) -> dict[str, float | None]:
    """`best_f1`, in percent, and `best_f1_thresh` by the rule of evaluate-v2.0.py, for `--null_score_diff_threshold`.

    The best answer of each question that is one is let in where its null odds do not exceed the threshold. Where
    nothing is better than no answer at all the script's threshold is 0, which would let answers in; here it is None.

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
    is_silent = scores["best_f1"] <= f1_of_silence(references)
    return {
        "best_f1": float(scores["best_f1"]),
        "best_f1_thresh": None if is_silent else float(scores["best_f1_thresh"]),
    }


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
        "before": agreement(choices.confidence(), choices.right_E),
        "after": agreement(after_E, choices.right_E),
    }
