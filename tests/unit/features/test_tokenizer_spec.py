"""What features depend on in a tokenizer, and tokenizers that cannot be used."""

import dataclasses

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qa_dist.common.errors import ConfigError
from qa_dist.features.tokenizer import TokenizerSpec, template_of
from tests.tiny import tiny_tokenizer


def test_truncation_and_padding_saved_with_a_tokenizer_have_no_effect() -> None:
    plain, saved = tiny_tokenizer(), tiny_tokenizer()
    saved.backend_tokenizer.enable_truncation(16)
    saved.backend_tokenizer.enable_padding(length=16)
    spec = TokenizerSpec.of(saved)
    assert spec == TokenizerSpec.of(plain)
    assert spec.sha256() == TokenizerSpec.of(plain).sha256()
    # The tokenizer itself is left as it was.
    assert saved.backend_tokenizer.truncation["max_length"] == 16


def test_the_digest_of_a_tokenizer_covers_all_that_features_depend_on() -> None:
    spec = TokenizerSpec.of(tiny_tokenizer())
    others = [
        TokenizerSpec.of(tiny_tokenizer(uncased=False)),
        TokenizerSpec.of(tiny_tokenizer(words=("bridge",))),
        TokenizerSpec.of(tiny_tokenizer(padding_side="left")),
        dataclasses.replace(spec, cls_token_id=3),
        dataclasses.replace(spec, bos_token_id=3),
        dataclasses.replace(spec, has_token_types=False),
    ]
    assert len({spec.sha256(), *(other.sha256() for other in others)}) == 7


def test_a_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(ConfigError, match="SlowTokenizer of some/model is a slow tokenizer"):
        TokenizerSpec.of(SlowTokenizer())


def test_a_tokenizer_that_cannot_be_written_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())

    class CustomTokenizer:
        is_fast = True
        name_or_path = "some/model"
        backend_tokenizer = backend

    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        TokenizerSpec.of(CustomTokenizer())


def test_the_template_is_found_by_a_word_of_the_vocabulary_where_usual_ones_have_no_tokens() -> None:
    backend = Tokenizer(models.BPE({"z": 0, "[S]": 1}, []))
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A [S] $B:1", special_tokens=[("[S]", 1)])
    found = template_of(backend, has_token_types=True)
    assert [piece.ids.tolist() for piece in (found.before, found.between, found.after)] == [[], [1], []]
    assert (found.first_type, found.second_type) == (0, 1)
