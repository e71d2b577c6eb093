"""Scoring against the published scores of real predictions, and against the scripts' definitions spelled out."""

import collections
import gzip
import json
import math
import re
import string
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import DataError, ScoringError
from qa_dist.evaluation.normalization import SQUAD, normalization
from qa_dist.evaluation.score_files import load_null_odds, load_predictions, load_references
from qa_dist.evaluation.scoring import (
    f1_of_silence,
    metric_path,
    score_v1,
    score_v2,
    unknown_predictions,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown\tfox!", "quick brown fox"),
        ("a an the", ""),
        ("U.S.A.", "usa"),
        ("an-other", "another"),
        ("a\N{EN DASH}b", "\N{EN DASH}b"),
        ("the\N{RIGHT SINGLE QUOTATION MARK}s", "\N{RIGHT SINGLE QUOTATION MARK}s"),
        ("A\N{NO-BREAK SPACE}café", "café"),
        ("$12.5", "125"),
        ("", ""),
    ],
)
def test_normal_form(text, normal):
    assert SQUAD.text(text) == normal


# The definitions of the scripts, one step at a time.


def plain_normal_form(text):
    kept = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def plain_exact(gold, predicted):
    return int(plain_normal_form(gold) == plain_normal_form(predicted))


def plain_f1(gold, predicted, *, version_2):
    gold_words, words = plain_normal_form(gold).split(), plain_normal_form(predicted).split()
    if version_2 and not (gold_words and words):
        return int(gold_words == words)
    same = sum((collections.Counter(gold_words) & collections.Counter(words)).values())
    if same == 0:
        return 0
    precision, recall = same / len(words), same / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def plain_percent(values):
    total = 0
    for value in values:
        total += value
    return 100.0 * total / len(values)


def plain_best(scores, predictions, odds, references):
    """Tries "all null", then one prediction more at a time."""
    order = sorted(odds, key=lambda key: odds[key])
    best, threshold = None, 0.0
    for count in range(len(order) + 1):
        total = sum(not references[key] for key in references)
        for key in order[:count]:
            total += scores[key] if references[key] else -int(predictions[key] != "")
        if best is None or total > best:
            best, threshold = total, odds[order[count - 1]] if count else 0.0
    return 100.0 * best / len(scores), threshold


def plain_v2(references, predictions, odds, limit):
    golds = {key: [text for text in texts if plain_normal_form(text)] or [""] for key, texts in references.items()}
    exact = {key: max(plain_exact(gold, predictions[key]) for gold in golds[key]) for key in golds}
    f1 = {key: max(plain_f1(gold, predictions[key], version_2=True) for gold in golds[key]) for key in golds}
    result = {}
    for prefix, keys in [
        ("", list(references)),
        ("HasAns_", [key for key in references if references[key]]),
        ("NoAns_", [key for key in references if not references[key]]),
    ]:
        if keys:
            for name, raw in [("exact", exact), ("f1", f1)]:
                final = [int(not references[k]) if (odds or {}).get(k, 0.0) > limit else raw[k] for k in keys]
                result[prefix + name] = plain_percent(final)
            result[prefix + "total"] = len(keys)
    if odds is not None:
        for name, raw in [("exact", exact), ("f1", f1)]:
            result["best_" + name], result[f"best_{name}_thresh"] = plain_best(raw, predictions, odds, references)
    return result


TEXT = st.lists(st.sampled_from(["the", "a", "cat", "Cat", "dog", ".", "dog.", "é"]), max_size=4).map(" ".join)
ODDS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -2.0]), st.floats(-5, 5))


@settings(deadline=None)
@given(
    questions=st.lists(
        st.tuples(st.one_of(st.just([]), st.lists(TEXT, min_size=1, max_size=3)), TEXT, ODDS), min_size=1, max_size=12
    ),
    limit=st.sampled_from([1.0, 0.0, -1.0]),
    with_odds=st.booleans(),
)
@example(questions=[(["the", "."], "", 0.0), (["."], "the", 0.0)], limit=1.0, with_odds=True)
@example(questions=[([], "cat", 2.0), (["cat"], "cat", 2.0)], limit=1.0, with_odds=True)
def test_scores_follow_the_definitions(questions, limit, with_odds):
    references = {f"q{i}": golds for i, (golds, _, _) in enumerate(questions)}
    predictions = {f"q{i}": text for i, (_, text, _) in enumerate(questions)}
    odds = {f"q{i}": value for i, (_, _, value) in enumerate(questions)} if with_odds else None
    found = score_v2(references, predictions, null_odds=odds, na_prob_thresh=limit)
    assert list(found.items()) == list(plain_v2(references, predictions, odds, limit).items())

    answerable = {key: golds for key, golds in references.items() if golds}
    if answerable:
        texts = {key: predictions[key] for key in answerable}
        assert score_v1(answerable, texts) == {
            "exact_match": plain_percent([max(plain_exact(g, texts[k]) for g in answerable[k]) for k in answerable]),
            "f1": plain_percent(
                [max(plain_f1(g, texts[k], version_2=False) for g in answerable[k]) for k in answerable]
            ),
        }


def test_texts_without_words_match_exactly_but_share_no_word_in_v1():
    assert score_v1({"q": ["the"]}, {"q": "."}) == {"exact_match": 100.0, "f1": 0.0}
    assert score_v2({"q": ["the"]}, {"q": "."})["HasAns_f1"] == 100.0


def test_kinds_of_questions_that_do_not_occur_have_no_scores():
    assert list(score_v2({"q": []}, {"q": ""})) == [
        *("exact", "f1", "total"),
        *("NoAns_exact", "NoAns_f1", "NoAns_total"),
    ]
    assert "NoAns_exact" not in score_v2({"q": ["x"]}, {"q": ""})


def test_the_order_of_equal_odds_is_that_of_their_file():
    references, predictions = {"no": [], "yes": ["x"]}, {"no": "x", "yes": "x"}
    first = score_v2(references, predictions, null_odds={"yes": 0.5, "no": 0.5})
    assert (first["best_exact"], first["best_exact_thresh"]) == (100.0, 0.5)
    second = score_v2(references, predictions, null_odds={"no": 0.5, "yes": 0.5})
    assert (second["best_exact"], second["best_exact_thresh"]) == (50.0, 0.0)


def test_missing_predictions_score_nothing_where_allowed():
    references = {"a": ["x"], "b": [], "c": ["y"], "d": []}
    scores = score_v2(references, {"a": "x", "b": ""}, null_odds={"a": 0.1, "b": 0.9}, allow_missing=True)
    assert scores == {
        **{"exact": 50.0, "f1": 50.0, "total": 4},
        **{"HasAns_exact": 50.0, "HasAns_f1": 50.0, "HasAns_total": 2},
        **{"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2},
        **{"best_exact": 50.0, "best_exact_thresh": 0.1, "best_f1": 50.0, "best_f1_thresh": 0.1},
    }
    assert score_v1({"a": ["x"], "b": ["x"]}, {"a": "x"}, allow_missing=True) == {"exact_match": 50.0, "f1": 50.0}


def test_predictions_for_unknown_questions_are_ignored_as_officially_and_mentioned():
    predictions = dict.fromkeys("acdef", "x")
    assert score_v1({"a": ["x"]}, predictions) == {"exact_match": 100.0, "f1": 100.0}
    assert score_v2({"a": ["x"]}, predictions)["total"] == 1
    remark = "predictions for 4 unknown questions ('c', 'd', 'e', ...) are ignored"
    assert unknown_predictions({"a": ["x"]}, predictions) == remark
    assert unknown_predictions({"a": ["x"]}, {"a": "x"}) is None


def test_ids_that_do_not_match_are_refused():
    with pytest.raises(ScoringError, match=r"1 question \('b'\) without predictions \(--allow_missing scores them 0\)"):
        score_v1({"a": ["x"], "b": ["x"]}, {"a": "x"})
    for allow_missing in (False, True):
        # A question without odds is no question without a prediction, and cannot be let pass as one.
        with pytest.raises(ScoringError, match=r"^1 predicted question \('b'\) without null odds; give odds for all"):
            score_v2({"a": ["x"], "b": []}, {"a": "x", "b": ""}, null_odds={"a": 0.0}, allow_missing=allow_missing)
    with pytest.raises(ScoringError, match=r"1 question \('b'\) without an answer cannot be scored as SQuAD v1.1"):
        score_v1({"a": ["x"], "b": []}, {"a": "x", "b": ""})
    with pytest.raises(ScoringError, match="no questions to score"):
        score_v1({}, {})


# Files.


def squad(*questions, **extra):
    qas = [
        {"id": key, "question": "?", "answers": [{"text": t, "answer_start": 0} for t in ts]} for key, ts in questions
    ]
    return {"data": [{"paragraphs": [{"context": "x", "qas": qas}]}], **extra}


@pytest.mark.parametrize("compressed", [False, True])
def test_files_plain_and_gzipped(tmp_path, compressed):
    content = json.dumps(squad(("é", ["x", "y"]), ("b", []), version="1.1")).encode()
    path = tmp_path / "references"
    path.write_bytes(gzip.compress(content) if compressed else content)
    references = load_references(path)
    assert references.answers == {"é": ("x", "y"), "b": ()}
    assert not references.version_2


@pytest.mark.parametrize(
    ("extra", "version_2"),
    [({"version": "v2.0"}, True), ({"version": "2.0"}, True), ({"version": "1.1"}, False), ({}, False)],
)
def test_the_version_is_found(tmp_path, extra, version_2):
    path = tmp_path / "references.json"
    path.write_text(json.dumps(squad(("a", ["x"]), **extra)))
    assert load_references(path).version_2 == version_2
    value = squad(("a", ["x"]), **extra)
    value["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = False
    path.write_text(json.dumps(value))
    assert load_references(path).version_2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON that can be used: Expecting property name enclosed in double quotes at line 1, column 2"),
        (b"\xff\xfe", "is not UTF-8: byte 0 is 0xff"),
        (gzip.compress(b"{}" * 99, mtime=0)[:-12], "ends in the middle of its gzip stream"),
        (gzip.compress(b"{}", mtime=0)[:9] + b"\xff" * 30, "is damaged gzip"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "holds no questions"),
        (b"{}", "in no layout that is known"),
        (b'{"data": [{"paragraphs": 3}]}', "paragraphs is not a list"),
        (json.dumps(squad((1.5, ["x"]))).encode(), "id is not a string"),
        (json.dumps(squad(("a", [True]))).encode(), "answers is neither a list"),
        (json.dumps(squad(("a", ["x"]), ("a", ["y"]))).encode(), "1 id \\('a'\\) more than once"),
        (json.dumps(squad()).encode(), "holds no questions"),
    ],
)
def test_damaged_references_are_refused(tmp_path, content, message):
    path = tmp_path / "references.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_references(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "content", "message"),
    [
        (load_predictions, "[]", "holds a list without rows"),
        (load_predictions, '{"a": "x", "b": null}', r"texts, but does not for 1 id \('b'\)"),
        (load_predictions, '{"a": "x", "a": "x"}', "one object holds the key 'a' more than once"),
        (load_null_odds, '{"a": "x"}', r"numbers, but does not for 1 id \('a'\)"),
        (load_null_odds, '{"a": NaN, "b": true}', r"the null odds of 2 questions \('a', 'b'\) are not finite numbers"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, load, content, message):
    path = tmp_path / "predictions.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json does not exist; check the path"):
        load_predictions(tmp_path / "nothing.json")


# ---------------------------------------------------------------------------------------------------- the metric module


def computed(config, inputs, extra):
    """The scores of the metric module, or the error."""
    import evaluate

    try:
        return evaluate.load(metric_path(), config).compute(**inputs, **extra)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def rows(**texts):
    return [{"id": key, "prediction_text": text} for key, text in texts.items()]


def with_odds(predictions, *odds):
    return [{**row, "no_answer_probability": value} for row, value in zip(predictions, odds, strict=True)]


def references(**texts):
    return [{"id": key, "answers": {"text": golds, "answer_start": [0] * len(golds)}} for key, golds in texts.items()]


def test_metric_module_without_network(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")
    # As if nothing had ever been downloaded.
    for name in ("HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(evaluate.config, name, tmp_path)
    v1_golds = {"a": ["the cat", "cat"], "b": ["black dog"]}
    v2_golds = {"a": ["cat"], "b": []}
    texts = {"b": "dog", "a": "cat"}
    v1 = {"predictions": rows(**texts), "references": references(**v1_golds)}
    v2 = {"predictions": with_odds(rows(**texts), 0.75, 0.25), "references": references(**v2_golds)}
    odds = {"b": 0.75, "a": 0.25}
    unknown = {"predictions": rows(a="x", c="x"), "references": references(**v1_golds)}
    repeated = {"predictions": rows(a="x") * 2, "references": references(**v1_golds)}
    cases = [
        ((None, v1, {}), score_v1(v1_golds, texts)),
        (("squad", v1, {}), score_v1(v1_golds, texts)),
        (("squad_v2", v2, {}), score_v2(v2_golds, texts, null_odds=odds)),
        (
            ("squad", v1, {"answer_normalization": "none"}),
            score_v1(v1_golds, texts, rules=normalization("none")),
        ),
        ((None, v1, {"answer_normalization": "mlqa"}), "ConfigError: --answer_normalization mlqa is not one of"),
        (
            ("squad_v2", v2, {"no_answer_threshold": 0.5}),
            score_v2(v2_golds, texts, null_odds=odds, na_prob_thresh=0.5),
        ),
        ((None, v1, {"no_answer_threshold": 0.5}), "ScoringError: no_answer_threshold is for SQuAD v2.0"),
        (("squad_v3", v1, {}), "ValueError: the configuration must be one of default, squad, squad_v2, not"),
        ((None, unknown, {}), "ScoringError: 1 question ('b') without predictions"),
        ((None, repeated, {}), "ScoringError: 1 predictions have the id of another"),
        ((None, v2, {}), score_v2(v2_golds, texts, null_odds=odds)),
    ]
    found = [computed(*case) for case, _ in cases]
    for (case, expected), result in zip(cases, found, strict=True):
        if isinstance(expected, str):
            assert result.startswith(expected), case
        else:
            assert list(result.items()) == list(expected.items()), case
    metric = evaluate.load(metric_path())
    for prediction, reference in zip(v2["predictions"], v2["references"], strict=True):
        metric.add(prediction=prediction, reference=reference)
    added = metric.compute()
    assert added == cases[-1][1], "added one at a time"
    assert not math.isnan(added["f1"])


def test_silence_is_right_about_questions_without_an_answer() -> None:
    references = {"a": [], "b": ["x"], "c": ["x"], "d": []}
    silent = score_v2(references, dict.fromkeys(references, ""))
    assert f1_of_silence(references) == silent["f1"] == 50
