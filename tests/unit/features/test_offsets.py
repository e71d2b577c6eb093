"""Labels of every kind of tokenizer give back their answers, and no offset holds the blank before a word."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qa_dist.data.records import Answer, Example, Feature
from qa_dist.features.offsets import mended, ordered
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureSpec
from tests.tiny import tiny_tokenizer

WORDS = (
    "Amsterdam is de hoofdstad van 1871 a 7 x Kerrow quay Größe Adèle São 서울은 東京 Москва don't e-mail (Ada) end. "
    "Rene\u0301 नमस्ते"
).split()
CORPUS = [" ".join(WORDS[first:] + WORDS[:first]) for first in range(len(WORDS))]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
PRE = pre_tokenizers


def trained(model: str, pre_tokenizer: Any, post_processor: Any = None, normalizer: Any = None) -> Any:
    """A tokenizer with a vocabulary of a few hundred pieces of the words above, all characters of which it knows."""
    backend = Tokenizer({"bpe": models.BPE(unk_token="<unk>"), "unigram": models.Unigram()}[model])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    options = {"vocab_size": 420, "special_tokens": SPECIALS, "show_progress": False}
    alphabet = sorted({*"".join(WORDS), *PRE.ByteLevel.alphabet(), "▁"})
    if model == "bpe":
        trainer: Any = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    else:
        trainer = trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token="<unk>", **options)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = post_processor or processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def roberta(*, trim_offsets: bool, add_prefix_space: bool) -> Any:
    return processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets, add_prefix_space=add_prefix_space
    )


def byte_level(*, prefix: bool, trimmed: bool) -> Any:
    return trained(
        "bpe", PRE.ByteLevel(add_prefix_space=prefix), roberta(trim_offsets=trimmed, add_prefix_space=prefix)
    )


def robbert(*after: Any) -> Any:
    """As RobBERT-2023's: every word is cut out and given a blank, whose width is taken off its first letter."""
    cut = PRE.Sequence([PRE.Whitespace(), PRE.ByteLevel(add_prefix_space=True), *after])
    return trained("bpe", cut, roberta(trim_offsets=True, add_prefix_space=False))


def metaspace(model: str, scheme: str, *, cut: bool = False, normalizer: Any = None) -> Any:
    pieces = PRE.Metaspace(prepend_scheme=scheme)
    return trained(model, PRE.Sequence([PRE.WhitespaceSplit(), pieces]) if cut else pieces, normalizer=normalizer)


def dropping(pattern: str) -> Any:
    """Byte-level, but without what the pattern finds: no token covers that."""
    drop = PRE.Split(Regex(pattern), "removed")
    return trained("bpe", PRE.Sequence([PRE.WhitespaceSplit(), drop, PRE.ByteLevel(add_prefix_space=False)]))


WHOLE = {
    "wordpiece": tiny_tokenizer(words=("서울은", "東京", "Москва", "москва", "नमसत")),
    "wordpiece cased": tiny_tokenizer(uncased=False, words=("서울은", "東京", "Москва", "Rene\u0301", "नमस्ते")),
    "byte-level": byte_level(prefix=False, trimmed=True),
    "byte-level untrimmed": byte_level(prefix=False, trimmed=False),
    "byte-level with a blank": byte_level(prefix=True, trimmed=True),
    "byte-level with a blank, untrimmed": byte_level(prefix=True, trimmed=False),
    "byte-level trimmed as if without the blank it adds": trained(
        "bpe", PRE.ByteLevel(add_prefix_space=True), roberta(trim_offsets=True, add_prefix_space=False)
    ),
    "byte-level by its own post-processor": trained(
        "bpe", PRE.ByteLevel(add_prefix_space=False), processors.ByteLevel(trim_offsets=True)
    ),
    "byte-level, a sequence of post-processors": trained(
        "bpe",
        PRE.Sequence([PRE.WhitespaceSplit(), PRE.ByteLevel(add_prefix_space=True)]),
        processors.Sequence([processors.ByteLevel(trim_offsets=True, add_prefix_space=False)]),
    ),
    "byte-level lower-casing": trained(
        "bpe", PRE.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()
    ),
    "robbert": robbert(),
    "robbert with punctuation": robbert(PRE.Punctuation()),
    "metaspace always": metaspace("unigram", "always"),
    "metaspace first": metaspace("unigram", "first"),
    "metaspace never": metaspace("unigram", "never"),
    "metaspace bpe": metaspace("bpe", "always"),
    "metaspace bpe lower-casing": metaspace("bpe", "always", normalizer=normalizers.Lowercase()),
    "metaspace behind words": metaspace("unigram", "always", cut=True, normalizer=normalizers.NFKC()),
    "metaspace by a normaliser": trained(
        "bpe",
        PRE.Split("▁", "merged_with_next"),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
}
"""Tokenizers with a token for every letter."""

DROPPING = {"first letters": dropping(r"^\w"), "last letters": dropping(r"\w$"), "vowels": dropping("[aeiou]")}
"""Tokenizers that drop letters: words of such letters alone have no token."""

TOKENIZERS = WHOLE | DROPPING
SPECS = {name: TokenizerSpec.of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def features_of(
    name: str, context: str, answers: Iterable[Answer] = (), length: int = 400
) -> tuple[list[Feature], int]:
    """The features of one example, and how many examples (0 or 1) are counted as without a label."""
    builder = FeatureBuilder(SPECS[name], FeatureSpec(length, length // 4))
    features, stats = builder.build([Example("q", "a", context, tuple(answers))])
    return features, stats.num_unlabelled_examples


def decoded(context: str, feature: Feature) -> tuple[int, int] | None:
    """First character, and one past the last, of the label; None for "no answer"."""
    if feature.start_token == feature.cls_token:
        return None
    first, last = (token - feature.context_start for token in (feature.start_token, feature.end_token))
    return int(feature.context_offsets[first, 0]), int(feature.context_offsets[last, 1])


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12)
blanks = st.sampled_from([" ", " ", " ", "  ", "\n", " \t"])


@st.composite
def texts_and_answers(draw: Any, *, whole_words: bool) -> tuple[str, Answer]:
    """A text of words, and an answer in it of whole words or of any characters, that begins and ends with no blank."""
    chosen = draw(words)
    context, places = draw(st.sampled_from(["", " "])), []
    for word in chosen:
        places.append((len(context), len(context) + len(word)))
        context += word + draw(blanks)
    first = draw(st.integers(0, len(places) - 1))
    last = draw(st.integers(first, len(places) - 1))
    start, end = places[first][0], places[last][1]
    if not whole_words:
        start = draw(st.integers(start, places[first][1] - 1))
        end = draw(st.integers(max(start, places[last][0]) + 1, end))
    return context, Answer(context[start:end], start)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), case=texts_and_answers(whole_words=True))
def test_labels_of_whole_words_give_back_the_answer(name: str, case: tuple[str, Answer]) -> None:
    context, answer = case
    ((feature,), num_unlabelled) = features_of(name, context, [answer])
    assert decoded(context, feature) == (answer.start_char, answer.end_char)
    assert num_unlabelled == 0


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), case=texts_and_answers(whole_words=False))
def test_a_label_gives_back_its_answer_or_no_tokens_do(name: str, case: tuple[str, Answer]) -> None:
    context, answer = case
    ((feature,), num_unlabelled) = features_of(name, context, [answer])
    wanted = (answer.start_char, answer.end_char)
    found = decoded(context, feature)
    starts, ends = feature.context_offsets.T.tolist()
    if found != wanted:
        # A mark of a blank may have the first letter of the token behind it, and is no end of an answer then.
        lasts = [j for j, end in enumerate(ends) if j + 1 == len(ends) or starts[j + 1] >= end]
        pairs = ((starts[i], ends[j]) for j in lasts for i in range(j + 1))
        assert wanted not in set(pairs)
    if found is None:
        assert num_unlabelled == 1
        assert not any(s < e and s < wanted[1] and e > wanted[0] for s, e in zip(starts, ends, strict=True))
    else:
        # No more than the tokens at its ends have beyond it.
        assert found[0] < wanted[1]
        assert found[1] > wanted[0]


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), case=texts_and_answers(whole_words=True))
def test_no_token_begins_or_ends_with_a_blank_between_words(name: str, case: tuple[str, Answer]) -> None:
    context = " ".join(case[0].split())
    ((feature,), _) = features_of(name, context)
    offsets = feature.context_offsets
    assert (offsets[:, 0] <= offsets[:, 1]).all()
    for start, end in offsets.tolist():
        assert context[start:end] == context[start:end].strip()
    # Also where there are several, as far as the offsets are ours.
    if not SPECS[name].has_exact_offsets:
        ((feature,), _) = features_of(name, case[0])
        for start, end in feature.context_offsets.tolist():
            assert case[0][start:end] == case[0][start:end].strip()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_and_their_order_are_left_as_they_are(name: str) -> None:
    context = "Amsterdam is a 7 (Ada) 1871 Größe"
    ((feature,), _) = features_of(name, context)
    ids = TOKENIZERS[name](context, add_special_tokens=False)["input_ids"]
    first = feature.context_start
    assert feature.input_ids[first : first + len(feature.context_offsets)].tolist() == ids


def test_which_tokenizers_are_exact() -> None:
    assert {name for name, spec in SPECS.items() if spec.has_exact_offsets} == {
        "wordpiece",
        "wordpiece cased",
        "byte-level",
        "metaspace behind words",
    }


@pytest.mark.parametrize("text", ["Amsterdam", "871", "a", "7", "Kerrow", "(Ada)"])
def test_words_that_lost_their_first_letter_have_it_again(text: str) -> None:
    context = "Amsterdam in 871 had a 7 by Kerrow (Ada) x"
    for name in ("robbert", "robbert with punctuation"):
        answer = Answer(text, context.index(f" {text} ") + 1 if f" {text} " in context else 0)
        ((feature,), _) = features_of(name, context, [answer])
        assert decoded(context, feature) == (answer.start_char, answer.end_char)


def test_words_of_dropped_letters_alone_are_counted() -> None:
    context = "the 7 quays"
    ((feature,), num_unlabelled) = features_of("first letters", context, [Answer("7", 4)])
    assert decoded(context, feature) is None
    assert num_unlabelled == 1
    for name in DROPPING:
        ((feature,), num_unlabelled) = features_of(name, context, [Answer("quays", 6)])
        assert decoded(context, feature) == (6, 11)


@pytest.mark.parametrize(
    ("context", "offsets", "expected"),
    [
        # A blank before a word, behind it, and alone.
        ("a bc d", [(0, 1), (1, 4), (4, 5), (5, 6)], [(0, 1), (2, 4), (5, 5), (5, 6)]),
        ("ab  cd ", [(0, 3), (3, 7)], [(0, 2), (4, 6)]),
        ("ab \n", [(0, 2), (2, 3), (3, 4)], [(0, 2), (3, 3), (4, 4)]),
        # Letters at the beginning, at the end and inside a word.
        ("abc", [(1, 3)], [(0, 3)]),
        ("abc", [(0, 2)], [(0, 3)]),
        ("abc", [(0, 1), (2, 3)], [(0, 1), (1, 3)]),
        # A word of one letter, and one that has no token.
        ("a bc", [(1, 1), (3, 4)], [(0, 1), (2, 4)]),
        ("a bc", [(3, 4)], [(2, 4)]),
        ("bc a", [(0, 2)], [(0, 2)]),
        # Accents belong to the letter before them; other characters that were dropped are nobody's.
        ("e\u0301a", [(0, 1), (2, 3)], [(0, 2), (2, 3)]),
        ("-\u0301a", [(0, 1), (2, 3)], [(0, 1), (2, 3)]),
        ("ab\u200b, c", [(0, 2), (5, 6)], [(0, 2), (5, 6)]),
        ("", [], []),
    ],
)
def test_mended_offsets(context: str, offsets: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    found = mended(context, ordered(offsets))
    assert found.dtype == np.int32
    assert found.shape == (len(expected), 2)
    assert list(map(tuple, found.tolist())) == expected
