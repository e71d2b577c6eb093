"""From the answers of an evaluation to the threshold and the temperature that suit the model, and what these bring.

The null threshold comes first, by the rule of evaluate-v2.0.py; the temperature is fitted to the answers that follow,
and is kept where it makes their probabilities truer.

Shapes: E examples with known references, W entries of an n-best list.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qa_dist.common.arrays import Bools, Int64
from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig, EvaluationConfig
from qa_dist.evaluation.answers import Answers
from qa_dist.evaluation.calibration import Choices, agreement, kept_temperature
from qa_dist.evaluation.loop import best_scores, known_references
from qa_dist.evaluation.normalization import Normalization, normalization
from qa_dist.evaluation.scoring import f1_of_silence, percent, question_scores
from qa_dist.features.store import FeatureStore
from qa_dist.model.calibration import Calibration

Part = Literal["all", "half"]

FEWEST_QUESTIONS = 100
FEWEST_OF_A_KIND = 30
"""Least number of questions with known answers that are tuned on, and of those with and without an answer.

Below 30, `qa-dist analyze` warns of a score as well.
"""

_LARGEST = float(np.finfo(np.float32).max)


def in_tuned_half(context: str) -> bool:
    """Whether questions about a context belong to the half that `--tune_on half` tunes on: as its SHA-256 says.

    So all questions about a context are on the same side, in any data set and any order, without a seed.
    """
    return hashlib.sha256(context.encode()).digest()[0] % 2 == 0


def require_enough(store: FeatureStore, part: Part, *, version_2: bool) -> None:
    """Refuse data on which nothing can be tuned, before anything is computed.

    Raises:
        DataError: There are too few questions, or with `version_2` too few of either kind.
    """
    is_known_E, is_tuned_E = store.has_references, _tuned(store.contexts, part)
    for is_part_E, which in _parts(is_known_E & is_tuned_E, is_known_E & ~is_tuned_E, part):
        texts = [store.answer_texts(index) for index in np.flatnonzero(is_part_E).tolist()]
        _require_enough(texts, which, version_2=version_2)


def _parts(tuned_E: Bools, others_E: Bools, part: Part) -> list[tuple[Bools, str]]:
    if part == "all":
        return [(tuned_E, "the data")]
    return [(tuned_E, "the half that is tuned on"), (others_E, "the other half")]


def _require_enough(references: Sequence[Sequence[str]], which: str, *, version_2: bool) -> None:
    if len(references) < FEWEST_QUESTIONS:
        raise DataError(
            f"{which} has {len(references):,} questions whose answers are known, and at least {FEWEST_QUESTIONS} are "
            "needed to tune on; give more"
        )
    num_unanswerable = sum(not texts for texts in references)
    fewest = min(num_unanswerable, len(references) - num_unanswerable)
    if version_2 and fewest < FEWEST_OF_A_KIND:
        raise DataError(
            f"{which} has {num_unanswerable:,} questions without an answer among {len(references):,}, and a threshold "
            f"is tuned on at least {FEWEST_OF_A_KIND} of either kind; give other data, or fit the temperature alone "
            "with --version_2_with_negative false"
        )


def _tuned(contexts: Sequence[str], part: Part) -> Bools:
    if part == "all":
        return np.ones(len(contexts), bool)
    halves = {context: in_tuned_half(context) for context in set(contexts)}
    return np.array([halves[context] for context in contexts], bool)


def tuned(
    answers: Answers,
    store: FeatureStore,
    data: DataConfig,
    evaluation: EvaluationConfig,
    *,
    part: Part,
    version_2: bool,
    keeps_threshold: bool = False,
) -> Calibration:
    """What suits a model, found on its answers to the questions of a store.

    Args:
        answers: what the model answered, with the candidates that it chose from.
        store: the questions, with their references.
        data: where they come from, which the report names.
        evaluation: the rules of scoring, and the threshold by which the answers were chosen.
        part: on all questions, or on those about one half of the contexts, with a report on the other.
        version_2: whether the null answer is a choice, and so a threshold is tuned.
        keeps_threshold: the threshold of `evaluation` stays, as somebody has chosen it.

    Raises:
        DataError: There is too little to tune on.
    """
    require_enough(store, part, version_2=version_2 and not keeps_threshold)
    rules, references = normalization(evaluation.answer_normalization), known_references(store)
    kept = np.flatnonzero(store.has_references)
    scored = _Scored(answers.only(kept), references, rules, version_2=version_2)
    is_tuned_E = _tuned(scored.answers.contexts, part)
    is_reported_E = is_tuned_E if part == "all" else ~is_tuned_E
    in_force = evaluation.null_threshold
    threshold = None
    if version_2 and not keeps_threshold:
        threshold = scored.best_threshold(is_tuned_E)
    used = in_force if threshold is None else threshold
    after = scored.choices(used)
    temperature, not_kept = kept_temperature(after.only(is_tuned_E))
    errors = _errors(after.only(is_reported_E), temperature)
    if not_kept is not None:
        errors["not_kept"] = not_kept
    report: dict[str, Any] = {"calibration": errors, "null_threshold": None}
    if version_2:
        report["null_threshold"] = {
            "before": scored.at(in_force, is_reported_E),
            "after": scored.at(used, is_reported_E),
        }
        if keeps_threshold:
            report["null_threshold"]["is_chosen"] = True
    name = os.path.basename(os.path.normpath(data.validation_file or data.source))
    named = {"data": name, "split": "validation", "fingerprint": store.fingerprint}
    return Calibration(
        temperature=temperature,
        null_score_diff_threshold=threshold,
        answer_normalization=rules.name,
        tuned_on={**named, "part": part, **scored.counts(is_tuned_E)},
        reported_on={**named, "part": "all" if part == "all" else "other half", **scored.counts(is_reported_E)},
        report=report,
    )


def _errors(choices: Choices, temperature: float) -> dict[str, Any]:
    """How well confidences agree with exact match, before and after a temperature."""
    return {
        when: agreement(choices.confidence(each), choices.right_E)
        for when, each in (("before", 1.0), ("after", temperature))
    }


class _Scored:
    """Answers whose references are known, as they would be with other thresholds.

    Attributes:
        answers: the answers to E examples.
    """

    def __init__(
        self, answers: Answers, references: Mapping[str, Sequence[str]], rules: Normalization, *, version_2: bool
    ) -> None:
        self.answers = answers
        self._references, self._rules, self._version_2 = references, rules, version_2

    def best_threshold(self, is_tuned_E: Bools) -> float | None:
        """A threshold that decides some questions as the official `best_f1_thresh` does; None where silence is best.

        The script's own is the null odds of the last question that it lets in. This one lies halfway to the odds of the
        first that it leaves out, so that no rounding, as of another batch, decides about the last one. Where nothing is
        better than no answer at all the script says 0, which is no such threshold: it lets in odds of 0 and less.
        """
        answers = self.answers.only(np.flatnonzero(is_tuned_E))
        references = {key: self._references[key] for key in answers.example_ids}
        found = best_scores(references, answers, self._rules)
        if found["best_f1"] <= f1_of_silence(references):
            return None
        last = np.float32(found["best_f1_thresh"])
        odds_E = np.array(answers.null_odds_E, np.float32)
        left_out_E = odds_E[(odds_E > last) & (odds_E < _LARGEST)]
        first = left_out_E.min() if len(left_out_E) else last + np.float32(2)
        middle = np.float32((float(last) + float(first)) / 2)
        return float(middle if last <= middle < first else last)

    def choices(self, threshold: float) -> Choices:
        """The entries that are the answers at a threshold, and which of them match exactly."""
        texts, chosen_E = self._chosen(threshold)
        exact, _ = self._scores(texts)
        is_entry_EW = np.arange(self.answers.score_EW.shape[1]) < self.answers.num_entries_E[:, None]
        # Where float32 overflowed, differences are still numbers.
        score_EW = np.clip(self.answers.score_EW.astype(np.float64), -_LARGEST, _LARGEST)
        right_E = np.array([exact[key] == 1 for key in self.answers.example_ids], bool)
        return Choices(np.where(is_entry_EW, score_EW, -np.inf), chosen_E, right_E)

    def at(self, threshold: float, is_part_E: Bools) -> dict[str, float]:
        """The official scores, in percent, of some questions at a threshold."""
        exact, f1 = self._scores(self._chosen(threshold)[0])
        keys = [self.answers.example_ids[row] for row in np.flatnonzero(is_part_E).tolist()]
        return {"threshold": threshold, "exact_match": percent(exact, keys), "f1": percent(f1, keys)}

    def counts(self, is_part_E: Bools) -> dict[str, int]:
        """How much is in some questions."""
        rows = np.flatnonzero(is_part_E).tolist()
        return {
            "num_questions": len(rows),
            "num_unanswerable": sum(not self._references[self.answers.example_ids[row]] for row in rows),
            "num_contexts": len({self.answers.contexts[row] for row in rows}),
        }

    def _scores(self, texts: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
        predictions = dict(zip(self.answers.example_ids, texts, strict=True))
        return question_scores(self._references, predictions, version_2=self._version_2, rules=self._rules)

    def _chosen(self, threshold: float) -> tuple[list[str], Int64]:
        """The texts and the entries of the answers at a threshold, as `answers.choose` takes them."""
        answers = self.answers
        if answers.null_odds_E is None:
            return answers.texts, answers.chosen_E
        has_text_EW = answers.end_char_EW > answers.start_char_EW
        is_entry_EW = np.arange(has_text_EW.shape[1]) < answers.num_entries_E[:, None]
        null_E = ((answers.start_char_EW < 0) & is_entry_EW).argmax(axis=1)
        is_null_E = (answers.null_odds_E > threshold) | ~has_text_EW.any(axis=1)
        best = list(answers.best_texts().values())
        texts = ["" if is_null else text for is_null, text in zip(is_null_E.tolist(), best, strict=True)]
        return texts, np.where(is_null_E, null_E, has_text_EW.argmax(axis=1))
