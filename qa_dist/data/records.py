"""The words of this project, each meaning one thing.

*Example*: one question about one context, with its reference answers; no reference means unanswerable.
*Feature*: one window of an example, tokenised: what the model reads. A long context gives several features.
*Window*: the position of a feature among the features of its example (0, 1, ...).
*Span*: a first and a last token (both inclusive) inside a feature.
*Candidate*: a span with its logits.
*Prediction*: an answer text for an example, with its score and place in the context.

Conventions: `*_char` counts characters (Python string indices), ends exclusive; `*_token` counts tokens from the start
of the feature, ends inclusive.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Answer:
    """A reference answer: its text and the character of the context at which it starts."""

    text: str
    start_char: int

    @property
    def end_char(self) -> int:
        """One past the last character of the answer."""
        return self.start_char + len(self.text)


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one context.

    Attributes:
        id: what predictions name it by.
        question: the question.
        context: the text that is read.
        answers: the reference answers that have a place in the context; what labels are made of.
        title: of the article that the context is from.
        other_texts: reference answers whose place is not known; predictions are scored against them too.
        has_references: whether its references are known. If they are and there are none, it is unanswerable.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    title: str = ""
    other_texts: tuple[str, ...] = ()
    has_references: bool = True

    @property
    def is_unanswerable(self) -> bool:
        """Whether it is known that there is no answer."""
        return self.has_references and not self.answers and not self.other_texts


@dataclass(frozen=True, slots=True)
class Feature:
    """One window of an example.

    Attributes:
        example_index: position of the example in its data set.
        window: position of this feature among the features of its example.
        input_ids: int32 [L], special tokens included, no padding.
        token_type_ids: int8 [L]; all zero for models without token types.
        context_start: first token of the context part.
        context_offsets: int32 [C, 2]: start and end character in the context of each of the C context tokens, which
            are the tokens context_start .. context_start + C - 1.
        cls_token: the token that stands for "no answer" (CLS, or the tokenizer's equivalent).
        start_token: label: first token of the first reference answer that is whole in this window, or `cls_token` if
            none is.
        end_token: label: last token (inclusive), or `cls_token`.
    """

    example_index: int
    window: int
    input_ids: npt.NDArray[np.int32]
    token_type_ids: npt.NDArray[np.int8]
    context_start: int
    context_offsets: npt.NDArray[np.int32]
    cls_token: int
    start_token: int
    end_token: int

    def __repr__(self) -> str:
        label = f"start_token={self.start_token}, end_token={self.end_token}"
        return f"Feature(example {self.example_index}, window {self.window}, {len(self.input_ids)} tokens, {label})"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A span of a feature with its logits; `score` orders candidates."""

    feature_index: int
    start_token: int
    end_token: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """Sum of the logits of both ends (Devlin et al. 2019, section 4.2)."""
        return self.start_logit + self.end_logit


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer text. `start_char == end_char == -1` and an empty text mean "no answer"."""

    text: str
    score: float
    probability: float
    start_char: int
    end_char: int
