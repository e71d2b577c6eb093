"""Examples → features: overlapping windows of tokens with labels. One tokenisation serves training and evaluation.

A feature is `[CLS] question [SEP] window of the context [SEP]`, or whatever the tokenizer's own template is. Where a
tokenizer pads on the left, the context comes first, as in the Hugging Face examples: its models read the end of their
input best. Nothing is padded here.

Each context is tokenised once, however many questions it has, and windows are cut from that. The fast tokenizers
encode both texts of a pair on their own before they truncate and join them, so this gives the very features that
encoding each pair with `truncation="only_second"`, `stride` and `return_overflowing_tokens` gives, in a third of the
time on SQuAD. The tests compare the two. One offset differs: byte-level tokenizers leave the blank before a word out of
its offsets, but put it in for the first token of every further window; here it is out everywhere. And the blank that
they put before a text that begins without one is placed before the first character, and not behind it. What else is
wrong with the offsets of a tokenizer is mended (`offsets`).

Text that spells a special token ("</s>" in a paragraph about HTML) is text, as with `split_special_tokens`: only the
template says where a text begins and ends. RoBERTa would not even count the position of a `<pad>`. Masks, and tokens
that somebody added for use in text, stay whole; so does what a SentencePiece vocabulary itself has as a word.

Neither torch nor transformers is imported, so that a process that tokenises starts in a fraction of a second.

Shapes: N features, L tokens of a feature, C context tokens of a feature, T tokens of all features.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from qa_dist.common.errors import ConfigError
from qa_dist.data.records import Answer, Example, Feature
from qa_dist.features.offsets import cover_words, exact_offsets, leave_blanks_out, without_trimming

Int32 = npt.NDArray[np.int32]
Int8 = npt.NDArray[np.int8]

_NOT_IN_TEXT = ("bos_token", "cls_token", "eos_token", "pad_token", "sep_token", "unk_token")


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """How long features are.

    Attributes:
        max_seq_length: tokens per feature, special tokens included.
        doc_stride: tokens that consecutive windows of a context share: an overlap, as in Hugging Face tokenizers, not
            a step as in Google's BERT.
        max_question_length: longer questions are cut to this many tokens and counted; None: as long as every window
            can still advance by a token.
    """

    max_seq_length: int
    doc_stride: int
    max_question_length: int | None = None

    def longest_question(self, num_special_tokens: int) -> int:
        """Tokens that a question may have.

        Raises:
            ConfigError: The lengths contradict each other, given what the tokenizer's special tokens take.
        """
        longest = self.max_seq_length - num_special_tokens - self.doc_stride - 1
        used = f"--max_seq_length {self.max_seq_length}, of which special tokens take {num_special_tokens}"
        if longest < 1:
            raise ConfigError(
                [
                    f"--doc_stride {self.doc_stride} leaves no room for a question and a window that advances in "
                    f"{used}; lower the stride to at most {max(0, self.doc_stride + longest - 1)} or raise the length"
                ]
            )
        if self.max_question_length is None:
            return longest
        if self.max_question_length > longest:
            raise ConfigError(
                [
                    f"--max_question_length {self.max_question_length} with --doc_stride {self.doc_stride} leaves no "
                    f"room for context in {used}; at most {longest} fits"
                ]
            )
        return self.max_question_length


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


@dataclass(frozen=True, slots=True)
class FeatureStats:
    """Counts over the features of some examples.

    Attributes:
        num_examples: examples.
        num_features: features.
        num_tokens: tokens of all features, special ones included.
        num_truncated_questions: questions that were cut.
        num_unlabelled_examples: examples with answers none of which any window holds as a whole.
    """

    num_examples: int = 0
    num_features: int = 0
    num_tokens: int = 0
    num_truncated_questions: int = 0
    num_unlabelled_examples: int = 0

    def __add__(self, other: "FeatureStats") -> "FeatureStats":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return FeatureStats(*(mine + theirs for mine, theirs in pairs))

    @property
    def mean_tokens(self) -> float:
        """Tokens per feature."""
        return self.num_tokens / max(1, self.num_features)


@dataclass(frozen=True, slots=True)
class FeatureColumns:
    """N features as columns.

    Attributes:
        example_index: int32 [N]; this and the other one-dimensional columns are as in `Feature`.
        window: int32 [N].
        context_start: int32 [N].
        cls_token: int32 [N].
        start_token: int32 [N].
        end_token: int32 [N].
        lengths: int32 [N], tokens of each feature (L).
        context_lengths: int32 [N], context tokens of each feature (C).
        input_ids: int32 [T], all features one after the other.
        token_type_ids: int8 [T].
        context_offsets: int32 [sum of C, 2].
    """

    example_index: Int32
    window: Int32
    context_start: Int32
    cls_token: Int32
    start_token: Int32
    end_token: Int32
    lengths: Int32
    context_lengths: Int32
    input_ids: Int32
    token_type_ids: Int8
    context_offsets: Int32

    @classmethod
    def of(cls, features: Sequence[Feature]) -> "FeatureColumns":
        """The columns of these features."""

        def column(values: Iterable[int]) -> Int32:
            return np.fromiter(values, np.int32, len(features))

        return cls(
            example_index=column(feature.example_index for feature in features),
            window=column(feature.window for feature in features),
            context_start=column(feature.context_start for feature in features),
            cls_token=column(feature.cls_token for feature in features),
            start_token=column(feature.start_token for feature in features),
            end_token=column(feature.end_token for feature in features),
            lengths=column(len(feature.input_ids) for feature in features),
            context_lengths=column(len(feature.context_offsets) for feature in features),
            input_ids=np.concatenate([np.empty(0, np.int32), *(feature.input_ids for feature in features)]),
            token_type_ids=np.concatenate([np.empty(0, np.int8), *(feature.token_type_ids for feature in features)]),
            context_offsets=np.concatenate(
                [np.empty((0, 2), np.int32), *(feature.context_offsets for feature in features)]
            ),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["FeatureColumns"]) -> "FeatureColumns":
        """All rows of all parts, in order. There is at least one part."""
        names = [item.name for item in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class _Piece(NamedTuple):
    """Special tokens between two texts: ids int32 [n] and token types int8 [n]."""

    ids: Int32
    types: Int8


class _Template(NamedTuple):
    """How a tokenizer joins two texts: before FIRST between SECOND after."""

    before: _Piece
    first_type: int
    between: _Piece
    second_type: int
    after: _Piece


class FeatureBuilder:
    """Makes the features of examples with one tokenizer and one set of lengths.

    Attributes:
        max_question_length: tokens to which questions are cut.
    """

    def __init__(self, tokenizer: TokenizerSpec, spec: FeatureSpec) -> None:
        """Check the lengths against the tokenizer.

        Raises:
            ConfigError: They contradict each other.
        """
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend)
        # Its JSON does not keep this. It concerns what is encoded, not the tokens that the template adds.
        self._backend.encode_special_tokens = True
        num_special_tokens = self._backend.num_special_tokens_to_add(True)
        self.max_question_length = spec.longest_question(num_special_tokens)
        self._max_text_length = spec.max_seq_length - num_special_tokens
        self._doc_stride = spec.doc_stride
        self._question_first = tokenizer.padding_side != "left"
        self._has_exact_offsets = tokenizer.has_exact_offsets
        self._template = _template_of(self._backend, tokenizer.has_token_types)
        self._null_token_ids = [
            token_id for token_id in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token_id is not None
        ]

    def build(self, examples: Sequence[Example], first_index: int = 0) -> tuple[list[Feature], FeatureStats]:
        """The features of the examples in order, and counts over them.

        Args:
            examples: Validated examples.
            first_index: Position of the first of them in its data set.
        """
        contexts: dict[str, tuple[Int32, Int32]] = {}
        features: list[Feature] = []
        num_truncated = num_unlabelled = 0
        for example_index, example in enumerate(examples, first_index):
            if example.context not in contexts:
                contexts[example.context] = self._tokens_of(example.context)
            # Some annotators' questions begin with many blanks, which tokenizers that keep blanks would pay for.
            encoding = self._backend.encode(example.question.lstrip(), add_special_tokens=False)
            question_ids = np.array(encoding.ids[: self.max_question_length], np.int32)
            num_truncated += len(encoding.ids) > self.max_question_length
            windows = list(self._windows(example_index, question_ids, *contexts[example.context], example.answers))
            num_unlabelled += bool(example.answers) and all(
                feature.start_token == feature.cls_token for feature in windows
            )
            features.extend(windows)
        stats = FeatureStats(
            num_examples=len(examples),
            num_features=len(features),
            num_tokens=sum(len(feature.input_ids) for feature in features),
            num_truncated_questions=num_truncated,
            num_unlabelled_examples=num_unlabelled,
        )
        return features, stats

    def question_length(self, question: str) -> int:
        """Tokens of a question before it is cut."""
        return len(self._backend.encode(question.lstrip(), add_special_tokens=False).ids)

    def num_windows(self, examples: Sequence[Example]) -> Int32:
        """How many features each example has, int32 [E], without making them."""
        texts = list(dict.fromkeys(text for each in examples for text in (each.context, each.question.lstrip())))
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        length = {text: len(encoding.ids) for text, encoding in zip(texts, encodings, strict=True)}
        lengths = ((length[each.question.lstrip()], length[each.context]) for each in examples)
        counts = (len(self._starts(min(asked, self.max_question_length), read)) for asked, read in lengths)
        return np.fromiter(counts, np.int32, len(examples))

    def _starts(self, num_question_tokens: int, num_context_tokens: int) -> range:
        """The first context token of each window, of as many tokens as are left beside the question."""
        return window_starts(self._max_text_length - num_question_tokens, self._doc_stride, num_context_tokens)

    def _tokens_of(self, context: str) -> tuple[Int32, Int32]:
        """Token ids int32 [C] of a whole context, and their offsets int32 [C, 2]."""
        encoding = self._backend.encode(context, add_special_tokens=False)
        offsets = exact_offsets(context, encoding.offsets, are_exact=self._has_exact_offsets)
        return np.array(encoding.ids, np.int32), offsets

    def _windows(
        self,
        example_index: int,
        question_ids: Int32,
        context_ids: Int32,
        context_offsets: Int32,
        answers: Sequence[Answer],
    ) -> Iterator[Feature]:
        before, _, between, _, after = self._template
        capacity = self._max_text_length - len(question_ids)
        spans = [span for answer in answers if (span := answer_tokens(context_offsets, answer))]
        for window, start in enumerate(self._starts(len(question_ids), len(context_ids))):
            window_ids = context_ids[start : start + capacity]
            offsets = context_offsets[start : start + capacity]
            texts = (question_ids, window_ids) if self._question_first else (window_ids, question_ids)
            context_start = len(before.ids)
            if self._question_first:
                context_start += len(question_ids) + len(between.ids)
            cls_token = self._null_position(len(texts[0]), len(texts[1]))
            # Where the context's tokens are in the feature, as far as this window has them.
            shift = context_start - start
            held = (span for span in spans if start <= span[0] and span[1] < start + len(window_ids))
            # A window that holds another reference answer than the first one is not without an answer.
            first_token, last_token = next(held, (cls_token - shift, cls_token - shift))
            yield Feature(
                example_index=example_index,
                window=window,
                input_ids=np.concatenate([before.ids, texts[0], between.ids, texts[1], after.ids]),
                token_type_ids=self._token_types(len(texts[0]), len(texts[1])),
                context_start=context_start,
                context_offsets=offsets,
                cls_token=cls_token,
                start_token=first_token + shift,
                end_token=last_token + shift,
            )

    def _token_types(self, first_length: int, second_length: int) -> Int8:
        before, first_type, between, second_type, after = self._template
        first, second = np.full(first_length, first_type, np.int8), np.full(second_length, second_type, np.int8)
        return np.concatenate([before.types, first, between.types, second, after.types])

    def _null_position(self, first_length: int, second_length: int) -> int:
        """The token for "no answer": the CLS the template adds, else its BOS, else the first token."""
        before, _, between, _, after = self._template
        between_start = len(before.ids) + first_length
        after_start = between_start + len(between.ids) + second_length
        for token_id in self._null_token_ids:
            for piece, piece_start in ((before, 0), (between, between_start), (after, after_start)):
                if token_id in piece.ids:
                    return piece_start + list(piece.ids).index(token_id)
        return 0


def window_starts(capacity: int, doc_stride: int, num_context_tokens: int) -> range:
    """The first context token of each window that takes `capacity` tokens of a context."""
    # The last window is the first one that reaches the end of the context; an empty context has one window too.
    return range(0, max(1, num_context_tokens - doc_stride), capacity - doc_stride)


def answer_tokens(context_offsets: Int32, answer: Answer) -> tuple[int, int] | None:
    """First and last context token (inclusive) of an answer: those that share characters with it.

    On every answer of SQuAD v1.1 these are the tokens that `prepare_train_features` in the Hugging Face example
    `run_qa.py` finds, but for three cases in which that script is off. It runs to the end of the feature if the answer
    starts in the last token of the window (two features of SQuAD's train set), as special tokens have offset (0, 0).
    It can put the start behind the end where several tokens are pieces of one character, as with emoji in byte-level
    vocabularies. And it takes a neighbour where the answer begins or ends with a character that no token has. (A
    combining accent that BERT drops is the letter's here.)

    Args:
        context_offsets: int32 [C, 2], the characters of each token of the whole context.
        answer: An answer at its place in the context.

    Returns:
        The tokens, or None if the answer consists of characters that the tokenizer drops.
    """
    starts, ends = context_offsets[:, 0], context_offsets[:, 1]
    # A token without characters, such as a blank of a byte-level tokenizer, lies inside an answer but is no end of it.
    shared = np.flatnonzero((starts < answer.end_char) & (ends > answer.start_char) & (starts < ends))
    return (int(shared[0]), int(shared[-1])) if len(shared) else None


def _template_of(backend: tokenizers.Tokenizer, has_token_types: bool) -> _Template:
    """How the tokenizer joins a pair of texts, read off a pair that it joined.

    Raises:
        ConfigError: It does not put all tokens of one text before all tokens of the other.
    """
    for text in ("a", "the", "1", *sorted(backend.get_vocab())):
        if backend.encode(text, add_special_tokens=False).ids:
            break
    encoding = backend.encode(text, text)
    ids = np.array(encoding.ids, np.int32)
    types = np.array(encoding.type_ids if has_token_types else [0] * len(ids), np.int8)
    # Sequence numbers: 0 and 1 are the texts, None (here -1) is a special token.
    sequences = np.array([-1 if number is None else number for number in encoding.sequence_ids])
    first, second = np.flatnonzero(sequences == 0), np.flatnonzero(sequences == 1)
    contiguous = all(len(part) and part[-1] - part[0] == len(part) - 1 for part in (first, second))
    if not contiguous or first[-1] > second[0]:
        raise ConfigError(["the tokenizer does not join pairs of texts one after the other; pass another one"])

    def piece(start: int, end: int) -> _Piece:
        return _Piece(ids[start:end], types[start:end])

    return _Template(
        before=piece(0, first[0]),
        first_type=int(types[first[0]]),
        between=piece(first[-1] + 1, second[0]),
        second_type=int(types[second[0]]),
        after=piece(second[-1] + 1, len(ids)),
    )
