"""What counts as the same answer: the rules of the official scripts of SQuAD and of its relatives in other languages.

Exact match compares texts in a normal form. F1 compares what those consist of: words, characters, or a mixture. Each
set of rules is a row of `NORMALIZATIONS`, and gives the scores of its official script to the last digit, with one
exception: CMRC's script cuts what is not Chinese into sentences first, with a model that nltk downloads (punkt). Here
each such part is one sentence, so that a full stop before the end of a part of several sentences stays with its word.

This module needs the standard library alone; nltk is imported when CMRC's rules are used.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from qa_dist.common.errors import ConfigError

HAN = "\u4e00-\u9fa5"
"""Range of the characters that the scripts of MLQA and CMRC take for words of their own."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """Rules by which answers are compared.

    Attributes:
        name: what `--answer_normalization` calls them.
        text: the normal form of a text; equal ones match exactly.
        units: what a normal form consists of, for F1.
        num_common: how many units two lists, of a reference and of a prediction, have in common.
        cuts: characters, as in a regular expression's brackets, next to which no unit reaches over: the units of a text
            are those of its parts before and behind such a place, one after the other.
        source: the script, and the paper it is from.
    """

    name: str
    text: Callable[[str], str]
    units: Callable[[str], list[str]]
    num_common: Callable[[Sequence[str], Sequence[str]], int]
    cuts: str
    source: str


def normalization(name: str) -> Normalization:
    """The rules with this name, ready for use.

    Raises:
        ConfigError: There are none, or they need a package that is not installed.
    """
    rules = NORMALIZATIONS.get(name)
    if rules is None:
        raise ConfigError([f"--answer_normalization {name} is not one of {', '.join(NORMALIZATIONS)}"])
    # Whatever they import is imported now: a run that lacks a package must not find that out at its end.
    rules.units("a")
    return rules


def num_shared(gold: Sequence[str], predicted: Sequence[str]) -> int:
    """Size of the intersection of two multisets."""
    remaining = list(gold)
    count = 0
    for unit in predicted:
        if unit in remaining:
            remaining.remove(unit)
            count += 1
    return count


def longest_run(gold: Sequence[str], predicted: Sequence[str]) -> int:
    """Length of the longest list that is a contiguous part of both."""
    longest = 0
    # How long the common run is that ends with the last unit of `gold` looked at and each unit of `predicted`.
    before = [0] * (len(predicted) + 1)
    for unit in gold:
        row = [0] * (len(predicted) + 1)
        for place, other in enumerate(predicted, 1):
            if unit == other:
                row[place] = before[place - 1] + 1
        longest = max(longest, *row)
        before = row
    return longest


# --------------------------------------------------------------------------------------------------------- SQuAD, MLQA

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _is_mark(character: str) -> bool:
    """Whether MLQA's script takes a character for punctuation: ASCII's, and Unicode's categories P*."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _squad_text(text: str) -> str:
    return " ".join(_ENGLISH.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _articles(*words: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(words)})\b")


_ENGLISH = _articles("a", "an", "the")
_ARTICLES = {
    "ar": re.compile("ال"),  # written together with its noun, and taken out of the middle of words too
    "de": _articles(*"ein eine einen einem eines einer der die das den dem des".split()),
    "en": _ENGLISH,
    "es": _articles(*"un una unos unas el la los las".split()),
    "hi": None,
    "vi": _articles(*"của là cái chiếc những".split()),
    "zh": None,
}
_HAN_CHARACTER = re.compile(f"[{HAN}]")


def _mlqa_text(language: str) -> Callable[[str], str]:
    articles = _ARTICLES[language]

    def normal(text: str) -> str:
        text = "".join(character for character in text.lower() if not _is_mark(character))
        if articles is not None:
            text = articles.sub(" ", text)
        if language == "zh":
            text = _HAN_CHARACTER.sub(r" \g<0> ", text)
        return " ".join(text.split())

    return normal


# ------------------------------------------------------------------------------------------------------------- KorQuAD

_KORQUAD_BLANKS = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))


def _korquad_text(text: str) -> str:
    return " ".join(text.translate(_KORQUAD_BLANKS).lower().translate(_NO_PUNCTUATION).split())


def _characters(text: str) -> list[str]:
    return list("".join(text.split()))


# ---------------------------------------------------------------------------------------------------------------- CMRC

_CMRC_MARKS = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_HAN_OR_OTHERS = re.compile(f"([{HAN}])")


def _cmrc_text(text: str) -> str:
    # In this order, so that a blank beside a mark at the end stays, as in the script.
    return text.lower().strip().translate(_CMRC_MARKS)


@cache
def _word_tokenizer() -> Any:
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise ConfigError(
            ["--answer_normalization cmrc needs nltk, which is not installed; pip install 'qa-dist[cmrc]'"]
        ) from error
    return NLTKWordTokenizer()


def _cmrc_units(text: str) -> list[str]:
    units: list[str] = []
    for part in _HAN_OR_OTHERS.split(text):
        units += [part] if _HAN_CHARACTER.fullmatch(part) else _word_tokenizer().tokenize(part)
    return units


# ----------------------------------------------------------------------------------------------------------- the table

_SQUAD_SCRIPT = "evaluate-v1.1.py and evaluate-v2.0.py (Rajpurkar et al. 2016, 2018)"
_MLQA_SCRIPT = "mlqa_evaluation_v1.py (Lewis et al. 2020)"


def _rows() -> Iterable[Normalization]:
    yield Normalization("squad", _squad_text, str.split, num_shared, r"\s", _SQUAD_SCRIPT)
    yield Normalization("xquad", _squad_text, str.split, num_shared, r"\s", "SQuAD's, as Artetxe et al. 2020 say")
    for language in _ARTICLES:
        cuts = rf"\s{HAN}" if language == "zh" else r"\s"
        yield Normalization(f"mlqa:{language}", _mlqa_text(language), str.split, num_shared, cuts, _MLQA_SCRIPT)
    korean = "evaluate-korquad_v1.0.py (Lim et al. 2019)"
    yield Normalization("korquad", _korquad_text, _characters, num_shared, "\\s\uac00-\ud7a3", korean)
    chinese = "cmrc2018_evaluate.py, version 5 (Cui et al. 2019)"
    yield Normalization("cmrc", _cmrc_text, _cmrc_units, longest_run, HAN, chinese)
    yield Normalization("none", str, str.split, num_shared, r"\s", "texts as they are, words between blanks")


NORMALIZATIONS = {rules.name: rules for rules in _rows()}
"""Every set of rules by its name. A new one needs a row here, its name among the values of
`EvaluationConfig.answer_normalization`, and its rules spelled out in the test."""

SQUAD = NORMALIZATIONS["squad"]


# ------------------------------------------------------------------------------------------------------------ the note

_SCRIPTS = {
    "Chinese or Japanese": ("\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff", "Chinese has mlqa:zh and cmrc"),
    "Thai, Lao, Khmer or Burmese": ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff", "go by exact_match"),
    "Korean": ("\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3", "use korquad"),
    "Arabic": ("\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff", "use mlqa:ar"),
    "Hindi": ("\u0900-\u097f", "use mlqa:hi"),
}
"""Scripts that SQuAD's rules do not fit: characters, and what to use. Chinese, Japanese and Thai put no blanks between
words, so that a whole answer is one word; Korean ties particles to words; Arabic ties its article to words; and the
marks of Arabic and Hindi are not ASCII's, and stay."""

_LETTER = re.compile(r"[^\W\d_]")


def unfit_note(references: Iterable[Sequence[str]], rules: Normalization) -> str | None:
    """A sentence if most letters of the references are of a script for which SQuAD's F1 says little; None otherwise."""
    if rules is not SQUAD:
        return None
    text = "".join(text for texts in references for text in texts)
    total = len(_LETTER.findall(text))
    counts = {script: len(re.findall(f"[{characters}]", text)) for script, (characters, _) in _SCRIPTS.items()}
    script = max(counts, key=counts.__getitem__)
    if not counts[script] or 2 * counts[script] <= total:
        return None
    return (
        f"most of the reference text is {script}, for which F1 by SQuAD's rules says little; --answer_normalization "
        f"has others ({_SCRIPTS[script][1]})"
    )
