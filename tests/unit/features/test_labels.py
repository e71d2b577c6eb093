"""Labels of features: the tokens of the answer, or the token that stands for no answer."""

from typing import Any

import numpy as np
import pytest

from qa_dist.data.records import Answer, Example
from qa_dist.features.windows import answer_tokens
from tests.unit.data_fixtures import tiny_examples
from tests.unit.features.windowing import TOKENIZERS, build, every_tokenizer, reference, whole_truncation


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
