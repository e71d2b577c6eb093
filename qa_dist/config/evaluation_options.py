"""Options of the evaluation: how logits become answers, and by whose rules these are scored."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qa_dist.config.answer_rules import AnswerNormalization
from qa_dist.config.option import option


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """From logits to answers."""

    decoding: Literal["span", "n_best"] = option(
        "span",
        "span searches all spans; n_best pairs the best starts and ends as the Hugging Face examples do",
    )
    n_best_size: int = option(20, "candidates kept per feature and answers per example", minimum=1, maximum=1000)
    max_answer_length: int = option(30, "longest answer, in tokens", minimum=1)
    answer_length_penalty: float = option(
        0.0,
        "what each token of an answer behind its first takes off its score, in logits; above 0, shorter answers win",
        minimum=0,
        maximum=100,
    )
    answer_normalization: AnswerNormalization = option(  # noqa: RUF009 - a field, as `optim` is
        "squad",
        "whose rules say which answers are the same and what F1 counts: those of the official scripts of SQuAD, XQuAD "
        "(the same), MLQA for a language, KorQuAD or CMRC 2018; none compares texts as they are, by words between "
        "blanks",
        fixed=True,
    )
    null_score_diff_threshold: float | None = option(
        None,
        "answer nothing when the null score beats the best span by more than this (with unanswerable questions); auto: "
        "as tuned for the model, else 0",
    )
    gather: Literal["candidates", "logits"] = option(
        "candidates", "what rank 0 collects: the best spans of each feature, or all logits (kept in logits.npy)"
    )
    eval_tokens_per_device: int | None = option(
        None,
        "tokens of one forward pass in evaluation, the same at every world size, so that scores are too; auto: 576 on "
        "CPU, 16384 on CUDA",
        minimum=16,
    )

    def problems(self) -> Iterable[str]:
        if self.null_score_diff_threshold is not None and math.isnan(self.null_score_diff_threshold):
            yield "--null_score_diff_threshold is nan; give a number"
        if self.answer_length_penalty and self.decoding == "n_best":
            yield (
                "--answer_length_penalty goes with --decoding span; n_best chooses as the Hugging Face examples do, "
                "without a penalty; drop one of the two"
            )

    @property
    def null_threshold(self) -> float:
        """Null odds above which there is no answer: 0 where nothing was chosen or tuned."""
        return 0.0 if self.null_score_diff_threshold is None else self.null_score_diff_threshold
