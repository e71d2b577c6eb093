"""The windows of an example as transformers' own truncation makes them, and tokenizers of every kind."""

import unicodedata
from typing import Any

import pytest

from qa_dist.data.placing import is_of_word
from qa_dist.data.records import Example, Feature
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureSpec, FeatureStats
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import byte_tokenizer

TOKENIZERS = {
    "wordpiece": tiny_tokenizer(),
    "cased": tiny_tokenizer(uncased=False),
    "left": tiny_tokenizer(padding_side="left"),
    "roberta": byte_tokenizer("roberta"),
    "xlnet": byte_tokenizer("xlnet"),
    "bare": byte_tokenizer("bare"),
    "bos": byte_tokenizer("bos"),
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def loses_tokens() -> bool:
    """Whether this version of tokenizers (0.23.2 does) gives two windows where a text needs more."""
    options = {"truncation": "only_second", "max_length": 40, "stride": 10, "return_overflowing_tokens": True}
    return len(TOKENIZERS["wordpiece"]("a", "x " * 200, **options)["input_ids"]) < 7


whole_truncation = pytest.mark.skipif(loses_tokens(), reason="truncation of this version of tokenizers loses tokens")


def build(tokenizer: Any, examples: list[Example], *lengths: int) -> tuple[list[Feature], FeatureStats]:
    return FeatureBuilder(TokenizerSpec.of(tokenizer), FeatureSpec(*lengths)).build(examples)


def reference(tokenizer: Any, example: Example, max_seq_length: int, doc_stride: int) -> list[dict[str, Any]]:
    """The windows of an example as the Hugging Face tutorial makes them, with transformers' own truncation."""
    question_first = tokenizer.padding_side == "right"
    texts = (example.question.lstrip(), example.context)
    encoded = tokenizer(
        *(texts if question_first else texts[::-1]),
        truncation="only_second" if question_first else "only_first",
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
        split_special_tokens=True,
    )
    windows = []
    for i, ids in enumerate(encoded["input_ids"]):
        sequence_ids = encoded.sequence_ids(i)
        context = [j for j, number in enumerate(sequence_ids) if number == (1 if question_first else 0)]
        offsets = with_accents(tokenizer, example.context, [encoded["offset_mapping"][i][j] for j in context])
        types = encoded["token_type_ids"][i] if "token_type_ids" in encoded else [0] * len(ids)
        windows.append({"ids": ids, "types": types, "offsets": offsets, "context": context})
    return windows


def with_accents(tokenizer: Any, context: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which an accent that no token of the context has belongs to the last token of the letter before it."""
    pairs = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    covered = {place for start, end in pairs for place in range(start, end)}
    found = []
    for number, (start, end) in enumerate(offsets):
        longer = end
        if start < end and end not in (later for _, later in offsets[number + 1 :]) and is_of_word(context[end - 1]):
            while context[longer : longer + 1] and is_accent(context[longer]) and longer not in covered:
                longer += 1
        found.append((start, longer))
    return found


def is_accent(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
