"""Other lengths and strides of windows: what they would cost and what could be reached, from one tokenisation.

The windows of a store, put together again, are its whole contexts as tokens; windows of any other length are cut from
those without tokenising anything anew. Shapes: E examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qa_dist.answering.terminal import Style
from qa_dist.common.arrays import Int32, Int64
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig
from qa_dist.evaluation.ceiling import Budget, Question, Reach, Window, reach_of, summed
from qa_dist.evaluation.normalization import normalization
from qa_dist.features.building import may_lack_answers
from qa_dist.features.store import FeatureStore
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureSpec, window_starts
from qa_dist.reporting.columns import aligned, bright

LENGTHS = (128, 192, 256, 320, 384, 512)
PARTS = (8, 4, 3)
"""Strides that are tried: an eighth, a quarter and a third of each length."""

TOLERANCE = 0.1
"""Points of EM and F1 that the suggested lengths may lie below the best ones."""


class _Texts(NamedTuple):
    """The tokens of every example, before windows are cut.

    Attributes:
        question_E: tokens of each question, not cut.
        offsets_E: the characters of each token of each context, int32 [C, 2]; examples of one context share them.
    """

    question_E: Int64
    offsets_E: Sequence[Int32]


def suggestions(
    store: FeatureStore, tokenizer: Any, config: RunConfig, lengths: Sequence[int] = LENGTHS
) -> list[dict[str, Any]]:
    """What each length and stride would cost and allow, those of the configuration among them, as JSON types.

    Each has `max_seq_length`, `doc_stride`, `num_features`, `num_tokens` (of an epoch, without padding), and
    `exact_match` and `f1` of the ceiling (None where no answers are known), and `num_unsearched`, questions that stand
    for answered exactly because the budget of `ceiling`, which each row has, did not allow for them; `is_configured`,
    and `is_suggested` for the one with the fewest tokens among those whose ceiling is at most `TOLERANCE` below the
    best.

    Args:
        store: The examples and their features.
        tokenizer: What made them.
        config: What made them, and what the ceiling depends on.
        lengths: Lengths to try; those that the tokenizer says its model cannot read are left out.
    """
    configured = (int(store.ingredients["max_seq_length"]), int(store.ingredients["doc_stride"]))
    num_special = int(tokenizer.num_special_tokens_to_add(pair=True))
    texts = _texts_of(store, tokenizer, num_special)
    whole: dict[int, Reach] = {}
    found = []
    tried = {(length, length // part) for length in lengths if length <= tokenizer.model_max_length for part in PARTS}
    for length, stride in sorted(tried | {configured}):
        spec = FeatureSpec(length, stride, config.data.max_question_length)
        try:
            longest = spec.longest_question(num_special)
        except ConfigError:
            # Too short for the questions that are asked for.
            continue
        question_E = np.minimum(texts.question_E, longest)
        capacity_E = length - num_special - question_E
        starts_E = [
            window_starts(capacity, stride, len(offsets))
            for capacity, offsets in zip(capacity_E.tolist(), texts.offsets_E, strict=True)
        ]
        windows_E = np.array([len(starts) for starts in starts_E], np.int64)
        context_E = np.array([len(offsets) for offsets in texts.offsets_E], np.int64)
        budget = Budget()
        best = summed(_reaches(store, config, texts.offsets_E, starts_E, capacity_E.tolist(), whole, budget))
        found.append(
            {
                **{"max_seq_length": length, "doc_stride": stride, "num_features": int(windows_E.sum())},
                "num_tokens": int((windows_E * (num_special + question_E + stride) + context_E - stride).sum()),
                "exact_match": best and best.exact_match,
                "f1": best and best.f1,
                "num_unsearched": budget.num_unsearched,
                "is_configured": (length, stride) == configured,
                "is_suggested": False,
            }
        )
    _mark_suggested(found)
    return found


def _texts_of(store: FeatureStore, tokenizer: Any, num_special: int) -> _Texts:
    places, stride = store.feature_map(), int(store.ingredients["doc_stride"])
    lengths = store.lengths - store.context_length - num_special
    first_E = np.unique(store.example_index, return_index=True)[1]
    bounds = [*first_E.tolist(), store.num_features]
    by_context: dict[str, Int32] = {}
    for example, context in enumerate(store.contexts):
        if context not in by_context:
            parts = [
                places.context_offsets_T2[slice(*places.first_offset_N1[feature : feature + 2].tolist())]
                for feature in range(bounds[example], bounds[example + 1])
            ]
            # Every window but the first begins with the last tokens of the one before.
            by_context[context] = np.concatenate([parts[0], *(part[stride:] for part in parts[1:])])
    question_E = lengths[first_E].astype(np.int64)
    if store.stats.num_truncated_questions:
        spec = FeatureSpec(*(store.ingredients[name] for name in ("max_seq_length", "doc_stride")))
        builder = FeatureBuilder(TokenizerSpec.of(tokenizer), spec)
        for example in np.flatnonzero(question_E == question_E.max()).tolist():
            question_E[example] = builder.question_length(store.questions[example])
    return _Texts(question_E, [by_context[context] for context in store.contexts])


def _reaches(
    store: FeatureStore,
    config: RunConfig,
    offsets_E: Sequence[Int32],
    starts_E: Sequence[range],
    capacity_E: Sequence[int],
    whole: dict[int, Reach],
    budget: Budget,
) -> Iterator[Reach]:
    """What every question with known references can reach; `whole` keeps those whose context is in one window."""
    evaluation = config.evaluation
    rules = normalization(evaluation.answer_normalization)
    version_2 = may_lack_answers(config.data, [store])
    for example, context in enumerate(store.contexts):
        references = store.references(example)
        if references is None:
            continue
        starts, offsets = starts_E[example], offsets_E[example]
        if len(starts) == 1 and example in whole:
            yield whole[example]
            continue
        parts = [offsets[start : start + capacity_E[example]] for start in starts]
        windows = [Window(part[:, 0], part[:, 1]) for part in parts]
        question = Question(context, references, windows, rules, evaluation.max_answer_length, version_2)
        num_unsearched = budget.num_unsearched
        reach = reach_of(question, example, budget)
        if len(starts) == 1 and budget.num_unsearched == num_unsearched:
            whole[example] = reach
        yield reach


def _mark_suggested(suggestions: Sequence[dict[str, Any]]) -> None:
    scored = [each for each in suggestions if each["f1"] is not None]
    if not scored:
        return
    least = {name: max(each[name] for each in scored) - TOLERANCE for name in ("exact_match", "f1")}
    fit = [each for each in scored if all(each[name] >= limit for name, limit in least.items())]
    # Of equal tokens fewer windows are the better ones. EM and F1 may have their best in different rows.
    if fit:
        min(fit, key=lambda each: (each["num_tokens"], each["num_features"]))["is_suggested"] = True


def suggestion_lines(weighed: Mapping[str, Any], style: Style) -> Iterator[str]:
    """The lines of what `suggestions` gives, under that name, with the `split`."""
    yield f"{weighed['split']}: windows, tokens without padding, and the best scores that any model could reach"
    rows: list[tuple[str, ...]] = [("--max_seq_length", "--doc_stride", "windows", "tokens", "EM", "F1", "")]
    for each in weighed["suggestions"]:
        scores = ["-" if each[name] is None else f"{each[name]:.2f}" for name in ("exact_match", "f1")]
        marks = ["as configured"] if each["is_configured"] else []
        marks += ["suggested"] if each["is_suggested"] else []
        counts = (f"{each[name]:,}" for name in ("max_seq_length", "doc_stride", "num_features", "num_tokens"))
        rows.append((*counts, *scores, ", ".join(marks)))
    heading, *lines = aligned(rows, left=(6,))
    yield heading
    for each, line in zip(weighed["suggestions"], lines, strict=True):
        yield bright(line, has_colours=style.has_colours) if each["is_suggested"] else line
    if bounded := [each["num_unsearched"] for each in weighed["suggestions"] if each["num_unsearched"]]:
        yield (
            f"in {len(bounded):,} of these rows up to {max(bounded):,} questions were not searched for their best "
            "answer, which would take long, and count as answered exactly: EM and F1 there are no more than a bound"
        )
    yield f"suggested: the fewest tokens with EM and F1 at most {TOLERANCE} below the best of this table"
