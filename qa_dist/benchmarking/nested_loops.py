"""Decoding and scoring by nested loops, as the usual recipe does them, to compare with.

Written from the descriptions of `postprocess_qa_predictions` in the Hugging Face examples and of evaluate-v1.1.py, and
lighter than those: no probabilities and no lists of n best answers are made.
"""

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Offsets = Sequence[Sequence[int] | None]
Logits = npt.NDArray[np.float32]


def nested_loop_answers(
    example_ids: Sequence[str],
    contexts: Sequence[str],
    feature_examples: Sequence[int],
    offsets: Sequence[Offsets],
    start_logits: Sequence[Logits],
    end_logits: Sequence[Logits],
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> dict[str, str]:
    """The answers by loops over examples, windows, starts and ends.

    Args:
        example_ids: Id of every example.
        contexts: Context of every example.
        feature_examples: The example of every feature.
        offsets: For every feature, start and end character of each token; None for tokens outside the context.
        start_logits: For every feature, a logit per token; there may be more of them, for padding.
        end_logits: As `start_logits`.
        n_best_size: Starts and ends looked at per feature.
        max_answer_length: Longest answer, in tokens.
    """
    features_of: dict[int, list[int]] = collections.defaultdict(list)
    for index, example_index in enumerate(feature_examples):
        features_of[example_index].append(index)
    texts = {}
    for example_index, indices in features_of.items():
        spans: list[dict[str, Any]] = []
        for index in indices:
            places = offsets[index]
            for start in np.argsort(start_logits[index])[-1 : -n_best_size - 1 : -1].tolist():
                for end in np.argsort(end_logits[index])[-1 : -n_best_size - 1 : -1].tolist():
                    if start >= len(places) or end >= len(places):
                        continue
                    first, last = places[start], places[end]
                    if first is None or last is None:
                        continue
                    if start <= end < start + max_answer_length:
                        score = start_logits[index][start] + end_logits[index][end]
                        spans.append({"offsets": (first[0], last[1]), "score": score})
        spans.sort(key=lambda entry: float(entry["score"]), reverse=True)
        begin, end = spans[0]["offsets"] if spans else (0, 0)
        texts[example_ids[example_index]] = contexts[example_index][begin:end]
    return texts


def nested_loop_scores(references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1 by loops that normalise both texts anew for each comparison."""

    def normal(text: str) -> str:
        kept = "".join(char for char in text.lower() if char not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

    def f1_of(gold: str, text: str) -> float:
        gold_words, words = normal(gold).split(), normal(text).split()
        same = sum((collections.Counter(gold_words) & collections.Counter(words)).values())
        if same == 0:
            return 0.0
        return 2 * (same / len(words)) * (same / len(gold_words)) / (same / len(words) + same / len(gold_words))

    exact = f1 = 0.0
    for key, text in predictions.items():
        exact += max(normal(gold) == normal(text) for gold in references[key])
        f1 += max(f1_of(gold, text) for gold in references[key])
    return {"exact_match": 100.0 * exact / len(predictions), "f1": 100.0 * f1 / len(predictions)}
