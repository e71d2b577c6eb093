"""SQuAD v1.1 and v2.0 scores as a metric module for the `evaluate` library.

    metric = evaluate.load(qa_dist.evaluation.scoring.metric_path())

`evaluate` copies this file into its cache and imports the copy, so it refers to qa_dist by its full name only.
"""

from typing import Any

import datasets
import evaluate

from qa_dist.common.errors import ScoringError
from qa_dist.evaluation.normalization import normalization
from qa_dist.evaluation.scoring import Scores, score_v1, score_v2

_DESCRIPTION = """
Exact match and F1 of the official SQuAD v1.1 and v2.0 scripts, from local files only: the inputs and the results are
those of the metrics `squad` and `squad_v2`. A prediction that is missing or repeated is an error.
"""

_INPUTS = """
Args:
    predictions: list of {'id', 'prediction_text'}; for v2.0 also 'no_answer_probability'.
    references: list of {'id', 'answers': {'text': [...], 'answer_start': [...]}}; 'answer_start' is not used.
    no_answer_threshold: v2.0 only: no-answer probability above which a question counts as unanswered (default 1.0).
    answer_normalization: whose rules say which answers are the same and what F1 counts: 'squad' (default), 'xquad',
        'mlqa:LANGUAGE' (ar, de, en, es, hi, vi, zh), 'korquad', 'cmrc', or 'none' for texts as they are.
Returns:
    v1.1: 'exact_match', 'f1'.
    v2.0: 'exact', 'f1', 'total', the same for 'HasAns_' and 'NoAns_' where there are such questions, and 'best_exact',
    'best_exact_thresh', 'best_f1', 'best_f1_thresh'.

The configuration 'squad' or 'squad_v2' fixes the version; without one, predictions with 'no_answer_probability' are
v2.0.
"""

_V1_PREDICTION = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
_V2_PREDICTION = {**_V1_PREDICTION, "no_answer_probability": datasets.Value("float32")}
_REFERENCE = {
    "id": datasets.Value("string"),
    "answers": datasets.Sequence({"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}),
}


_PREDICTIONS = {"default": _V2_PREDICTION, "squad": _V1_PREDICTION, "squad_v2": _V2_PREDICTION}


class QaDistSquad(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """The metric; see `_DESCRIPTION`."""

    def _info(self) -> Any:
        if self.config_name not in _PREDICTIONS:
            raise ValueError(f"the configuration must be one of {', '.join(_PREDICTIONS)}, not {self.config_name!r}.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": _PREDICTIONS[self.config_name], "references": _REFERENCE}),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference."""
        [prediction] = self._with_odds([prediction])
        super().add(prediction=prediction, reference=reference, **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and their references."""
        super().add_batch(predictions=self._with_odds(predictions), references=references, **kwargs)

    def _with_odds(self, predictions: Any) -> Any:
        # One set of columns serves both versions: `evaluate` fails to choose between sets that differ in a column.
        if self.config_name != "default" or predictions is None:
            return predictions
        return [{"no_answer_probability": None, **row} if isinstance(row, dict) else row for row in predictions]

    def _compute(
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        no_answer_threshold: float | None = None,
        answer_normalization: str = "squad",
    ) -> Scores:
        rules = normalization(answer_normalization)
        texts = _by_id(predictions, "prediction_text", "predictions")
        golds = {key: answers["text"] for key, answers in _by_id(references, "answers", "references").items()}
        given = {row["id"]: row.get("no_answer_probability") for row in predictions}
        odds = {key: value for key, value in given.items() if value is not None}
        if self.config_name == "squad_v2" or odds:
            if len(odds) < len(given):
                raise ScoringError(
                    f"{len(given) - len(odds)} of {len(given)} predictions have no no_answer_probability."
                )
            threshold = 1.0 if no_answer_threshold is None else no_answer_threshold
            return score_v2(golds, texts, null_odds=odds, na_prob_thresh=threshold, rules=rules)
        if no_answer_threshold is not None:
            raise ScoringError("no_answer_threshold is for SQuAD v2.0, but these are v1.1 predictions; leave it out.")
        return score_v1(golds, texts, rules=rules)


def _by_id(rows: list[dict[str, Any]], column: str, what: str) -> dict[str, Any]:
    values = {row["id"]: row[column] for row in rows}
    if len(values) != len(rows):
        raise ScoringError(f"{len(rows) - len(values)} {what} have the id of another; every id may occur once.")
    return values
