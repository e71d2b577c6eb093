"""Features to measure with: the lengths of SQuAD, tokens of no meaning, and no tokenizer needed.

Beside them, a tokenizer of chosen words, for text that is made up.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.data.sample import synthetic_lengths
from qa_dist.features.store import FeatureStore

NUM_SPECIAL_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Windows:
    """Lengths of features, as windows over contexts.

    Attributes:
        lengths: int32 [N], tokens of each feature, special tokens included.
        question_lengths: int32 [N], how many of them are the question's.
    """

    lengths: npt.NDArray[np.int32]
    question_lengths: npt.NDArray[np.int32]


def squad_windows(num_features: int, *, seed: int, max_seq_length: int = 384, doc_stride: int = 128) -> Windows:
    """The lengths of `num_features` features with the distribution of SQuAD v1.1 train.

    Context and question lengths are drawn as `qa_dist.data.sample` draws them, and contexts are cut into windows
    that share `doc_stride` tokens, as `qa_dist.features.windows` cuts them.
    """
    lengths: list[int] = []
    question_lengths: list[int] = []
    # Every example gives at least one feature; those behind the last one wanted are dropped.
    for context, question in zip(*synthetic_lengths(num_features, seed=seed), strict=True):
        question = min(int(question), max_seq_length - NUM_SPECIAL_TOKENS - doc_stride - 1)
        room = max_seq_length - NUM_SPECIAL_TOKENS - question
        start = 0
        while True:
            taken = min(room, int(context) - start)
            lengths.append(NUM_SPECIAL_TOKENS + question + taken)
            question_lengths.append(question)
            if start + taken >= context:
                break
            start += room - doc_stride
        if len(lengths) >= num_features:
            break
    return Windows(
        np.array(lengths[:num_features], dtype=np.int32), np.array(question_lengths[:num_features], dtype=np.int32)
    )


def wordpiece_tokenizer(pieces: Iterable[str], *, lowercase: bool = True, **options: Any) -> Any:
    """A WordPiece tokenizer as BERT's, that knows these words and pieces of words behind the special tokens.

    Args:
        pieces: In the order of their numbers, from 5 on; what continues a word begins with "##".
        lowercase: Whether text is brought to lower case, without accents.
        **options: Of `PreTrainedTokenizerFast`, such as `padding_side`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    backend = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )


class SyntheticStore(FeatureStore):
    """A feature store in memory, made of random tokens in features of SQuAD's lengths; without texts."""

    def __init__(
        self,
        num_features: int,
        *,
        seed: int,
        vocab_size: int,
        max_seq_length: int = 384,
        doc_stride: int = 128,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        """Make one of `num_parts` equal parts of `num_features` features.

        The lengths and tokens of all parts together do not depend on how many there are.
        """
        # The base class maps files; everything it offers on features works on these arrays as well.
        windows = squad_windows(num_features, seed=seed, max_seq_length=max_seq_length, doc_stride=doc_stride)
        rng = np.random.default_rng((seed, 1))
        # The upper half of a vocabulary has no special tokens.
        tokens = rng.integers(vocab_size // 2, vocab_size, int(windows.lengths.sum()), dtype=np.int32)
        first = np.concatenate([[0], np.cumsum(windows.lengths, dtype=np.int64)])
        begin, end = (number * num_features // num_parts for number in (part, part + 1))
        self.lengths = windows.lengths[begin:end]
        self.num_features = self.num_examples = len(self.lengths)
        self.fingerprint = f"synthetic:{num_features}:{seed}:{vocab_size}:{max_seq_length}:{doc_stride}:{begin}:{end}"
        self.example_ids = [f"synthetic-{index}" for index in range(begin, end)]
        self.example_index = np.arange(self.num_features, dtype=np.int32)
        self.window = np.zeros(self.num_features, dtype=np.int32)
        self.cls_token = np.zeros(self.num_features, dtype=np.int32)
        self.context_start = windows.question_lengths[begin:end] + np.int32(2)
        self.context_length = self.lengths - self.context_start - np.int32(1)
        offset = (self.context_length * rng.random(num_features)[begin:end]).astype(np.int32)
        self.start_token = self.context_start + offset
        self.end_token = np.minimum(self.start_token + np.int32(3), self.context_start + self.context_length - 1)
        self._input_ids = tokens[first[begin] : first[end]]
        self._first_token = first[begin : end + 1] - first[begin]
        position = np.arange(len(self._input_ids)) - np.repeat(self._first_token[:-1], self.lengths)
        self._token_type_ids = (position >= np.repeat(self.context_start, self.lengths)).astype(np.int8)

    def __repr__(self) -> str:
        return f"SyntheticStore({self.num_features} features)"
