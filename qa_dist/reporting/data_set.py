"""A data set as its model gets it: counts, lengths in tokens, and the best scores that any model could reach.

Shapes: N features, E examples.
"""

from collections import Counter
from typing import Any

import numpy as np

from qa_dist.common.arrays import Int64
from qa_dist.config.options import RunConfig
from qa_dist.data.records import Example
from qa_dist.evaluation.ceiling import REASONS, Budget, reaches, summed
from qa_dist.evaluation.limits import unknown_token, unknown_token_share
from qa_dist.evaluation.normalization import normalization
from qa_dist.features.building import may_lack_answers
from qa_dist.features.store import FeatureStore
from qa_dist.reporting.slices import question_word

LOST_TO_NORMALIZATION = "lost_to_normalization"
WHY_NOT = {**REASONS, LOST_TO_NORMALIZATION: "are nothing in their normal form, so that no answer has an F1"}
"""Why a question's best scores are not both 100, by the name that --json has for it."""

EXAMPLES_OF_A_REASON = 5

LENGTHS = {"question": "questions", "context": "contexts", "answer": "answers", "feature": "features"}
"""Whose lengths in tokens are told, and what they are called."""

QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}

_MAX_BINS = 12


def data_set_view(store: FeatureStore, tokenizer: Any, config: RunConfig) -> dict[str, Any]:
    """What is to be known of a split, as JSON types.

    Args:
        store: The examples and their features.
        tokenizer: What made them.
        config: Its evaluation options decide the ceiling.
    """
    lengths = token_lengths(store, int(tokenizer.num_special_tokens_to_add(pair=True)))
    num_answers = [len(store.references(index) or ()) for index in range(store.num_examples)]
    windows = np.bincount(store.example_index, minlength=store.num_examples)
    words = Counter(question_word(Example(id="", question=question, context="")) for question in store.questions)
    num_known = int(store.has_references.sum())
    spec = store.ingredients
    return {
        "num_examples": store.num_examples,
        "num_contexts": len(set(store.contexts)),
        "num_features": store.num_features,
        "num_tokens": int(store.lengths.sum()),
        "num_without_references": store.num_examples - num_known,
        "num_unanswerable": store.num_unanswerable,
        "unanswerable_share": store.num_unanswerable / max(1, num_known),
        "num_truncated_questions": store.stats.num_truncated_questions,
        "num_unlabelled_examples": store.stats.num_unlabelled_examples,
        "max_seq_length": spec["max_seq_length"],
        "doc_stride": spec["doc_stride"],
        "answers_per_question": _counts(num_answers),
        "windows_per_example": _counts(windows.tolist()),
        "lengths": {name: distribution(values) for name, values in lengths.items()},
        "question_words": dict(words.most_common()),
        "unknown_token": unknown_token(tokenizer) or "none",
        "unknown_token_share": unknown_token_share(store, tokenizer),
        "ceiling": ceiling_view(store, config),
    }


def token_lengths(store: FeatureStore, num_special_tokens: int) -> dict[str, Int64]:
    """Lengths in tokens, int64: of each `question`, different `context`, label (`answer`) and `feature`.

    Questions count as far as they were not cut. The label of an example is that of its first window that has one;
    examples without any are left out.
    """
    example_N = store.example_index
    windows_E = np.bincount(example_N, minlength=store.num_examples)
    context_E = np.bincount(example_N, store.context_length, store.num_examples).astype(np.int64)
    # Every window but the first has the last tokens of the one before once more.
    context_E -= (windows_E - 1) * int(store.ingredients["doc_stride"])
    first_E = np.unique(example_N, return_index=True)[1]
    question_E = (store.lengths - store.context_length - num_special_tokens)[first_E].astype(np.int64)
    context_rows = list({context: row for row, context in reversed(list(enumerate(store.contexts)))}.values())
    labelled = np.flatnonzero(store.is_labelled & (store.start_token != store.cls_token))
    labelled = labelled[np.unique(example_N[labelled], return_index=True)[1]]
    answer = (store.end_token - store.start_token)[labelled].astype(np.int64) + 1
    return {
        **{"question": question_E, "context": context_E[context_rows], "answer": answer},
        **{"feature": store.lengths.astype(np.int64)},
    }


def distribution(values: Int64) -> dict[str, Any]:
    """Number, mean, extremes, quantiles and histogram of whole numbers; of none, their number alone.

    A quantile is a value that occurs: the smallest that so large a share does not exceed.
    """
    if not len(values):
        return {"n": 0}
    least, most = int(values.min()), int(values.max())
    ends = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return {
        **{"n": len(values), "mean": float(values.mean()), "min": least, "max": most},
        **{name: int(end) for name, end in zip(QUANTILES, ends, strict=True)},
        "histogram": _histogram(values, least, most),
    }


def _histogram(values: Int64, least: int, most: int) -> list[dict[str, int]]:
    """Counts in at most twelve equal bins of 1, 2, 5, 10, 20, ... numbers, both ends included."""
    sizes = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    size = next(size for size in sizes if most // size - least // size < _MAX_BINS)
    counts = np.bincount(values // size - least // size).tolist()
    starts = [(least // size + place) * size for place in range(len(counts))]
    return [{"first": start, "last": start + size - 1, "n": count} for start, count in zip(starts, counts, strict=True)]


def _counts(values: list[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def ceiling_view(store: FeatureStore, config: RunConfig) -> dict[str, Any] | None:
    """The best scores, why they are not 100, and a few examples of each reason; None where no answers are known.

    `reasons` counts questions by reason: those that cannot be answered exactly, and those that can and still have no
    F1 of 100. `examples` has the first few of each. `num_unsearched` counts questions that stand for answered exactly
    because the budget of `ceiling` did not allow for them.
    """
    evaluation = config.evaluation
    budget = Budget()
    found = list(
        reaches(
            store,
            normalization(evaluation.answer_normalization),
            max_answer_length=evaluation.max_answer_length,
            version_2=may_lack_answers(config.data, [store]),
            budget=budget,
        )
    )
    best = summed(found)
    if best is None:
        return None
    by_reason: dict[str, list[dict[str, Any]]] = {name: [] for name in WHY_NOT}
    counts: Counter[str] = Counter()
    for reach in found:
        reason = reach.reason or (LOST_TO_NORMALIZATION if reach.f1 < 1 else None)
        if reason is None:
            continue
        counts[reason] += 1
        if len(by_reason[reason]) < EXAMPLES_OF_A_REASON:
            by_reason[reason].append(_example(store, reach.example_index, reach.f1))
    return {
        "exact_match": best.exact_match,
        "f1": best.f1,
        "num_examples": best.num_examples,
        "num_unsearched": budget.num_unsearched,
        "max_answer_length": evaluation.max_answer_length,
        "answer_normalization": evaluation.answer_normalization,
        "reasons": {name: counts[name] for name in WHY_NOT if counts[name]},
        "examples": {name: examples for name, examples in by_reason.items() if examples},
    }


def _example(store: FeatureStore, index: int, f1: float) -> dict[str, Any]:
    references = store.references(index) or []
    return {
        "id": store.example_ids[index],
        "question": store.questions[index],
        "answers": list(dict.fromkeys(text for text, _ in references)),
        "best_f1": 100 * f1,
    }
