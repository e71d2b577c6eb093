"""An example as it was read, its windows, and every token of them: plain values that `example_lines` writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qa_dist.common.errors import DataError
from qa_dist.config.texts import shown
from qa_dist.features.store import FeatureStore

_SPECIAL = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
"""What only templates put into features; unknown words and masks may be text."""

_FEW = 3


def chosen_features(store: FeatureStore, example_id: str | None, feature_index: int | None) -> list[int]:
    """The features that a user asked for: all of an example, or one by its number.

    Args:
        store: What they are of.
        example_id: The example; None: `feature_index` counts.
        feature_index: The feature, from 0.

    Raises:
        DataError: There is none.
    """
    if example_id is None:
        if feature_index is None or not 0 <= feature_index < store.num_features:
            raise DataError(
                f"there is no feature {feature_index}: the split has {store.num_features:,}; give a number from 0 to "
                f"{store.num_features - 1}"
            )
        return [feature_index]
    if example_id not in store.example_ids:
        few = ", ".join(shown(each) for each in store.example_ids[:_FEW])
        raise DataError(
            f"there is no example with the id {shown(example_id)} among the {store.num_examples:,} of the split; ids "
            f"are such as {few}"
        )
    return [int(row) for row in np.flatnonzero(store.example_index == store.example_ids.index(example_id))]


def example_view(store: FeatureStore, tokenizer: Any, features: Sequence[int]) -> dict[str, Any]:
    """An example and some of its features as JSON types.

    Args:
        store: The examples and their features.
        tokenizer: What made them.
        features: Their numbers; at least one, all of one example.

    Returns:
        `example`: the record, with its `index` in the split; `num_windows`, the lengths, and `features`: each with its
        label as tokens and text, and `tokens`. A token has its `position` in the feature, `id`, `piece`, `type`,
        `part` (special, question or context), `start_char` and `end_char` in the context, and `label`.
    """
    index = int(store.example_index[features[0]])
    example = store.example(index)
    spec = store.ingredients
    return {
        "example": {
            "index": index,
            "num_examples": store.num_examples,
            "id": example.id,
            "title": example.title,
            "question": example.question,
            "context": example.context,
            "answers": [
                {"text": answer.text, "start_char": answer.start_char, "end_char": answer.end_char}
                for answer in example.answers
            ],
            "other_texts": list(example.other_texts),
            "has_references": example.has_references,
            "is_unanswerable": example.is_unanswerable,
        },
        "num_windows": int((store.example_index == index).sum()),
        "max_seq_length": spec["max_seq_length"],
        "doc_stride": spec["doc_stride"],
        "features": [_feature(store, tokenizer, feature, example.context) for feature in features],
    }


def _feature(store: FeatureStore, tokenizer: Any, feature: int, context: str) -> dict[str, Any]:
    first, last, cls_token = (int(column[feature]) for column in (store.start_token, store.end_token, store.cls_token))
    is_labelled = bool(store.is_labelled[feature])
    has_answer = is_labelled and first != cls_token
    tokens = _tokens(store, tokenizer, feature)
    if is_labelled:
        for position, name in ((first, "start"), (last, "end")):
            tokens[position]["label"] = " ".join(filter(None, (tokens[position]["label"], name)))
    return {
        "feature": feature,
        "window": int(store.window[feature]),
        "num_tokens": len(tokens),
        "context_start": int(store.context_start[feature]),
        "cls_token": cls_token,
        "start_token": first if is_labelled else None,
        "end_token": last if is_labelled else None,
        "has_answer": has_answer,
        "decoded": tokenizer.decode([token["id"] for token in tokens[first : last + 1]]) if is_labelled else None,
        "text": context[tokens[first]["start_char"] : tokens[last]["end_char"]] if has_answer else None,
        "tokens": tokens,
    }


def _tokens(store: FeatureStore, tokenizer: Any, feature: int) -> list[dict[str, Any]]:
    """The tokens of a feature, without labels."""
    ids = store.input_ids(feature).tolist()
    special = {getattr(tokenizer, name) for name in _SPECIAL}
    places = store.feature_map()
    offsets = places.context_offsets_T2[slice(*places.first_offset_N1[feature : feature + 2].tolist())].tolist()
    context_start = int(store.context_start[feature])
    types = store.token_type_ids(feature).tolist()
    tokens = []
    for position, (token_id, piece) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        is_context = 0 <= position - context_start < len(offsets)
        start, end = offsets[position - context_start] if is_context else (None, None)
        part = "context" if is_context else "special" if token_id in special else "question"
        tokens.append(
            {
                **{"position": position, "id": token_id, "piece": piece, "type": types[position], "part": part},
                **{"start_char": start, "end_char": end, "label": None},
            }
        )
    return tokens
