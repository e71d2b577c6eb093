"""The result of an evaluation, and the files it is written to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_dist.common.files import write_json
from qa_dist.common.notebook import ShownAsText
from qa_dist.evaluation.answers import Answers

Metrics = dict[str, float | int]


@dataclass(frozen=True, slots=True)
class Evaluation(ShownAsText):
    """The result of an evaluation.

    Attributes:
        metrics: scores in the official keys, among them `exact_match` and `f1`, and counts, among them `num_examples`;
            the same on all ranks. Counts alone if no example has references (`is_scored` says so), empty if only the
            loss was computed.
        loss: mean over the labelled features; None without any. The same on all ranks.
        answers: on rank 0, the answers; None elsewhere, or if only the loss was computed.
        normalization: name of the rules that the scores are by.
    """

    metrics: Metrics
    loss: float | None
    answers: Answers | None
    normalization: str = "squad"

    def __str__(self) -> str:
        """The figures in a line, as runs show them: "loss 1.2345, EM 67.89, F1 78.90"."""
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        if self.is_scored:
            parts += [f"EM {self.metrics['exact_match']:.2f}", f"F1 {self.metrics['f1']:.2f}"]
        if self.answers is not None:
            parts.append(f"{len(self.answers):,} questions answered")
        return ", ".join(parts)

    @property
    def named_metrics(self) -> dict[str, Any]:
        """The metrics, as files have them: behind `answer_normalization`, where there are scores."""
        return {**({"answer_normalization": self.normalization} if self.is_scored else {}), **self.metrics}

    @property
    def is_scored(self) -> bool:
        """Whether there are scores."""
        return "f1" in self.metrics


def write_results(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Write metrics.json, predictions.json, nbest.json and, with unanswerable questions, null_odds.json.

    Without these, a null_odds.json of earlier results is removed: it says of a folder that "no answer" was a choice.
    """
    answers = evaluation.answers
    if answers is None:
        raise ValueError("only rank 0 of a whole evaluation has results to write")
    files: dict[str, Any] = {
        "metrics.json": evaluation.named_metrics,
        "predictions.json": answers.predictions(),
        "nbest.json": {answer.id: [_nbest_entry(entry) for entry in answer.nbest] for answer in answers},
    }
    odds = answers.null_odds()
    if odds is not None:
        files["null_odds.json"] = odds
    else:
        (directory / "null_odds.json").unlink(missing_ok=True)
    for name, value in files.items():
        write_json(directory / name, value)
    return [directory / name for name in files]


def _nbest_entry(entry: Any) -> dict[str, Any]:
    return {
        "text": entry.text,
        "score": entry.score,
        "probability": entry.probability,
        "start_char": entry.start_char,
        "end_char": entry.end_char,
    }
