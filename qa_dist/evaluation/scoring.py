"""Exact match and F1 as the official SQuAD v1.1 and v2.0 scripts compute them, to the last digit.

Sources: evaluate-v1.1.py and evaluate-v2.0.py of Rajpurkar et al. (2016, 2018); for other `rules` than SQuAD's, the
scripts that `normalization` names, which count as evaluate-v1.1.py does. No other script knows unanswerable questions:
with other rules, these are scored as evaluate-v2.0.py does. The scores are the scripts'; the differences are what
happens around them:

- A missing prediction, a prediction for an unknown question and an id that occurs twice are errors. The v1.1 script
  scores missing ones 0, the v2.0 script leaves them out of its totals (and fails if the question has an answer).
- Scores are added one by one, in the order of the references. `sum` of Python 3.12 and later compensates for rounding,
  so the v2.0 script itself gives other last digits there than on the Python versions that published scores come from.

This module needs the standard library alone, so that scoring starts at once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from qa_dist.common.errors import ScoringError
from qa_dist.evaluation.normalization import SQUAD, Normalization

Scores = dict[str, float | int]


def score_v1(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    allow_missing: bool = False,
    rules: Normalization = SQUAD,
) -> Scores:
    """`exact_match` and `f1` in percent, as evaluate-v1.1.py gives them.

    Args:
        references: the reference answers of each question; at least one each.
        predictions: the predicted text for each question.
        allow_missing: score questions without a prediction 0 instead of refusing.
        rules: what counts as the same.

    Raises:
        ScoringError: references and predictions do not belong together.
    """
    exact, f1 = question_scores(references, predictions, version_2=False, allow_missing=allow_missing, rules=rules)
    return {"exact_match": percent(exact, references), "f1": percent(f1, references)}


def score_v2(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    null_odds: Mapping[str, float] | None = None,
    na_prob_thresh: float = 1.0,
    allow_missing: bool = False,
    rules: Normalization = SQUAD,
) -> Scores:
    """The scores of evaluate-v2.0.py, under its keys and in its order.

    `exact`, `f1`, `total`; the same with the prefix `HasAns_` over the answerable and `NoAns_` over the unanswerable
    questions, where there are any; given `null_odds`, also `best_exact`, `best_exact_thresh`, `best_f1` and
    `best_f1_thresh`: the best scores that a threshold on them could reach, and these thresholds.

    Args:
        references: the reference answers of each question; none means unanswerable.
        predictions: the predicted text for each question; "" means no answer.
        null_odds: for each question, how likely it has no answer: a probability, a difference of scores, or any other
            number that grows with it. Among equal odds their order here decides, as in the script.
        na_prob_thresh: a question whose null odds exceed this counts as predicted unanswerable, whatever its
            prediction; without `null_odds`, all odds are 0.
        allow_missing: score questions without a prediction 0 instead of refusing.
        rules: what counts as the same.

    Raises:
        ScoringError: references, predictions and null odds do not belong together.
    """
    exact, f1 = question_scores(references, predictions, version_2=True, allow_missing=allow_missing, rules=rules)
    if null_odds is not None:
        without_odds = [key for key in references if key in predictions and key not in null_odds]
        if without_odds:
            raise ScoringError(f"{counted(without_odds, 'predicted question')} without null odds; give odds for all.")
    has_answer = {key: bool(answers) for key, answers in references.items()}

    odds = null_odds or {}
    # The script turns the scores it overrides into floats; integers and floats add up to the same.
    called_null = [key for key in exact if odds.get(key, 0.0) > na_prob_thresh]
    final_exact = exact | {key: float(not has_answer[key]) for key in called_null}
    final_f1 = f1 | {key: float(not has_answer[key]) for key in called_null}

    scores: Scores = {}
    answerable = [key for key in references if has_answer[key]]
    unanswerable = [key for key in references if not has_answer[key]]
    for prefix, keys in (("", list(references)), ("HasAns_", answerable), ("NoAns_", unanswerable)):
        if keys:
            scores[f"{prefix}exact"] = percent(final_exact, keys)
            scores[f"{prefix}f1"] = percent(final_f1, keys)
            scores[f"{prefix}total"] = len(keys)
    if null_odds is not None:
        for name, raw in (("exact", exact), ("f1", f1)):
            best, threshold = _best_threshold(raw, predictions, null_odds, has_answer)
            scores[f"best_{name}"] = best
            scores[f"best_{name}_thresh"] = threshold
    return scores


def f1_of_silence(references: Mapping[str, Sequence[str]]) -> float:
    """F1 of no answer to any question, in percent: the share of those without a reference answer."""
    return 100 * sum(not answers for answers in references.values()) / len(references)


def question_scores(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    version_2: bool,
    allow_missing: bool = False,
    rules: Normalization = SQUAD,
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match and F1, from 0 to 1, of each question that has a prediction: what the official scores are means of.

    Args:
        references: the reference answers of each question.
        predictions: the predicted text for each question.
        version_2: score as evaluate-v2.0.py, where no reference means unanswerable, and not as evaluate-v1.1.py.
        allow_missing: leave questions without a prediction out instead of refusing.
        rules: what counts as the same.

    Raises:
        ScoringError: references and predictions do not belong together, or a question of v1.1 has no answer.
    """
    _check_ids(references, predictions, allow_missing)
    if version_2:
        golds = {key: matchable(texts, rules) for key, texts in references.items()}
        return _raw_scores(golds, predictions, rules, f1_of_empty=f1_of_no_answers)
    unanswerable = [key for key, answers in references.items() if not answers]
    if unanswerable:
        raise ScoringError(
            f"{counted(unanswerable, 'question')} without an answer cannot be scored as SQuAD v1.1; score as v2.0."
        )
    return _raw_scores(references, predictions, rules, f1_of_empty=no_f1)


def _check_ids(references: Mapping[str, object], predictions: Mapping[str, object], allow_missing: bool) -> None:
    if not references:
        raise ScoringError("there are no questions to score; check the reference file.")
    missing = [] if allow_missing else [key for key in references if key not in predictions]
    if missing:
        raise ScoringError(
            f"{counted(missing, 'question')} without predictions (--allow_missing scores them 0); check that both "
            "files are of the same data set."
        )


def unknown_predictions(
    references: Mapping[str, object], predictions: Mapping[str, object], what: str = "predictions"
) -> str | None:
    """A note on predictions for questions that are not asked, which the official scripts ignore; None without any."""
    unknown = [key for key in predictions if key not in references]
    return f"{what} for {counted(unknown, 'unknown question')} are ignored" if unknown else None


def counted(keys: Sequence[str], noun: str) -> str:
    """So many of something, with the first few ids."""
    listed = ", ".join(repr(key) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} {noun}{'s' if len(keys) != 1 else ''} ({listed})"


def percent(scores: Mapping[str, float], keys: Collection[str]) -> float:
    """The mean over questions, in percent; those without a score count 0. Added in order, as the scripts do."""
    total: float = 0
    for key in keys:
        total += scores.get(key, 0)
    return 100.0 * total / len(keys)


def matchable(texts: Sequence[str], rules: Normalization) -> list[str]:
    """The references that v2.0 compares with: one that is all punctuation and articles counts as no answer at all."""
    return [text for text in texts if rules.text(text)] or [""]


F1OfEmpty = Callable[[Sequence[str], Sequence[str]], float]
"""F1 of the units of a reference and of a prediction of which at least one has none."""


def no_f1(gold_units: Sequence[str], predicted_units: Sequence[str]) -> float:
    """v1.1: two texts without words have no word in common, although they match exactly."""
    return 0


def f1_of_no_answers(gold_units: Sequence[str], predicted_units: Sequence[str]) -> float:
    """v2.0: no answer agrees with no answer and with nothing else."""
    return int(gold_units == predicted_units)


class Gold:
    """A reference answer in its normal form.

    Attributes:
        text: the normal form.
        units: what it consists of.
    """

    __slots__ = ("text", "units")

    def __init__(self, text: str, rules: Normalization) -> None:
        self.text = rules.text(text)
        self.units = rules.units(self.text)


def score_answer(
    golds: Sequence[Gold], prediction: str, rules: Normalization, f1_of_empty: F1OfEmpty
) -> tuple[float, float]:
    """Exact match and F1 of a prediction, from 0 to 1, each the best over the reference answers."""
    predicted = rules.text(prediction)
    predicted_units = rules.units(predicted)
    exact: float = 0
    f1: float = 0
    for gold in golds:
        is_same = gold.text == predicted
        if is_same and gold.units:
            return 1, 1
        exact = max(exact, int(is_same))
        if gold.units and predicted_units:
            f1 = max(f1, _f1(gold.units, predicted_units, rules))
        else:
            f1 = max(f1, f1_of_empty(gold.units, predicted_units))
    return exact, f1


def _raw_scores(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    rules: Normalization,
    f1_of_empty: F1OfEmpty,
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match and F1 of each question that has a prediction."""
    exact: dict[str, float] = {}
    f1: dict[str, float] = {}
    # Annotators agree more often than not, so most reference texts occur several times, next to each other.
    seen: dict[str, Gold] = {}
    for key, texts in references.items():
        text = predictions.get(key)
        if text is None:
            continue
        golds = []
        for gold in dict.fromkeys(texts):
            if gold not in seen:
                seen[gold] = Gold(gold, rules)
            golds.append(seen[gold])
        exact[key], f1[key] = score_answer(golds, text, rules, f1_of_empty)
    return exact, f1


def _f1(gold_units: Sequence[str], predicted_units: Sequence[str], rules: Normalization) -> float:
    num_same = rules.num_common(gold_units, predicted_units)
    if num_same == 0:
        return 0
    precision = num_same / len(predicted_units)
    recall = num_same / len(gold_units)
    return (2 * precision * recall) / (precision + recall)


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    has_answer: Mapping[str, bool],
) -> tuple[float, float]:
    """The best score in percent that a threshold on the null odds could reach, and this threshold.

    Starts from "no question has an answer" and lets the predictions in, those with the lowest odds first.
    """
    current: float = sum(not has_answer[key] for key in scores)
    best, threshold = current, 0.0
    for key in sorted(null_odds, key=null_odds.__getitem__):
        if key not in scores:
            continue
        if has_answer[key]:
            current += scores[key]
        elif predictions[key]:
            current -= 1
        if current > best:
            best, threshold = current, null_odds[key]
    return 100.0 * best / len(has_answer), threshold


def metric_path() -> str:
    """The directory to give to `evaluate.load` for these scores as a metric, without a network."""
    return str(Path(__file__).parent / "metrics" / "qa_dist_squad")
