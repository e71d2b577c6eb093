"""The data that comes with the package: a small question-answering set, and any number of synthetic examples.

*The sample* (`sample_path`) is two SQuAD v2.0 files, a training and a held-out part, which share no subject, paragraph
or proper name. The encyclopaedic paragraphs were written for this project. They are fiction: the people, places, dates
and figures in them are invented, even where a story resembles a true one. Use them to learn and to test with, never as
a source. Each question has one reference answer at a verified offset; about one in nine has none.

*Synthetic examples* (`synthetic_examples`) have the lengths of SQuAD and no meaning, for measuring speed and memory at
any scale. Context, question and answer lengths are not modelled: they are drawn from quantiles measured on the 87,599
questions of SQuAD v1.1 train with the bert-base-uncased WordPiece tokenizer, each independently of the others (the
correlation of context and question length in SQuAD is 0.01). Every word is one token of that vocabulary, so lengths in
words are lengths in tokens. At max_seq_length 384 and doc_stride 128 (overlap) SQuAD has 170.75 tokens per feature.

Shapes: L tokens of a context, punctuation included.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from qa_dist.common.errors import UserError
from qa_dist.data.records import Answer, Example

Split = Literal["train", "validation"]

# Quantiles of SQuAD v1.1 train over questions, in WordPiece tokens without special tokens.
_LEVELS = [
    0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75,
    0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995, 0.999, 1
]  # fmt: skip
_CONTEXT_QUANTILES = [
    25, 36, 40, 49, 68, 92, 102, 108, 114, 120, 125, 131, 137, 143, 150, 158, 166, 174, 185, 199, 215, 239,
    254, 278, 296, 327, 372, 411, 523, 853
]  # fmt: skip
_QUESTION_QUANTILES = [
    1, 5, 6, 6, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 16, 18, 19, 20, 21, 23, 25, 27, 32,
    61
]  # fmt: skip
_ANSWER_QUANTILES = [
    1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7, 9, 10, 13, 15, 19, 24, 27, 34, 68
]  # fmt: skip


def _split(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


_WORDS: dict[str, tuple[str, ...]] = {
    "determiner": ("the", "a", "this", "that", "one", "another", "every", "each", "some", "any"),
    "adjective": _split(
        """old young small large great little long short high low new early late dark light bright black white red
        green blue brown golden silver warm cold hot cool wet dry clean quiet loud soft hard strong weak fast slow
        heavy deep wide narrow round flat sharp smooth rich poor free busy empty full open closed simple strange
        famous modern ancient royal local foreign northern southern eastern western common rare fine plain proud
        brave gentle happy sad lucky"""
    ),
    "noun": _split(
        """river bridge mountain forest island village city town street house castle church school garden field farm
        road railway station train ship boat harbor sea lake valley hill desert coast bay beach wall tower door window
        room floor roof table chair bed book letter paper page story song poem play film picture map clock bell lamp
        mirror box bag coat hat shoe ring crown sword gun wheel engine machine tool rope chain glass bottle cup plate
        knife bread milk butter cheese salt sugar tea coffee wine fish bird horse dog cat cow sheep pig wolf bear lion
        mouse bee tree flower leaf root seed apple grass corn rice stone rock sand gold silver iron copper steel wood
        coal oil water fire ice snow rain wind storm cloud sun moon star night morning summer winter spring day week
        month year century king queen prince lord knight soldier officer captain sailor doctor nurse teacher student
        writer painter singer actor player worker farmer hunter driver pilot judge lawyer priest bishop monk
        guest friend neighbor brother sister mother father son daughter child baby family crowd army team club
        council court market bank shop hotel hospital library museum theater university college factory mill mine
        company office law treaty war battle peace game match race prize gift price tax coin debt trade journey dream
        voice face hand foot heart eye"""
    ),
    "verb": _split(
        """carried crossed opened closed found lost built made sold bought held kept saw heard watched followed led
        met left reached passed entered joined helped saved killed won gave took brought sent received described
        painted wrote read told asked answered called named moved turned pulled pushed lifted dropped broke cut burned
        covered filled changed replaced designed founded ruled owned used needed wanted liked loved feared expected
        remembered discovered studied taught caught protected visited served supported showed
        offered"""
    ),
    "preposition": _split(
        """in on under over near behind beside above below across through around along between before after during
        without against toward from with by of for into outside inside beyond"""
    ),
    "link": ("and", "but", "while", "because", "when", "where", "until", "since", "although", "so"),
    "stop": (".",),
}
_CATEGORIES = tuple(_WORDS)
_STOP = _CATEGORIES.index("stop")
_NOUN = _CATEGORIES.index("noun")
_SIZES = np.array([len(words) for words in _WORDS.values()], dtype=np.uint64)
_TABLE = np.array(
    [[words[i % len(words)] for i in range(int(_SIZES.max()))] for words in _WORDS.values()], dtype=object
)

# The inverse of each distribution at 4096 evenly spaced probabilities, indexed by the top bits of a 64-bit draw.
_INVERSE_SHIFT = 64 - 12
_CONTEXT, _QUESTION, _ANSWER = (
    np.rint(np.interp((np.arange(4096) + 0.5) / 4096, _LEVELS, quantiles)).astype(int).tolist()
    for quantiles in (_CONTEXT_QUANTILES, _QUESTION_QUANTILES, _ANSWER_QUANTILES)
)

# Sentence shapes, by the first letters of the categories. A context walks round them from a random start.
_SENTENCES = _split(
    "dnvdanpdns dnpdnvdns dannvdnpdanlanvdns danvdns dnvdnlnvdanpdns pdandnvdans dnlanvdns danpdnvdanpdns "
    "anvdnpdnlndvpdns dnvpdanpdns pdndnvdnlanvdns dnvdannpdanlnvdnpdns"
)
_LETTERS = {category[0]: number for number, category in enumerate(_CATEGORIES)}
_LOOP = np.array([_LETTERS[letter] for letter in "".join(_SENTENCES)])
_STARTS = np.flatnonzero(np.roll(_LOOP, 1) == _STOP)


def sample_path(split: Split) -> Path:
    """The path of the sample's training or held-out part, a SQuAD v2.0 JSON file inside the package.

    Raises:
        UserError: `split` is neither "train" nor "validation".
    """
    if split not in get_args(Split):
        raise UserError(f"the sample has no split {split!r}; choose one of {', '.join(get_args(Split))}")
    return Path(str(files("qa_dist"))) / "data" / f"sample-{split}.json"


def synthetic_examples(num_examples: int, *, seed: int) -> Iterator[Example]:
    """The first synthetic examples of `seed`, one after another.

    An example depends on the seed and its number only, so a longer set begins with a shorter one. The generator is
    counter-based (Philox, raw bits), hence the same with every version of numpy.
    """
    return (_synthetic_example(index, seed) for index in range(num_examples))


def synthetic_lengths(num_examples: int, *, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Context and question lengths in tokens, both int64 [num_examples], distributed as those of the examples.

    More of the same seed begin with the same ones.
    """
    draws = np.random.default_rng(seed).integers(0, 4096, (num_examples, 2))
    return np.array(_CONTEXT)[draws[:, 0]], np.array(_QUESTION)[draws[:, 1]]


def _synthetic_example(index: int, seed: int) -> Example:
    """Example number `index` of `seed`: its question repeats the words before its answer."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, index])
    draws: list[int] = bits.random_raw(5).tolist()
    num_context, num_question, num_answer = (
        table[draw >> _INVERSE_SHIFT] for draw, table in zip(draws, (_CONTEXT, _QUESTION, _ANSWER), strict=False)
    )
    tokens = _context_tokens(num_context, draws[3] % len(_STARTS), bits)

    start = draws[4] % (num_context - 1)
    if tokens[start] == ".":
        start += 1  # two full stops never meet, and the last one is out of reach
    end = min(start + num_answer, tokens.index(".", start))
    num_copied = max(num_question - 2, 1)
    copied = [token for token in tokens[max(0, start - 2 * num_copied) : start] if token != "."][-num_copied:]
    if len(copied) < num_copied:  # the answer is near the beginning: go round
        others = [token for token in tokens[end:] + tokens[:start] if token != "."]
        copied = list(islice(cycle(others), num_copied))

    prefix = _join(tokens[:start])
    return Example(
        id=f"synthetic-{seed}-{index}",
        question=f"What {' '.join(copied).lower()}?",
        context=_join(tokens),
        answers=(Answer(text=" ".join(tokens[start:end]), start_char=len(prefix) + (1 if prefix else 0)),),
        title="Synthetic",
    )


def _context_tokens(num_tokens: int, sentence: int, bits: np.random.Philox) -> list[str]:
    """L words and full stops, starting with the given sentence shape and ending with a full stop."""
    positions = (_STARTS[sentence] + np.arange(num_tokens)) % len(_LOOP)
    categories: npt.NDArray[np.int64] = _LOOP[positions]
    if categories[-2] == _STOP:
        categories[-2] = _NOUN
    categories[-1] = _STOP
    tokens: list[str] = _TABLE[categories, bits.random_raw(num_tokens) % _SIZES[categories]].tolist()
    tokens[0] = tokens[0].capitalize()
    for stop in np.flatnonzero(categories[:-1] == _STOP).tolist():
        tokens[stop + 1] = tokens[stop + 1].capitalize()
    return tokens


def _join(tokens: Sequence[str]) -> str:
    """The words separated by spaces, full stops joined to the word before them."""
    return " ".join(tokens).replace(" .", ".")
