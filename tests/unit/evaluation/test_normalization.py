"""The rules of other scripts than SQuAD's, against the same rules spelled out one character at a time."""

import itertools
import random
import re
import string
import sys
import typing
import unicodedata

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.config.answer_rules import AnswerNormalization
from qa_dist.evaluation import normalization as module
from qa_dist.evaluation.normalization import NORMALIZATIONS, SQUAD, longest_run, normalization, num_shared, unfit_note
from qa_dist.evaluation.scoring import score_v1, score_v2
from tests.unit.evaluation.oracles import skip_without_package_of

# The scripts, spelled out: characters one after the other, and every pair of places.


def is_han(character):
    return 0x4E00 <= ord(character) <= 0x9FA5


def plain_words(text, articles):
    """Words between blanks; `articles` stand for blanks where no letter, digit or underscore touches them."""
    blanks = list(text)
    for article in articles:
        for start in range(len(text) - len(article) + 1):
            end = start + len(article)
            before = text[start - 1] if start else " "
            after = text[end] if end < len(text) else " "
            if text[start:end] == article and not any(c.isalnum() or c == "_" for c in (before, after)):
                blanks[start:end] = " " * len(article)
    return "".join(blanks).split()


MLQA_ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
}


def plain_mlqa(language, text):
    kept = [c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P"]
    if language == "zh":
        kept = list(itertools.chain.from_iterable((" ", c, " ") if is_han(c) else (c,) for c in kept))
    joined = "".join(kept)
    if language == "ar":
        joined = joined.replace("ال", " ")
    words = plain_words(joined, MLQA_ARTICLES.get(language, "").split())
    return " ".join(words), words


def plain_squad(text):
    words = plain_words("".join(c for c in text.lower() if c not in string.punctuation), ["a", "an", "the"])
    return " ".join(words), words


def plain_korquad(text):
    for mark in ["'", '"', "《", "》", "<", ">", "〈", "〉", "(", ")", "‘", "’"]:
        text = text.replace(mark, " ")
    words = "".join(c for c in text.lower() if c not in string.punctuation).split()
    return " ".join(words), [c for word in words for c in word]


CMRC_MARKS = [*"-:_*^/\\~`+=", *"，。：？！“”；’《》", *"·、「」（）－～『』"]


def plain_cmrc(text):
    from nltk.tokenize import NLTKWordTokenizer

    kept = "".join(c for c in text.lower().strip() if c not in CMRC_MARKS)
    units, waiting = [], ""
    for c in kept:
        if is_han(c):
            units += [*NLTKWordTokenizer().tokenize(waiting), c]
            waiting = ""
        else:
            waiting += c
    return kept, units + NLTKWordTokenizer().tokenize(waiting)


def plain_form(name, text):
    if name.startswith("mlqa:"):
        return plain_mlqa(name[5:], text)
    rules = {"squad": plain_squad, "xquad": plain_squad, "korquad": plain_korquad, "cmrc": plain_cmrc}
    return rules[name](text) if name != "none" else (text, text.split())


def plain_common(name, gold, predicted):
    if name != "cmrc":
        return sum(min(gold.count(unit), predicted.count(unit)) for unit in set(gold))
    runs = [gold[i:j] for i in range(len(gold)) for j in range(i + 1, len(gold) + 1)]
    within = [predicted[i:j] for i in range(len(predicted)) for j in range(i + 1, len(predicted) + 1)]
    return max((len(run) for run in runs if run in within), default=0)


def plain_score(name, golds, prediction):
    """Exact match and F1 of one question, as all these scripts have them."""
    text, units = plain_form(name, prediction)
    exact, f1 = [], []
    for gold in golds:
        gold_text, gold_units = plain_form(name, gold)
        common = plain_common(name, gold_units, units)
        exact.append(float(gold_text == text))
        f1.append(0.0)
        if common:
            precision, recall = 1.0 * common / len(units), 1.0 * common / len(gold_units)
            f1[-1] = (2 * precision * recall) / (precision + recall)
    return max(exact), max(f1)


PIECES = [
    *"the a an una la der die das des của là Những ال الكتاب في कमल में। सौ किताब、 Straße ΟΔΟΣ İzmir ½".split(),
    *"九 克朗 每天， 《書》 「水」 · …… 서울 서울은 《한강》 ‘물’ (1871) <b> “quote” it's".split(),
    *"U.S. can't 3.5% a–b a-b the–end".split(),
    *("Mill", "mill.", "mill,", "_x_", "x'y", '"mill"', "  ", "\u3000", "\xa0", "\n", "-", "，", "。", "(", ")", ". "),
]


def random_text(draw):
    return draw.choice(["", " "]).join(draw.choices(PIECES, k=draw.randint(0, 6)))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_scores_are_those_of_the_rules_spelled_out(name):
    skip_without_package_of(name)
    draw, rules = random.Random(name), NORMALIZATIONS[name]
    num_partial = num_exact = 0
    for _ in range(600):
        golds = [random_text(draw) for _ in range(draw.randint(1, 3))]
        # Near a reference as often as not.
        prediction = draw.choice([random_text(draw), golds[0] + draw.choice(PIECES), golds[-1][draw.randint(0, 3) :]])
        exact, f1 = plain_score(name, golds, prediction)
        found = score_v1({"q": golds}, {"q": prediction}, rules=rules)
        assert found == {"exact_match": 100.0 * exact, "f1": 100.0 * f1}, (golds, prediction)
        num_exact += exact
        num_partial += 0 < f1 < 1
    assert num_exact > 40
    assert num_partial > 80


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_no_unit_reaches_over_a_cut(name):
    """What ceilings rely on: behind and before a place at a cut, texts have their units one after the other."""
    skip_without_package_of(name)
    draw, rules = random.Random(name), NORMALIZATIONS[name]
    cut = re.compile(f"[{rules.cuts}]")
    num_cuts = 0
    for _ in range(800):
        text = random_text(draw)
        place = draw.randint(0, len(text))
        if cut.search(text[max(0, place - 1) : place + 1]):
            before, behind = (rules.units(rules.text(part)) for part in (text[:place], text[place:]))
            assert before + behind == rules.units(rules.text(text)), (text, place)
            num_cuts += 1
    assert num_cuts > 20


# What the official scripts say; no code of theirs is here.
KNOWN = [
    ("squad", "每天九克朗", "九克朗", 0.0, 0.0),
    ("mlqa:zh", "每天九克朗", "九克朗", 0.0, 75.0),
    ("cmrc", "每天九克朗", "九克朗", 0.0, 75.0),
    ("mlqa:zh", "每天九克朗", "每天9克朗", 0.0, 80.0),
    ("cmrc", "每天九克朗", "每天9克朗", 0.0, 40.0),
    ("mlqa:de", "die Mühle", "Mühle", 100.0, 100.0),
    ("squad", "die Mühle", "Mühle", 0.0, 2 / 3 * 100),
    ("mlqa:es", "los «molinos»", "molinos", 100.0, 100.0),
    ("mlqa:vi", "cái cầu", "cầu", 100.0, 100.0),
    ("mlqa:ar", "الكتاب", "كتاب", 100.0, 100.0),
    ("mlqa:hi", "सौ।", "सौ", 100.0, 100.0),
    ("korquad", "《서울》", "서울", 100.0, 100.0),
    ("korquad", "서울은", "서울", 0.0, 80.0),
    ("squad", "서울은", "서울", 0.0, 0.0),
    ("none", "The mill", "the mill", 0.0, 50.0),
]


@pytest.mark.parametrize(("name", "gold", "prediction", "exact", "f1"), KNOWN)
def test_known_answers(name, gold, prediction, exact, f1):
    skip_without_package_of(name)
    found = score_v1({"q": [gold]}, {"q": prediction}, rules=normalization(name))
    assert found == {"exact_match": exact, "f1": pytest.approx(f1, rel=1e-12)}


def test_the_longest_run_is_contiguous_and_the_shared_units_are_not():
    assert longest_run("abcd", "abxcd") == 2
    assert num_shared("abcd", "abxcd") == 4
    assert longest_run("aab", "aaab") == 3
    assert num_shared("aab", "aaab") == 3
    assert longest_run("", "a") == longest_run("a", "b") == num_shared("a", "b") == 0


def test_unanswerable_questions_are_scored_as_in_version_2():
    rules = normalization("korquad")
    scores = score_v2({"a": ["서울은"], "b": [], "c": ["《》"]}, {"a": "서울", "b": "", "c": ""}, rules=rules)
    assert scores["NoAns_exact"] == 100.0
    assert scores["HasAns_f1"] == pytest.approx((80 + 100) / 2)


def test_the_option_has_every_name_and_no_other():
    assert set(typing.get_args(AnswerNormalization)) == set(NORMALIZATIONS)


def test_names_that_are_not_there_are_refused():
    for name in ("mlqa", "mlqa:fr", "SQuAD", ""):
        with pytest.raises(ConfigError, match=r"is not one of squad, xquad, mlqa:ar, .*mlqa:zh, korquad, cmrc, none"):
            normalization(name)


def test_without_nltk_the_rules_of_cmrc_are_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    module._word_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match=r"cmrc needs nltk, which is not installed; pip install 'qa-dist\[cmrc\]'"):
        normalization("cmrc")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["每天九克朗", "x"], "Chinese or Japanese"),
        (["カタカナ"], "Chinese or Japanese"),
        (["กรุงเทพ"], "Thai"),
        (["서울은"], "korquad"),
        (["الكتاب"], "mlqa:ar"),
        (["सौ किताब"], "mlqa:hi"),
        (["the mill", "九"], None),
        (["Мельница", "ο μύλος", "Mühle"], None),
        (["1871", ""], None),
        ([], None),
    ],
)
def test_a_note_where_f1_by_words_says_little(texts, said):
    note = unfit_note([texts], SQUAD)
    assert (note is None) if said is None else (said in note)
    assert unfit_note([texts], normalization("xquad")) is None
