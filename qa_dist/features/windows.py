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

Neither torch nor transformers is imported, so that a process that tokenises starts in a fraction of a second.

Shapes: N features, L tokens of a feature, C context tokens of a feature, T tokens of all features.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from qa_dist.common.arrays import Int8, Int32
from qa_dist.common.errors import ConfigError
from qa_dist.data.records import Answer, Example, Feature
from qa_dist.features.offsets import exact_offsets
from qa_dist.features.tokenizer import TokenizerSpec, template_of


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
        self._template = template_of(self._backend, tokenizer.has_token_types)
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

    def window_step(self, num_question_tokens: int) -> int:
        """Context tokens from the start of one window to the start of the next."""
        return self._max_text_length - num_question_tokens - self._doc_stride

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
