"""Answers against nested loops in the manner of the Hugging Face examples."""

import itertools
import json
import math

import numpy as np
import pytest

from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Feature, Prediction
from qa_dist.evaluation.answers import decode
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.searches import SEARCHES
from qa_dist.features.table import FeatureMap
from tests.unit.data_fixtures import map_of
from tests.unit.evaluation.oracles import LARGEST, ORACLES, f32, run_top_spans, small_table


class Case:
    """Examples with windows over a context of one-letter words, and random logits for them."""

    def __init__(self, generator, *, num_examples=30, ties=False, max_windows=3):
        self.contexts, self.ids, self.features, self.logits = [], [], [], []
        for example_index in range(num_examples):
            num_words = int(generator.integers(1, 40))
            self.contexts.append(" ".join(generator.choice(list("abcdefgh"), num_words)))
            self.ids.append(f"q{example_index}")
            # Null answers near the best spans, so that thresholds decide.
            null_lift = float(generator.choice([0, 3, 6]))
            for window in range(int(generator.integers(1, max_windows + 1))):
                first = int(generator.integers(0, num_words))
                words = np.arange(first, num_words)
                question = int(generator.integers(1, 6))
                length = question + 1 + len(words) + 1
                logits = generator.normal(size=(2, length)).astype(f32) * 3
                if ties:
                    logits = np.round(logits / 3)
                logits[:, 0] += null_lift
                self.logits.append(logits)
                offsets = np.stack([words * 2, words * 2 + 1], axis=1).astype(np.int32)
                self.features.append(
                    Feature(
                        example_index=example_index,
                        window=window,
                        input_ids=np.zeros(length, np.int32),
                        token_type_ids=np.zeros(length, np.int8),
                        context_start=question + 1,
                        context_offsets=offsets,
                        cls_token=0,
                        start_token=0,
                        end_token=0,
                    )
                )

    def table(self, *, num_candidates, max_answer_length, search) -> CandidateTable:
        """Candidates as ranks would send them: a few features at a time, in another order."""
        order = np.random.default_rng(0).permutation(len(self.features))
        tables = []
        for indices in np.array_split(order, max(1, len(order) // 5)):
            rows = [
                (*self.logits[i], f.context_start, f.context_start + len(f.context_offsets))
                for i in indices
                for f in [self.features[i]]
            ]
            tables.append(
                run_top_spans(
                    rows,
                    indices=indices,
                    num_candidates=num_candidates,
                    max_answer_length=max_answer_length,
                    search=search,
                )
            )
        return CandidateTable.concatenate(tables).ordered(len(self.features))

    def decode(self, *, num_candidates=20, max_answer_length=30, search, **settings):
        table = self.table(num_candidates=num_candidates, max_answer_length=max_answer_length, search=search)
        features = map_of(self.features)
        return decode(table, features, self.contexts, self.ids, n_best_size=num_candidates, **settings)


def looped_answers(case: Case, *, n_best_size, max_answer_length, search, version_2, threshold):
    """Answers by nested loops over examples, windows and spans, in the manner of the Hugging Face examples.

    Gives (text, n-best list of (text, score, probability), null odds) for each example.
    """
    answers = []
    for example_index, context in enumerate(case.contexts):
        entries, null_score = [], None
        for feature, (start_logits, end_logits) in zip(case.features, case.logits, strict=True):
            if feature.example_index != example_index:
                continue
            window_null = start_logits[0] + end_logits[0]
            if null_score is None or window_null < null_score:
                null_score = window_null
            offsets = feature.context_offsets
            spans = ORACLES[search](
                start_logits,
                end_logits,
                feature.context_start,
                feature.context_start + len(offsets),
                10**6 if search == "span" else n_best_size,
                max_answer_length,
            )
            for start, end, score in spans:
                first, last = offsets[start - feature.context_start], offsets[end - feature.context_start]
                place = (int(first[0]), int(last[1])), feature.window
                entries.append((context[first[0] : last[1]], score, start_logits[start], end_logits[end], place))
        null = ("", null_score, None, None, None)
        if version_2:
            entries.append(null)
        entries = sorted(entries, key=lambda entry: entry[1], reverse=True)
        # What windows share is the first one's.
        window_of = {}
        for entry in entries:
            window_of.setdefault(*(entry[4] or (None, None)))
        entries = [entry for entry in entries if entry is null or window_of[entry[4][0]] == entry[4][1]][:n_best_size]
        if (version_2 and null not in entries) or not entries:
            entries.append(null)
        scores = np.array([entry[1] for entry in entries], np.float64)
        probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        nbest = [(entry[0], entry[1], p) for entry, p in zip(entries, probabilities, strict=True)]
        spans = [entry for entry in entries if entry is not null]
        if not version_2:
            answers.append((entries[0][0], nbest, None))
        elif not spans:
            answers.append(("", nbest, LARGEST))
        else:
            odds = null_score - spans[0][2] - spans[0][3]
            answers.append(("" if odds > threshold else spans[0][0], nbest, float(odds)))
    return answers


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("version_2", "threshold"), [(False, 0.0), (True, 0.0), (True, 2.0), (True, -3.1), (True, 100.0)]
)
@pytest.mark.parametrize(("n_best_size", "max_answer_length"), [(20, 30), (3, 4), (2, 1)])
def test_answers_equal_those_of_the_loops(search, ties, version_2, threshold, n_best_size, max_answer_length):
    case = Case(np.random.default_rng([ties, n_best_size]), ties=ties)
    answers = case.decode(
        num_candidates=n_best_size,
        max_answer_length=max_answer_length,
        search=search,
        version_2=version_2,
        null_score_diff_threshold=threshold,
    )
    expected = looped_answers(
        case,
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
        search=search,
        version_2=version_2,
        threshold=threshold,
    )
    assert len(answers) == len(expected) == len(case.ids)
    assert answers.texts == [text for text, _, _ in expected]
    for answer, (text, nbest, odds) in zip(answers, expected, strict=True):
        context = case.contexts[case.ids.index(answer.id)]
        assert answer.prediction.text == text
        assert answer.null_odds == odds
        assert [(p.text, p.score) for p in answer.nbest] == [(text, score) for text, score, _ in nbest]
        np.testing.assert_allclose([p.probability for p in answer.nbest], [p for _, _, p in nbest], rtol=1e-12)
        for prediction in answer.nbest:
            is_null = prediction.start_char == prediction.end_char == -1
            assert prediction.text == ("" if is_null else context[prediction.start_char : prediction.end_char])
    if version_2:
        chosen = [answer.prediction.start_char for answer in answers]
        assert threshold == 100.0 or len({start < 0 for start in chosen}) == 2, "both kinds must occur"
    assert answers.predictions() == dict(zip(case.ids, answers.texts, strict=True))


def test_answers_do_not_depend_on_the_order_of_the_features():
    case = Case(np.random.default_rng(5), ties=True)
    expected = list(case.decode(search="span", version_2=True))
    order = np.random.default_rng(6).permutation(len(case.features))
    case.features = [case.features[i] for i in order]
    case.logits = [case.logits[i] for i in order]
    assert list(case.decode(search="span", version_2=True)) == expected


def hf_texts(case: Case, *, n_best_size, max_answer_length, version_2, threshold):
    """Texts by the nested loops of `postprocess_qa_predictions` with its own, unstable argsort; logits have no ties."""
    texts = {}
    for example_index, context in enumerate(case.contexts):
        found, nulls = [], []
        for i, feature in enumerate(case.features):
            if feature.example_index != example_index:
                continue
            start_logits, end_logits = case.logits[i]
            nulls.append(start_logits[0] + end_logits[0])
            offset_mapping = [None] * feature.context_start + [tuple(pair) for pair in feature.context_offsets] + [None]
            for start, end in itertools.product(
                np.argsort(start_logits)[-1 : -n_best_size - 1 : -1].tolist(),
                np.argsort(end_logits)[-1 : -n_best_size - 1 : -1].tolist(),
            ):
                if offset_mapping[start] is None or offset_mapping[end] is None:
                    continue
                if start <= end < start + max_answer_length:
                    text = context[offset_mapping[start][0] : offset_mapping[end][1]]
                    found.append((start_logits[start] + end_logits[end], text, start_logits[start], end_logits[end]))
        found.sort(key=lambda entry: entry[0], reverse=True)
        if not found or (version_2 and min(nulls) - found[0][2] - found[0][3] > threshold):
            texts[f"q{example_index}"] = ""
        else:
            texts[f"q{example_index}"] = found[0][1]
    return texts


@pytest.mark.parametrize("version_2", [False, True])
def test_texts_of_the_search_n_best_equal_those_of_the_hugging_face_loops(version_2):
    case = Case(np.random.default_rng(11), num_examples=200)
    answers = case.decode(search="n_best", version_2=version_2, null_score_diff_threshold=0.5)
    expected = hf_texts(case, n_best_size=20, max_answer_length=30, version_2=version_2, threshold=0.5)
    assert answers.predictions() == expected


def one_example(context, offsets, logits, *, version_2, n_best_size=2, threshold=0.0):
    """Answers to one example of one feature: CLS, the context, SEP."""
    start_logits, end_logits = logits
    table = run_top_spans(
        [(start_logits, end_logits, 1, 1 + len(offsets))],
        num_candidates=n_best_size,
        max_answer_length=5,
        search="span",
    )
    features = FeatureMap(
        example_index_N=np.array([0], np.int32),
        window_N=np.array([0], np.int32),
        context_start_N=np.array([1], np.int32),
        context_offsets_T2=np.array(offsets, np.int32).reshape(-1, 2),
        first_offset_N1=np.array([0, len(offsets)]),
    )
    return decode(
        table,
        features,
        [context],
        ["q"],
        n_best_size=n_best_size,
        version_2=version_2,
        null_score_diff_threshold=threshold,
    )


def test_a_context_without_tokens_gets_the_null_answer():
    null = Prediction("", 3.0, 1.0, -1, -1)
    answer = one_example("  ", [], ([1.0, 0.0], [2.0, 0.0]), version_2=False)[0]
    assert answer.prediction == null
    assert answer.nbest == (null,)
    assert answer.null_odds is None
    # Even a threshold that no null answer could pass cannot conjure up a text.
    answers = one_example("  ", [], ([1.0, 0.0], [2.0, 0.0]), version_2=True, threshold=math.inf)
    assert answers[0].prediction == null
    assert json.loads(json.dumps(answers.null_odds(), allow_nan=False)) == {"q": LARGEST}


def test_a_zero_width_token_is_no_answer_where_unanswerables_exist():
    logits = ([0.0, 5.0, 1.0, 0.0], [0.0, 5.0, 1.0, 0.0])
    offsets = [(0, 0), (0, 3)]
    answer = one_example("dog", offsets, logits, version_2=True, n_best_size=3)[0]
    assert answer.prediction == Prediction("dog", 6.0, answer.prediction.probability, 0, 3)
    assert answer.null_odds == -6.0
    # As the Hugging Face examples do, the plain best span is taken without a look at its text.
    assert one_example("dog", offsets, logits, version_2=False)[0].prediction.start_char == 0
    assert one_example("dog", offsets, logits, version_2=False)[0].prediction.text == ""


@pytest.mark.parametrize(
    ("context", "offsets", "places"),
    [
        # A line end that is a token, as of RoBERTa's; tokens without characters at the blanks around a word.
        ("a\nfox\n", [(1, 2), (2, 5), (5, 6)], (2, 5)),
        ("a fox \u00a0b", [(1, 1), (2, 5), (7, 7)], (2, 5)),
        ("a  b", [(1, 1), (1, 2), (3, 3)], (3, 3)),
    ],
)
def test_answers_neither_begin_nor_end_with_blanks(context, offsets, places):
    logits = ([0.0, 5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0, 0.0])
    found = one_example(context, offsets, logits, version_2=False)[0].prediction
    assert (found.start_char, found.end_char) == places
    assert found.text == context[slice(*places)]


def test_a_zero_width_token_that_scores_as_the_null_answer_is_not_taken_for_it():
    logits = ([0.5, 5.0, 0.5, 0.0], [0.5, 5.0, 0.5, 0.0])
    answer = one_example("dog", [(0, 3), (0, 0)], logits, version_2=True, n_best_size=3)[0]
    entries = [(entry.text, entry.score, entry.start_char, entry.end_char) for entry in answer.nbest]
    assert entries == [("dog", 10.0, 0, 3), ("", 5.5, 0, 0), ("", 1.0, 0, 0), ("", 1.0, -1, -1)]
    assert answer.prediction.text == "dog"


def test_what_several_windows_hold_is_one_entry():
    case = Case(np.random.default_rng(0), num_examples=4, max_windows=1)
    alone = [answer.nbest for answer in case.decode(search="span", version_2=False)]
    for twin, logits in zip(list(case.features), list(case.logits), strict=True):
        case.features.append(
            Feature(**{name: getattr(twin, name) for name in Feature.__slots__ if name != "window"}, window=1)
        )
        case.logits.append(logits - f32(0.25))
    assert [answer.nbest for answer in case.decode(search="span", version_2=False)] == alone
    assert len(alone[0]) > 1


def test_a_line_end_makes_no_other_place():
    """The first window has a token for it, as byte-level tokenizers do; its two candidates for the word stay."""
    rows = [([0.0, 5.0, 1.0, 0.0], [0.0, 4.0, 5.0, 0.0], 1, 3), ([0.0, 4.0, 0.0], [0.0, 4.0, 0.0], 1, 2)]
    features = FeatureMap(
        example_index_N=np.array([0, 0], np.int32),
        window_N=np.array([0, 1], np.int32),
        context_start_N=np.array([1, 1], np.int32),
        context_offsets_T2=np.array([(0, 3), (3, 4), (0, 3)], np.int32),
        first_offset_N1=np.array([0, 2, 3]),
    )
    table = run_top_spans(rows, num_candidates=3, max_answer_length=5, search="span")
    found = decode(table, features, ["dog\n"], ["q"], n_best_size=3, version_2=False)[0]
    assert [(entry.text, entry.score) for entry in found.nbest] == [("dog", 10.0), ("dog", 9.0), ("", 6.0)]


def test_the_null_answer_is_the_worst_of_the_windows():
    case = Case(np.random.default_rng(0), num_examples=1, max_windows=1)
    twin = case.features[0]
    case.features.append(
        Feature(**{name: getattr(twin, name) for name in Feature.__slots__ if name != "window"}, window=1)
    )
    case.logits.append(case.logits[0].copy())
    case.logits[0][:, 0] = 50.0
    case.logits[1][:, 0] = -50.0
    answers = case.decode(search="span", version_2=True)
    assert answers[0].prediction.start_char >= 0
    assert answers[0].nbest[-1] == Prediction("", -100.0, answers[0].nbest[-1].probability, -1, -1)


def test_extreme_logits_give_numbers_that_json_can_write():
    logits = ([LARGEST, -LARGEST, -LARGEST, 0.0], [LARGEST, -LARGEST, -LARGEST, 0.0])
    answers = one_example("a b", [(0, 1), (2, 3)], logits, version_2=True)
    assert answers.texts == [""]
    assert answers.null_odds() == {"q": LARGEST}
    assert sum(p.probability for p in answers[0].nbest) == 1.0
    answers = one_example("a b", [(0, 1), (2, 3)], ([-math.inf] * 4, [-math.inf] * 4), version_2=True)
    assert answers.texts == ["a"]
    assert all(math.isfinite(p.probability) for p in answers[0].nbest)


def test_no_examples_no_answers():
    features = map_of([])
    answers = decode(CandidateTable.empty(3), features, [], [], n_best_size=3, version_2=True)
    assert len(answers) == 0
    assert list(answers) == []
    assert answers.predictions() == answers.null_odds() == {}


def test_parts_that_do_not_belong_together_are_refused():
    case = Case(np.random.default_rng(1), num_examples=3, max_windows=1)
    table = case.table(num_candidates=4, max_answer_length=5, search="span")
    features = map_of(case.features)
    settings = {"n_best_size": 4, "version_2": False}

    def refused(message, table=table, features=features, contexts=case.contexts, ids=case.ids, **changed):
        with pytest.raises(ScoringError, match=message):
            decode(table, features, contexts, ids, **{**settings, **changed})

    refused("n_best_size is 5, but 4 candidates", n_best_size=5)
    refused("n_best_size is 0", n_best_size=0)
    shuffled = CandidateTable(*(getattr(table, name)[::-1] for name in CandidateTable.__slots__))
    refused("put them in order", table=shuffled)
    refused("put them in order", table=small_table([0, 1], 4))
    refused("2 contexts were given for 3 examples", contexts=case.contexts[:2])
    refused("1 example ids occur more than once", ids=["q0", "q1", "q1"])
    refused("features name the examples 0 .. 2, but there are 2", contexts=case.contexts[:2], ids=["q0", "q1"])
    refused("1 examples have no feature \\(first: 'q3'", contexts=[*case.contexts, "x"], ids=["q0", "q1", "q2", "q3"])
    moved = FeatureMap(
        features.example_index_N * 0,
        features.window_N,
        features.context_start_N,
        features.context_offsets_T2,
        features.first_offset_N1,
    )
    refused("window 0 of example 'q0' occurs more than once", features=moved, contexts=["x"], ids=["q0"])
    late = FeatureMap(
        features.example_index_N,
        features.window_N,
        features.context_start_N + 100,
        features.context_offsets_T2,
        features.first_offset_N1,
    )
    refused("candidates lie outside their contexts", features=late)
    assert len(decode(table, features, case.contexts, case.ids, **settings)) == 3
    with pytest.raises(IndexError, match="no answer 3 among 3"):
        decode(table, features, case.contexts, case.ids, **settings)[3]
