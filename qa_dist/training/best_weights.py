"""Which evaluation of a run is the best so far: its weights are kept, and a run without a new best may end early."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qa_dist.common.files import write_json
from qa_dist.config.options import RunConfig
from qa_dist.evaluation.results import Evaluation
from qa_dist.model.saved import save_trained
from qa_dist.model.span_model import SpanModel, Weights
from qa_dist.training.run_state import BestScore

_RULES = ", answered by "
"""What stands in a measure before the rules for answers."""


def measure_of(config: RunConfig, validation: str, *, version_2: bool) -> str:
    """What evaluations during a run are compared by: a metric, on which features, and by which rules for answers.

    The normalisation of answers is not among these, as it is the same for the whole of a run.

    Args:
        config: The run's configuration.
        validation: Fingerprint of the validation features.
        version_2: Whether the null answer is a choice.
    """
    data, metric, evaluation = config.data, config.training.metric_for_best_model, config.evaluation
    if data.max_eval_features is not None:
        return f"loss of {data.max_eval_features} features of {validation}, drawn by {data.subset_seed}"
    if metric == "loss":
        return f"{metric} of {validation}"
    search = f"{evaluation.decoding} of {evaluation.n_best_size}, at most {evaluation.max_answer_length} tokens"
    null = f", null above {evaluation.null_threshold}" if version_2 else ""
    return f"{metric} of {validation}{_RULES}{search} less {evaluation.answer_length_penalty} each{null}"


class BestWeights:
    """The best evaluation of a run so far, with the weights it was made of; the same on all ranks.

    Attributes:
        score: what makes it the best, and its step; None before the first evaluation.
        weights: the trained tensors at that step; None before the first evaluation.
        evaluation: the evaluation; None before the first one, and after a resume until there is a better one.
        evaluations_without_best: how many in a row have not been better.
    """

    def __init__(self, metric: str, *, patience: int | None = None) -> None:
        """Compare by `metric`: f1, exact_match or loss; by the loss where an evaluation has no such metric.

        Args:
            metric: What evaluations are compared by.
            patience: Evaluations in a row without a new best after which the run ends; None: it never does.
        """
        self.score: BestScore | None = None
        self.weights: Weights | None = None
        self.evaluation: Evaluation | None = None
        self.evaluations_without_best = 0
        self._metric = metric
        self._patience = patience
        self._measure: str | None = None

    def measure_by(self, measure: str) -> str | None:
        """Evaluations measure this from here on; what is to be said, if a best one of another kind is dropped."""
        self._measure = measure
        # Checkpoints of earlier versions name no rules, or no measure at all.
        if self.score is None or self.score.measure in (None, measure, measure.partition(_RULES)[0]):
            return None
        self.forget()
        return "evaluations measure something else than before: the best weights so far are no longer compared with"

    def forget(self) -> None:
        """Begin anew, as before the first evaluation."""
        self.score = self.weights = self.evaluation = None
        self.evaluations_without_best = 0

    def offer(self, step: int, evaluation: Evaluation, weights: Callable[[], Weights]) -> bool:
        """Whether the evaluation after `step` steps is better than all before; if so, it and its weights are kept.

        Args:
            step: Optimiser steps done.
            evaluation: Their result. An equal one is not better: of several, the earliest is kept.
            weights: Copies the trained tensors. Called, on all ranks alike, only if the evaluation is better.
        """
        is_by_loss = self._metric == "loss" or self._metric not in evaluation.metrics
        if is_by_loss and evaluation.loss is None:
            # Of the features that were chosen, none is labelled.
            return False
        value = -(evaluation.loss or 0.0) if is_by_loss else float(evaluation.metrics[self._metric])
        # A loss that is NaN is never an improvement.
        if math.isnan(value) or (self.score is not None and value <= self.score.value):
            self.evaluations_without_best += 1
            return False
        self.evaluations_without_best = 0
        self.score, self.weights, self.evaluation = BestScore(value, step, self._measure), weights(), evaluation
        return True

    def go_on_from(self, score: BestScore | None, weights: Weights | None, evaluations_without_best: int) -> None:
        """Take over what a checkpoint holds."""
        self.evaluations_without_best = evaluations_without_best
        self.score, self.weights, self.evaluation = score, weights, None

    @property
    def has_stopped_improving(self) -> bool:
        """Whether there has been no new best for so many evaluations that the run ends; the same on all ranks."""
        return self._patience is not None and self.evaluations_without_best >= self._patience

    def write(self, model: SpanModel, tokenizer: Any, directory: Path) -> None:
        """Write the best model so far into a folder of its own, on rank 0."""
        if self.score is None or self.weights is None or self.evaluation is None:
            raise ValueError("nothing has been evaluated")
        directory.mkdir(exist_ok=True)
        save_trained(model, self.weights, tokenizer, directory)
        figures = {"step": self.score.step, "loss": self.evaluation.loss, **self.evaluation.named_metrics}
        write_json(directory / "metrics.json", figures)
