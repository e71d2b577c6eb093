from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import ConfigError
from qa_dist.data.records import Answer, Example
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec, FeatureStats
from tests.unit.data_fixtures import byte_tokenizer, tiny_examples, without_blanks
from tests.unit.features.windowing import TOKENIZERS, build, every_tokenizer, reference, whole_truncation


def assert_same_windows(tokenizer: Any, example: Example, max_seq_length: int, doc_stride: int) -> None:
    features, _ = build(tokenizer, [example], max_seq_length, doc_stride)
    windows = reference(tokenizer, example, max_seq_length, doc_stride)
    assert len(features) == len(windows)
    for number, (feature, window) in enumerate(zip(features, windows, strict=True)):
        assert (feature.example_index, feature.window) == (0, number)
        assert feature.input_ids.tolist() == window["ids"]
        assert feature.token_type_ids.tolist() == window["types"]
        offsets = feature.context_offsets.tolist()
        if not TokenizerSpec.of(tokenizer).has_exact_offsets:
            # Blanks are left out, which a window's last token does not show: it stands where the next one begins.
            expected = without_blanks(example.context, window["offsets"])
            assert [tuple(pair) for pair in offsets[:-1]] == expected[:-1]
            assert not expected or tuple(offsets[-1]) == expected[-1] or expected[-1][0] == expected[-1][1]
        elif number and offsets and offsets[0][0] == window["offsets"][0][0] + 1:
            # The blank that byte-level tokenizers count to the first token of a further window, and of no other.
            assert example.context[window["offsets"][0][0]].isspace()
            assert [tuple(pair) for pair in offsets[1:]] == window["offsets"][1:]
        else:
            assert [tuple(pair) for pair in offsets] == window["offsets"]
        if window["context"]:
            assert feature.context_start == window["context"][0]
        assert feature.input_ids.dtype == np.int32
        assert feature.token_type_ids.dtype == np.int8
        assert feature.context_offsets.dtype == np.int32


@whole_truncation
@every_tokenizer
def test_windows_are_those_of_the_tokenizers_own_truncation(name: str) -> None:
    for example in tiny_examples():
        for lengths in ((220, 20), (220, 0), (384, 128)):
            assert_same_windows(TOKENIZERS[name], example, *lengths)


@every_tokenizer
def test_windows_are_counted_without_being_made(name: str) -> None:
    examples = tiny_examples()
    for lengths in ((220, 20), (220, 0), (64, 12, 9)):
        builder = FeatureBuilder(TokenizerSpec.of(TOKENIZERS[name]), FeatureSpec(*lengths))
        owners = [feature.example_index for feature in builder.build(examples)[0]]
        assert builder.num_windows(examples).tolist() == np.bincount(owners).tolist()
        assert max(owners.count(owner) for owner in owners) > 1


texts = st.text("abc é\u0301\r\n🦉🚂中[SEP]", min_size=1, max_size=150)


@whole_truncation
@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    question=texts,
    context=texts,
    max_seq_length=st.integers(20, 90),
    doc_stride=st.integers(0, 40),
)
def test_windows_of_any_text_and_lengths(
    name: str, question: str, context: str, max_seq_length: int, doc_stride: int
) -> None:
    tokenizer = TOKENIZERS[name]
    num_question = len(tokenizer(question.lstrip(), add_special_tokens=False)["input_ids"])
    num_special = tokenizer.num_special_tokens_to_add(pair=True)
    # transformers takes an empty second text for none; validation lets no such question pass.
    if question.strip() and max_seq_length - num_special - num_question > doc_stride:
        assert_same_windows(tokenizer, Example("a", question, context), max_seq_length, doc_stride)


@every_tokenizer
def test_windows_cover_the_context_and_overlap_by_the_stride(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    example = next(example for example in tiny_examples() if example.id == "long-1")
    whole = tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True)
    offsets = whole["offset_mapping"]
    if not TokenizerSpec.of(tokenizer).has_exact_offsets:
        offsets = without_blanks(example.context, offsets)
    tokens = list(zip(whole["input_ids"], offsets, strict=True))
    for stride in (0, 1, 30):
        features, stats = build(tokenizer, [example], 150, stride)
        assert stats.num_features == len(features) > 3
        covered: list[Any] = []
        for feature in features:
            end = feature.context_start + len(feature.context_offsets)
            ids = feature.input_ids[feature.context_start : end].tolist()
            window = list(zip(ids, map(tuple, feature.context_offsets.tolist()), strict=True))
            shared = stride if covered else 0
            assert covered[len(covered) - shared :] == window[:shared]
            assert len(window) > shared
            covered += window[shared:]
            assert len(feature.input_ids) <= 150
        assert covered == tokens
        assert {len(feature.input_ids) for feature in features[:-1]} == {150}


def test_a_context_that_just_fits_is_one_window() -> None:
    example = Example("a", "b", "a " * 40)
    assert len(build(TOKENIZERS["wordpiece"], [example], 44, 10)[0]) == 1
    assert len(build(TOKENIZERS["wordpiece"], [example], 43, 10)[0]) == 2


@every_tokenizer
def test_a_context_without_tokens_is_one_feature(name: str) -> None:
    answer = (Answer("\u200b", 0),)
    # BERT's normaliser drops the control character; byte-level vocabularies know every byte.
    features, stats = build(TOKENIZERS[name], [Example("a", "b", "\x00", answer)], 40, 10)
    assert stats.num_features == len(features) == 1
    if name in ("wordpiece", "cased", "left"):
        (feature,) = features
        assert feature.context_offsets.shape == (0, 2)
        assert (feature.start_token, feature.end_token) == (feature.cls_token, feature.cls_token)
        assert stats.num_unlabelled_examples == 1


def test_leading_blanks_of_questions_are_dropped() -> None:
    blanks, plain = (build(TOKENIZERS["roberta"], [Example("a", text, "c")], 40, 10)[0] for text in ("  b", "b"))
    assert blanks[0].input_ids.tolist() == plain[0].input_ids.tolist()


def test_a_question_that_is_too_long_is_cut_and_counted() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    examples = [Example("a", "b " * 500, "a " * 30), Example("b", "b " * 5, "a " * 30), Example("c", "b " * 6, "c")]
    features, stats = build(tokenizer, examples, 40, 10)
    assert stats.num_truncated_questions == 1
    assert features[0].input_ids.tolist().count(tokenizer.convert_tokens_to_ids("b")) == 40 - 3 - 10 - 1
    features, stats = build(tokenizer, examples, 40, 10, 5)
    assert stats.num_truncated_questions == 2
    assert {feature.context_start for feature in features} == {7}


def test_lengths_that_contradict_each_other_are_config_errors() -> None:
    spec = TokenizerSpec.of(TOKENIZERS["roberta"])
    FeatureBuilder(spec, FeatureSpec(40, 34))
    with pytest.raises(ConfigError, match=r"--doc_stride 35 .* lower the stride to at most 34"):
        FeatureBuilder(spec, FeatureSpec(40, 35))
    FeatureBuilder(spec, FeatureSpec(40, 10, 25))
    with pytest.raises(ConfigError, match=r"--max_question_length 26 .* at most 25 fits"):
        FeatureBuilder(spec, FeatureSpec(40, 10, 26))
    with pytest.raises(ConfigError, match="--doc_stride 0"):
        FeatureBuilder(spec, FeatureSpec(5, 0))


# ----------------------------------------------------------------------------------------------------- special tokens

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@every_tokenizer
def test_text_that_spells_a_special_token_is_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    specials = sorted({getattr(tokenizer, kind) for kind in NAMED} - {None})
    assert specials
    context = "".join(f"{special}ab {special} cd" for special in specials)
    spelt = {tokenizer.convert_tokens_to_ids(special) for special in specials}
    for word in ("ab", "cd", specials[-1]):
        start = context.rindex(word)
        examples = [Example("q", " ".join(specials), context, (Answer(word, start),))]
        ((feature,), stats) = build(tokenizer, examples, 384, 10)
        assert stats.num_unlabelled_examples == 0
        first = feature.context_offsets[feature.start_token - feature.context_start, 0]
        last = feature.context_offsets[feature.end_token - feature.context_start, 1]
        assert (first, last) == (start, start + len(word))
        # What the template adds, and nothing else.
        ids = [token for token in feature.input_ids.tolist() if token in spelt]
        assert len(ids) == tokenizer.num_special_tokens_to_add(pair=True)


def test_own_tokens_and_masks_stay_whole_and_an_answer_behind_one_has_its_first_letter() -> None:
    tokenizer = byte_tokenizer("roberta")
    tokenizer.add_tokens(["<row>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<cell>"], "mask_token": "<mask>"})
    for own in ("<row>", "<cell>", "<mask>"):
        context = f"ab{own}Paris cd"
        example = Example("q", "x", context, (Answer("Paris", context.index("P")),))
        ((feature,), _) = build(tokenizer, [example], 60, 10)
        assert feature.input_ids.tolist().count(tokenizer.convert_tokens_to_ids(own)) == 1
        label = feature.start_token - feature.context_start
        first, last = feature.context_offsets[label, 0], feature.context_offsets[label + 4, 1]
        assert context[first:last] == "Paris"
        # A prediction that takes the blank before it, too.
        assert feature.context_offsets[label - 1].tolist() == [first, first]
        assert feature.end_token == feature.start_token + 4
    # The tokenizer itself is left as it was.
    assert tokenizer("<s>", add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]


# ----------------------------------------------------------------------------------------------------------- columns


def test_columns_hold_the_features_one_after_the_other() -> None:
    features, stats = build(TOKENIZERS["wordpiece"], tiny_examples(), 120, 30)
    half = len(features) // 2
    columns = FeatureColumns.concatenate([FeatureColumns.of(features[:half]), FeatureColumns.of(features[half:])])
    assert stats.num_tokens == len(columns.input_ids) == columns.lengths.sum()
    token = offset = 0
    for i, feature in enumerate(features):
        ids = columns.input_ids[token : token + columns.lengths[i]]
        np.testing.assert_array_equal(ids, feature.input_ids)
        types = columns.token_type_ids[token : token + columns.lengths[i]]
        np.testing.assert_array_equal(types, feature.token_type_ids)
        offsets = columns.context_offsets[offset : offset + columns.context_lengths[i]]
        np.testing.assert_array_equal(offsets, feature.context_offsets)
        for name in ("example_index", "window", "context_start", "cls_token", "start_token", "end_token"):
            assert getattr(columns, name)[i] == getattr(feature, name)
        token += len(feature.input_ids)
        offset += len(feature.context_offsets)


def test_no_features_are_empty_columns() -> None:
    columns = FeatureColumns.of([])
    assert columns.context_offsets.shape == (0, 2)
    assert columns.input_ids.dtype == np.int32
    assert columns.token_type_ids.dtype == np.int8


def test_stats_add_up_and_average() -> None:
    total = FeatureStats(1, 2, 30, 0, 1) + FeatureStats(1, 1, 15, 1, 0)
    assert total == FeatureStats(2, 3, 45, 1, 1)
    assert total.mean_tokens == 15
    assert FeatureStats().mean_tokens == 0
