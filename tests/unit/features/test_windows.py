import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import ConfigError
from qa_dist.data.placing import is_of_word
from qa_dist.data.records import Answer, Example, Feature
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec, FeatureStats, answer_tokens
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import byte_tokenizer, tiny_examples, without_blanks

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


def reference_label(window: dict[str, Any], answer: Answer, cls_token: int) -> tuple[int, int]:
    """The labels of `prepare_train_features` in run_qa.py, but never running past the context as that does."""
    offsets, context = window["offsets"], window["context"]
    if not offsets or offsets[0][0] > answer.start_char or offsets[-1][1] < answer.end_char:
        return cls_token, cls_token
    first = 0
    while first < len(offsets) and offsets[first][0] <= answer.start_char:
        first += 1
    last = len(offsets) - 1
    while last >= 0 and offsets[last][1] >= answer.end_char:
        last -= 1
    return context[first - 1], context[last + 1]


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


# ----------------------------------------------------------------------------------------------------------- windows


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


# ------------------------------------------------------------------------------------------------------------ labels


@whole_truncation
@pytest.mark.parametrize("name", ["wordpiece", "cased", "left"])
def test_labels_are_those_of_the_hugging_face_example(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    num_labelled = 0
    for example in tiny_examples():
        if example.id.startswith("combining"):
            continue
        for stride in (0, 40):
            features, _ = build(tokenizer, [example], 120, stride)
            for feature, window in zip(features, reference(tokenizer, example, 120, stride), strict=True):
                expected = (feature.cls_token, feature.cls_token)
                if example.answers:
                    expected = reference_label(window, example.answers[0], feature.cls_token)
                assert (feature.start_token, feature.end_token) == expected
                num_labelled += expected[0] != feature.cls_token
    assert num_labelled > 10


@every_tokenizer
def test_labels_are_the_tokens_that_share_characters_with_the_answer(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    num_labelled = 0
    for example in tiny_examples():
        whole = tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        shared = []
        for answer in example.answers[:1]:
            shared = [
                token for token, (start, end) in enumerate(whole) if start < answer.end_char and end > answer.start_char
            ]
            shared = [token for token in shared if whole[token][0] < whole[token][1]]
        features, stats = build(tokenizer, [example], 200, 90)
        step = len(features[0].context_offsets) - 90
        for feature in features:
            first_token = feature.window * step
            inside = range(first_token, first_token + len(feature.context_offsets))
            expected = (feature.cls_token, feature.cls_token)
            if shared and shared[0] in inside and shared[-1] in inside:
                shift = feature.context_start - first_token
                expected = (shared[0] + shift, shared[-1] + shift)
                num_labelled += 1
            assert (feature.start_token, feature.end_token) == expected
        assert stats.num_unlabelled_examples == 0
    assert num_labelled > 10


@every_tokenizer
def test_labels_give_back_the_answer(name: str) -> None:
    for example in tiny_examples():
        for feature in build(TOKENIZERS[name], [example], 384, 128)[0]:
            if feature.start_token == feature.cls_token:
                continue
            first = feature.context_offsets[feature.start_token - feature.context_start, 0]
            last = feature.context_offsets[feature.end_token - feature.context_start, 1]
            found, answer = example.context[first:last].strip(), example.answers[0].text
            # A combining accent at the end is no part of any of BERT's tokens.
            assert found in (answer, answer.rstrip("\u0301"))


def test_an_answer_across_a_window_edge_is_labelled_in_the_window_that_holds_it_whole() -> None:
    example = next(example for example in tiny_examples() if example.id == "long-2")
    features, stats = build(TOKENIZERS["wordpiece"], [example], 150, 90)
    labelled = [feature for feature in features if feature.start_token != feature.cls_token]
    partly = [
        feature
        for feature in features
        if feature not in labelled
        and feature.context_offsets[0, 0] < example.answers[0].end_char
        and feature.context_offsets[-1, 1] > example.answers[0].start_char
    ]
    assert labelled
    assert partly
    assert stats.num_unlabelled_examples == 0
    _, stats = build(TOKENIZERS["wordpiece"], [example], 80, 10)
    assert stats.num_unlabelled_examples == 1


def test_the_first_answer_is_the_label() -> None:
    context = "a b c d"
    example = Example("a", "x", context, (Answer("c", 4), Answer("a", 0)))
    ((feature,), _) = build(TOKENIZERS["wordpiece"], [example], 40, 10)
    assert feature.start_token == feature.end_token == feature.context_start + 2


def test_a_window_without_the_first_answer_is_labelled_with_the_next_one_that_it_holds() -> None:
    context = "a " + "x " * 30 + "b c " + "x " * 30 + "d"
    answers = [Answer("a", 0), Answer("b c", context.index("b")), Answer("d", context.index("d"))]
    windows: dict[str | None, int] = {}
    for order in (answers, answers[::-1]):
        features, stats = build(TOKENIZERS["wordpiece"], [Example("q", "y", context, tuple(order))], 32, 4)
        assert stats.num_unlabelled_examples == 0
        assert len(features) == 3
        for feature in features:
            text = context[feature.context_offsets[0, 0] : feature.context_offsets[-1, 1]]
            held = [answer.text for answer in order if answer.text in text]
            label = None
            if feature.start_token != feature.cls_token:
                first, last = (token - feature.context_start for token in (feature.start_token, feature.end_token))
                label = context[feature.context_offsets[first, 0] : feature.context_offsets[last, 1]]
            assert label == (held[0] if held else None)
            windows[label] = windows.get(label, 0) + 1
    assert windows == {"a": 2, "b c": 2, "d": 2}
    # A reference whose text the tokenizer drops, or that no window holds whole, hides no other one.
    long = Answer(context[:90], 0)
    features, stats = build(TOKENIZERS["wordpiece"], [Example("q", "y", context, (long, answers[2]))], 32, 4)
    assert [feature.start_token != feature.cls_token for feature in features] == [False, False, True]
    assert stats.num_unlabelled_examples == 0
    _, stats = build(TOKENIZERS["wordpiece"], [Example("q", "y", context, (long, long))], 32, 4)
    assert stats.num_unlabelled_examples == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("ab", 0), (0, 0)),
        (Answer("cd", 3), (1, 1)),
        (Answer("ef", 6), (2, 2)),
        (Answer("ab cd", 0), (0, 1)),
        (Answer("b c", 1), (0, 1)),  # inside words: the label takes whole tokens
        (Answer(" cd ", 2), (1, 1)),  # between words: it takes no neighbours
        (Answer(" ", 2), None),
    ],
)
def test_answer_tokens(answer: Answer, expected: tuple[int, int] | None) -> None:
    assert answer_tokens(np.array([[0, 2], [3, 5], [6, 8]], np.int32), answer) == expected


def test_a_label_takes_all_pieces_of_a_character_and_no_empty_token() -> None:
    pieces = np.array([[0, 1], [2, 2], [2, 3], [2, 3], [2, 3], [3, 4]], np.int32)
    assert answer_tokens(pieces, Answer("🦉", 2)) == (2, 4)
    assert answer_tokens(pieces, Answer("a 🦉", 0)) == (0, 4)
    assert answer_tokens(np.empty((0, 2), np.int32), Answer("ab", 0)) is None
    # The blank that a byte-level tokenizer puts before a text ends where that text's first character ends.
    behind = np.array([[0, 3], [4, 4], [3, 4], [4, 5], [5, 5], [6, 7]], np.int32)
    assert answer_tokens(behind, Answer("ab", 3)) == (2, 3)
    assert answer_tokens(behind, Answer("ab ", 3)) == (2, 3)


def test_an_answer_in_the_last_token_of_a_window_is_labelled_with_that_token() -> None:
    context = "a b c d e f g h"
    answer = Answer("e", context.index("e"))
    features, _ = build(TOKENIZERS["wordpiece"], [Example("q", "x", context, (answer,))], 9, 0)
    assert [len(feature.context_offsets) for feature in features] == [5, 3]
    assert (features[0].start_token, features[0].end_token) == (7, 7)
    assert features[1].start_token == features[1].cls_token


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wordpiece", "[CLS]"), ("left", "[CLS]"), ("roberta", "<s>"), ("xlnet", "<cls>"), ("bos", "<s>"), ("bare", None)],
)
def test_no_answer_is_the_cls_token_else_bos_else_the_first(name: str, expected: str | None) -> None:
    tokenizer = TOKENIZERS[name]
    # A context that spells the token must not be mistaken for it.
    context = f"{expected} a {expected} b"
    for feature in build(tokenizer, [Example("a", "b c", context * 4)], 60, 20)[0]:
        if expected is None:
            assert feature.cls_token == 0
        elif name == "xlnet":
            assert feature.cls_token == len(feature.input_ids) - 1
        else:
            assert feature.cls_token == 0
            assert feature.input_ids[0] == tokenizer.convert_tokens_to_ids(expected)


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
