"""What features depend on in a tokenizer: as plain values, and how it joins two texts.

Text that spells a special token ("</s>" in a paragraph about HTML) is text, as with `split_special_tokens`: only the
template says where a text begins and ends. RoBERTa would not even count the position of a `<pad>`. Masks, and tokens
that somebody added for use in text, stay whole; so does what a SentencePiece vocabulary itself has as a word.

Neither torch nor transformers is imported, so that a process that tokenises starts in a fraction of a second.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from qa_dist.common.arrays import Int8, Int32
from qa_dist.common.errors import ConfigError
from qa_dist.features.offsets import cover_words, leave_blanks_out, without_trimming

_NOT_IN_TEXT = ("bos_token", "cls_token", "eos_token", "pad_token", "sep_token", "unk_token")


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What features depend on in a tokenizer, as plain values that can travel to another process.

    Attributes:
        backend: JSON of the `tokenizers.Tokenizer`, without the truncation and padding it may have been saved with.
            Added tokens are `special` in it if text that spells them is text.
        padding_side: "left" puts the context before the question.
        cls_token_id: the token that stands for "no answer".
        bos_token_id: stands for it where there is no CLS.
        has_token_types: whether the model reads token types; if not, they are all zero.
        has_exact_offsets: whether tokens come with the characters of words and no others; if not, they are mended.
    """

    backend: str
    padding_side: str
    cls_token_id: int | None
    bos_token_id: int | None
    has_token_types: bool
    has_exact_offsets: bool = True

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenizerSpec":
        """The spec of a tokenizer from transformers.

        Raises:
            ConfigError: It is a slow one, which cannot tell which characters a token came from.
        """
        name = type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                [
                    f"{name} of {tokenizer.name_or_path} is a slow tokenizer and does not keep character offsets; "
                    "pass --tokenizer_name with a fast one (a folder with a tokenizer.json)"
                ]
            )
        try:
            backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # the library raises bare Exception where a part is written in Python
            problem = f"{name} of {tokenizer.name_or_path} cannot be written as JSON ({error})"
            raise ConfigError([f"{problem}; pass another --tokenizer_name"]) from error
        backend.no_truncation()
        backend.no_padding()
        description = json.loads(backend.to_str())
        not_in_text = {str(tokenizer.special_tokens_map.get(kind)) for kind in _NOT_IN_TEXT}
        for token in description["added_tokens"]:
            token["special"] = token["content"] in not_in_text
        covers_words = cover_words(backend)
        if not covers_words:
            # The blanks that it takes off tokens may be none of the text's.
            description["post_processor"] = without_trimming(description["post_processor"])
        return cls(
            backend=json.dumps(description, ensure_ascii=False),
            padding_side=tokenizer.padding_side,
            cls_token_id=tokenizer.cls_token_id,
            bos_token_id=tokenizer.bos_token_id,
            has_token_types="token_type_ids" in tokenizer.model_input_names,
            has_exact_offsets=covers_words and leave_blanks_out(backend),
        )

    def sha256(self) -> str:
        """Hex digest over everything that features depend on."""
        values = list(dataclasses.astuple(self))
        # Exact offsets are what they were before others were mended: stores of then are those of now.
        if self.has_exact_offsets:
            del values[-1]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _short_texts(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Texts of which one has tokens: usual ones, and only then all that the vocabulary holds."""
    yield from ("a", "the", "1")
    yield from sorted(backend.get_vocab())


class Piece(NamedTuple):
    """Special tokens between two texts: ids int32 [n] and token types int8 [n]."""

    ids: Int32
    types: Int8


class Template(NamedTuple):
    """How a tokenizer joins two texts: before FIRST between SECOND after."""

    before: Piece
    first_type: int
    between: Piece
    second_type: int
    after: Piece


def template_of(backend: tokenizers.Tokenizer, has_token_types: bool) -> Template:
    """How the tokenizer joins a pair of texts, read off a pair that it joined.

    Raises:
        ConfigError: It does not put all tokens of one text before all tokens of the other.
    """
    text = next((text for text in _short_texts(backend) if backend.encode(text, add_special_tokens=False).ids), "")
    encoding = backend.encode(text, text)
    ids = np.array(encoding.ids, np.int32)
    types = np.array(encoding.type_ids if has_token_types else [0] * len(ids), np.int8)
    # Sequence numbers: 0 and 1 are the texts, None (here -1) is a special token.
    sequences = np.array([-1 if number is None else number for number in encoding.sequence_ids])
    first, second = np.flatnonzero(sequences == 0), np.flatnonzero(sequences == 1)
    contiguous = all(len(part) and part[-1] - part[0] == len(part) - 1 for part in (first, second))
    if not contiguous or first[-1] > second[0]:
        raise ConfigError(["the tokenizer does not join pairs of texts one after the other; pass another one"])

    def piece(start: int, end: int) -> Piece:
        return Piece(ids[start:end], types[start:end])

    return Template(
        before=piece(0, first[0]),
        first_type=int(types[first[0]]),
        between=piece(first[-1] + 1, second[0]),
        second_type=int(types[second[0]]),
        after=piece(second[-1] + 1, len(ids)),
    )
