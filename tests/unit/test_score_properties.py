"""Properties of scores that hold for any text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_dist.evaluation.normalization import SQUAD
from qa_dist.evaluation.score_files import load_predictions
from qa_dist.evaluation.scoring import score_v1, score_v2
from tests.unit.any_text import any_texts
from tests.unit.evaluation.test_scoring import plain_exact, plain_f1, plain_percent, plain_v2

answer_words = st.sampled_from(["cat", "Cat", "dog", "the", "é", "e\u0301", "👩‍👩‍👧", "שלום", "12"])
answer_texts = st.one_of(any_texts, st.lists(answer_words, max_size=6).map(" ".join))
questions = st.lists(
    st.tuples(st.lists(answer_texts, max_size=3), answer_texts, st.floats(-5, 5)), min_size=1, max_size=6
).map(lambda found: {f"q{number}": item for number, item in enumerate(found)})


@settings(max_examples=150)
@given(found=questions, limit=st.sampled_from([1.0, 0.0]), with_odds=st.booleans())
def test_scores_are_the_official_formula_on_any_text(found: dict[str, Any], limit: float, with_odds: bool) -> None:
    references = {key: golds for key, (golds, _, _) in found.items()}
    predictions = {key: text for key, (_, text, _) in found.items()}
    odds = {key: value for key, (_, _, value) in found.items()} if with_odds else None
    scores = score_v2(references, predictions, null_odds=odds, na_prob_thresh=limit)
    assert list(scores.items()) == list(plain_v2(references, predictions, odds, limit).items())
    assert all(0 <= value <= 100 for key, value in scores.items() if key.endswith(("exact", "f1")))
    for prefix in ("", "HasAns_", "NoAns_", "best_"):
        if f"{prefix}exact" in scores:
            assert scores[f"{prefix}exact"] <= scores[f"{prefix}f1"] + 1e-9

    answerable = {key: golds for key, golds in references.items() if golds}
    if answerable:
        texts = {key: predictions[key] for key in answerable}
        plain = score_v1(answerable, texts)
        exact = [max(plain_exact(gold, texts[key]) for gold in golds) for key, golds in answerable.items()]
        f1 = [max(plain_f1(gold, texts[key], version_2=False) for gold in golds) for key, golds in answerable.items()]
        assert plain == {"exact_match": plain_percent(exact), "f1": plain_percent(f1)}
        assert all(0 <= value <= 100 for value in plain.values())
        if all(SQUAD.text(gold) for golds in answerable.values() for gold in golds):
            assert plain["exact_match"] <= plain["f1"] + 1e-9


@given(found=questions, order=st.randoms(use_true_random=False))
def test_the_order_of_questions_and_references_does_not_matter(found: dict[str, Any], order: Any) -> None:
    def scored(keys: list[str], *, shuffled: bool) -> dict[str, float | int]:
        references = {key: list(found[key][0]) for key in keys}
        if shuffled:
            for golds in references.values():
                order.shuffle(golds)
        return score_v2(references, {key: found[key][1] for key in reversed(keys)})

    keys = list(found)
    expected = scored(keys, shuffled=False)
    order.shuffle(keys)
    assert scored(keys, shuffled=True) == pytest.approx(expected, abs=1e-9)


@given(golds=st.lists(any_texts, min_size=1, max_size=3), text=any_texts, more=any_texts)
def test_one_more_reference_never_costs_anything(golds: list[str], text: str, more: str) -> None:
    few, many = score_v1({"q": golds}, {"q": text}), score_v1({"q": [*golds, more]}, {"q": text})
    assert all(many[key] >= few[key] for key in few)
    same = score_v1({"q": [*golds, text]}, {"q": text})
    assert same["exact_match"] == 100.0
    assert same["f1"] == (100.0 if SQUAD.text(text) else 0.0)


@given(text=any_texts)
def test_the_normal_form_is_its_own_normal_form(text: str) -> None:
    once = SQUAD.text(text)
    assert SQUAD.text(once) == once
    assert once == " ".join(once.split())
    assert SQUAD.text(f"The {text}!") == SQUAD.text(f"the {text}")


def joined(text: str) -> str:
    """Text in which two halves of a surrogate pair that meet are one character, as in what JSON's escapes stand for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(predictions=st.dictionaries(any_texts.map(joined), any_texts.map(joined), max_size=4))
def test_prediction_files_of_any_text_read_back_the_same(predictions: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(predictions), encoding="utf-8")
    assert load_predictions(path).texts == predictions
