"""Official scores of questions that come one by one: running sums instead of all predictions at once.

A `QuestionScore` is made wherever a question is answered. `RunningScores` adds them up in the order of the questions,
so that the totals are those of `scoring` to the last digit, and its state is a few numbers that a run can go on from.
Whether SQuAD v1.1 or v2.0 is meant may be known only at the end, so the sums of both are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.scoring import Gold, Scores, f1_of_no_answers, matchable, no_f1, score_answer


class QuestionScore(NamedTuple):
    """Scores of one prediction, from 0 to 1.

    Attributes:
        has_answer: Whether there is a reference answer.
        exact_v1: Exact match as evaluate-v1.1.py has it; 0 without a reference.
        f1_v1: F1 likewise.
        exact_v2: Exact match as evaluate-v2.0.py has it.
        f1_v2: F1 likewise.
    """

    has_answer: bool
    exact_v1: float
    f1_v1: float
    exact_v2: float
    f1_v2: float


def score_question(references: Sequence[str], prediction: str, rules: Normalization) -> QuestionScore:
    """The scores of a prediction against the texts of the reference answers; "" is the prediction of no answer."""
    texts = list(dict.fromkeys(references))
    golds = [Gold(text, rules) for text in texts]
    exact_v1, f1_v1 = score_answer(golds, prediction, rules, no_f1)
    golds = [Gold(text, rules) for text in matchable(texts, rules)]
    exact_v2, f1_v2 = score_answer(golds, prediction, rules, f1_of_no_answers)
    return QuestionScore(bool(texts), exact_v1, f1_v1, exact_v2, f1_v2)


@dataclass
class RunningScores:
    """Sums over the questions so far. The sums of those with and without answers are v2.0's."""

    num_answerable: int = 0
    num_unanswerable: int = 0
    exact_v1: float = 0
    f1_v1: float = 0
    exact_v2: float = 0
    f1_v2: float = 0
    answerable_exact: float = 0
    answerable_f1: float = 0
    unanswerable_exact: float = 0
    unanswerable_f1: float = 0

    def add(self, score: QuestionScore) -> None:
        """Count the next question."""
        self.exact_v2 += score.exact_v2
        self.f1_v2 += score.f1_v2
        if score.has_answer:
            self.num_answerable += 1
            self.exact_v1 += score.exact_v1
            self.f1_v1 += score.f1_v1
            self.answerable_exact += score.exact_v2
            self.answerable_f1 += score.f1_v2
        else:
            self.num_unanswerable += 1
            self.unanswerable_exact += score.exact_v2
            self.unanswerable_f1 += score.f1_v2

    def state(self) -> dict[str, float]:
        """The sums as JSON has them; `RunningScores(**state)` goes on from them to the last bit."""
        return asdict(self)

    @property
    def num_questions(self) -> int:
        """How many were added."""
        return self.num_answerable + self.num_unanswerable

    def scores(self) -> Scores:
        """What `score_v1` gives, or `score_v2` without null odds if a question has no answer; empty without any."""
        if not self.num_questions:
            return {}
        if not self.num_unanswerable:
            return _percent({"exact_match": self.exact_v1, "f1": self.f1_v1}, self.num_answerable)
        scores: Scores = {}
        for prefix, exact, f1, total in (
            ("", self.exact_v2, self.f1_v2, self.num_questions),
            ("HasAns_", self.answerable_exact, self.answerable_f1, self.num_answerable),
            ("NoAns_", self.unanswerable_exact, self.unanswerable_f1, self.num_unanswerable),
        ):
            if total:
                scores |= _percent({f"{prefix}exact": exact, f"{prefix}f1": f1}, total)
                scores[f"{prefix}total"] = total
        return scores


def _percent(sums: Mapping[str, float], total: int) -> Scores:
    return {name: 100.0 * value / total for name, value in sums.items()}
