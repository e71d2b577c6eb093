"""Decoding against oracles that try every span, one at a time, with Python's own sort."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Candidate, Feature, Prediction
from qa_dist.evaluation.answers import decode
from qa_dist.evaluation.candidates import MODES, CandidateTable, Mode, TopSpans, pad_rows, top_spans
from qa_dist.features.store import FeatureMap
from tests.unit.data_fixtures import map_of

f32 = np.float32


def every_span(start_logits, end_logits, context_start, context_end, num_candidates, max_answer_length):
    """All spans of the context, best first: (start, end, score)."""
    spans = []
    for start in range(context_start, context_end):
        for end in range(start, context_end):
            if end - start + 1 <= max_answer_length:
                spans.append((start, end, f32(start_logits[start]) + f32(end_logits[end])))
    spans.sort(key=lambda span: (-span[2], span[0], span[1]))
    return spans[:num_candidates]


def shortlisted_spans(start_logits, end_logits, context_start, context_end, num_candidates, max_answer_length):
    """Pairs of the best starts and the best ends of the whole feature, best first."""
    best_starts = np.argsort(start_logits, kind="stable")[::-1][:num_candidates].tolist()
    best_ends = np.argsort(end_logits, kind="stable")[::-1][:num_candidates].tolist()
    spans = []
    for start in best_starts:
        for end in best_ends:
            inside = context_start <= start < context_end and context_start <= end < context_end
            if inside and start <= end and end - start + 1 <= max_answer_length:
                spans.append((start, end, start_logits[start] + end_logits[end]))
    spans.sort(key=lambda span: -span[2])
    return spans[:num_candidates]


ORACLES = {"span": every_span, "n_best": shortlisted_spans}


def spans_of(top: TopSpans, row: int) -> list[tuple[int, int]]:
    starts, ends = top.start_token_BK[row].tolist(), top.end_token_BK[row].tolist()
    present = [(start, end) for start, end in zip(starts, ends, strict=True) if start >= 0]
    assert present == list(zip(starts, ends, strict=True))[: len(present)], "absent candidates must come last"
    return present


def run_top_spans(rows, *, num_candidates, max_answer_length, mode, padding=0, fill=math.nan):
    """`top_spans` of rows (start logits, end logits, context start, context end), padded with what must not be read."""
    length = max(len(row[0]) for row in rows) + padding
    start_BL = torch.full((len(rows), length), fill)
    end_BL = torch.full((len(rows), length), fill)
    for i, (start_logits, end_logits, _, _) in enumerate(rows):
        start_BL[i, : len(start_logits)] = torch.from_numpy(np.asarray(start_logits, f32))
        end_BL[i, : len(end_logits)] = torch.from_numpy(np.asarray(end_logits, f32))
    return top_spans(
        start_BL,
        end_BL,
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
        torch.zeros(len(rows), dtype=torch.int64),
        num_candidates=num_candidates,
        max_answer_length=max_answer_length,
        mode=mode,
        lengths_B=torch.tensor([len(row[0]) for row in rows]),
    )


def check_against_oracle(rows, *, num_candidates, max_answer_length, mode, padding=0):
    top = run_top_spans(
        rows, num_candidates=num_candidates, max_answer_length=max_answer_length, mode=mode, padding=padding
    )
    assert top.start_token_BK.shape == top.end_logit_BK.shape == (len(rows), num_candidates)
    assert top.start_token_BK.dtype == top.end_token_BK.dtype == torch.int32
    assert top.start_logit_BK.dtype == top.null_end_logit_B.dtype == torch.float32
    for i, (start_logits, end_logits, context_start, context_end) in enumerate(rows):
        start_logits, end_logits = np.asarray(start_logits, f32), np.asarray(end_logits, f32)
        with np.errstate(over="ignore"):
            expected = ORACLES[mode](
                start_logits, end_logits, context_start, context_end, num_candidates, max_answer_length
            )
        assert spans_of(top, i) == [span[:2] for span in expected]
        found = len(expected)
        starts, ends = top.start_token_BK[i, :found].numpy(), top.end_token_BK[i, :found].numpy()
        assert np.array_equal(top.start_logit_BK[i, :found].numpy(), start_logits[starts])
        assert np.array_equal(top.end_logit_BK[i, :found].numpy(), end_logits[ends])
        assert (top.start_token_BK[i, found:] == -1).all()
        assert (top.end_token_BK[i, found:] == -1).all()
        assert (top.start_logit_BK[i, found:] == -math.inf).all()
        assert (top.end_logit_BK[i, found:] == -math.inf).all()
        assert top.null_start_logit_B[i] == start_logits[0]
        assert top.null_end_logit_B[i] == end_logits[0]


LARGEST = float(np.finfo(f32).max)
TIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5])
WILD = st.one_of(
    TIES,
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([LARGEST, -LARGEST, -math.inf, 1e-45, -1e-45, 16777216.0, 1.1, 1.1000001]),
)


@st.composite
def features(draw, values):
    length = draw(st.integers(1, 12))
    context_start = draw(st.integers(0, length))
    context_end = draw(st.integers(context_start, length))
    logits = st.lists(values, min_size=length, max_size=length)
    return draw(logits), draw(logits), context_start, context_end


@settings(max_examples=300, deadline=None)
@given(
    rows=st.one_of(st.lists(features(TIES), min_size=1, max_size=4), st.lists(features(WILD), min_size=1, max_size=4)),
    num_candidates=st.integers(1, 9),
    max_answer_length=st.integers(1, 14),
    mode=st.sampled_from(MODES),
    padding=st.integers(0, 3),
)
@example([([0.0] * 12, [0.0] * 12, 0, 12)], 9, 3, "span", 0)
@example([([0.0] * 12, [0.0] * 12, 0, 12)], 9, 3, "n_best", 0)
@example([([-math.inf] * 5, [-math.inf] * 5, 1, 4)], 9, 14, "span", 2)
@example([([1.0, 2.0], [3.0, 4.0], 1, 1)], 3, 2, "span", 0)
@example([([1.0, 2.0], [3.0, 4.0], 1, 2)], 3, 2, "n_best", 0)
@example([([LARGEST] * 6, [LARGEST] * 6, 0, 6)], 5, 2, "span", 0)
def test_candidates_equal_those_of_the_loops(rows, num_candidates, max_answer_length, mode, padding):
    check_against_oracle(
        rows, num_candidates=num_candidates, max_answer_length=max_answer_length, mode=mode, padding=padding
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", ["normal", "ties", "constant", "far outside"])
def test_candidates_of_long_features_equal_those_of_the_loops(mode: Mode, values: str):
    generator = np.random.default_rng(7)
    rows = []
    for _ in range(12):
        length = int(generator.integers(20, 120))
        context_start = int(generator.integers(1, 15))
        context_end = length - int(generator.integers(0, 3))
        logits = generator.normal(size=(2, length)).astype(f32) * 5
        if values == "ties":
            logits = np.round(logits / 5)
        if values == "constant":
            logits[:] = 0.25
        if values == "far outside":
            logits[:, :context_start] = 1e6
            logits[:, context_end:] = 1e6
        rows.append((logits[0], logits[1], context_start, context_end))
    check_against_oracle(rows, num_candidates=20, max_answer_length=30, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_candidates", [1, 2, 5])
@pytest.mark.parametrize("max_answer_length", [1, 2, 3, 5, 6, 7, 8, 9, 15, 31, 99])
def test_few_candidates_equal_those_of_the_loops(mode, num_candidates, max_answer_length):
    # With few candidates a reach of the wrong length puts the wrong starts first.
    generator = np.random.default_rng(max_answer_length)
    rows = [(*np.round(generator.normal(size=(2, 40)) * 20).astype(f32), 3, 38) for _ in range(40)]
    check_against_oracle(rows, num_candidates=num_candidates, max_answer_length=max_answer_length, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_never_in_the_context(mode):
    settings = {"num_candidates": 9, "max_answer_length": 4, "mode": mode, "padding": 5}
    found = run_top_spans([([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, 7)], **settings)
    expected = run_top_spans([([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, 3)], **settings)
    assert spans_of(found, 0) == spans_of(expected, 0) == [(2, 2), (1, 2), (1, 1)]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(features(TIES), min_size=2, max_size=5),
    mode=st.sampled_from(MODES),
    padding=st.integers(1, 40),
    fill=st.sampled_from([math.nan, math.inf, -math.inf, 1e9]),
)
def test_candidates_do_not_depend_on_the_batch(rows, mode, padding, fill):
    settings = {"num_candidates": 5, "max_answer_length": 4, "mode": mode}
    together = run_top_spans(rows, padding=padding, fill=fill, **settings)
    for i, row in enumerate(rows):
        alone = run_top_spans([row], **settings)
        for name in TopSpans.__slots__:
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_other_number_formats_are_read_as_float32(dtype, mode):
    generator = torch.Generator().manual_seed(3)
    start_BL = torch.randn(4, 30, generator=generator).to(dtype)
    end_BL = torch.randn(4, 30, generator=generator).to(dtype)
    places = (torch.full((4,), 5), torch.full((4,), 29), torch.zeros(4, dtype=torch.int64))
    settings = {"num_candidates": 20, "max_answer_length": 8, "mode": mode}
    found = top_spans(start_BL, end_BL, *places, **settings)
    expected = top_spans(start_BL.float(), end_BL.float(), *places, **settings)
    for name in TopSpans.__slots__:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_features_or_tokens_has_no_candidates(mode):
    none = torch.zeros(0, dtype=torch.int64)
    top = top_spans(
        torch.zeros(0, 7), torch.zeros(0, 7), none, none, none, num_candidates=3, max_answer_length=2, mode=mode
    )
    assert top.start_token_BK.shape == (0, 3)
    assert top.null_start_logit_B.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_without_an_order_are_refused(bad, side):
    rows = [([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, 3), ([0.0, 1.0], [0.0, 1.0], 1, 2)]
    rows[1][side][1] = bad
    with pytest.raises(ScoringError, match=r"1 of 2 features have logits that are NaN or \+inf"):
        run_top_spans(rows, num_candidates=2, max_answer_length=2, mode="span")


def test_settings_that_make_no_sense_are_refused():
    rows = [([0.0, 1.0], [0.0, 1.0], 1, 2)]
    with pytest.raises(ValueError, match="mode must be one of span, n_best, not 'best'"):
        run_top_spans(rows, num_candidates=2, max_answer_length=2, mode="best")
    with pytest.raises(ValueError, match="at least 1, not 0 and 2"):
        run_top_spans(rows, num_candidates=0, max_answer_length=2, mode="span")
    with pytest.raises(ValueError, match="at least 1, not 2 and 0"):
        run_top_spans(rows, num_candidates=2, max_answer_length=0, mode="span")


@given(lengths=st.lists(st.integers(0, 6), max_size=6), extra=st.integers(0, 3))
def test_rows_are_cut_and_padded(lengths, extra):
    values = torch.arange(sum(lengths), dtype=torch.float32) + 1
    width = max(lengths, default=0) + extra
    padded = pad_rows(values, torch.tensor(lengths, dtype=torch.int64), num_tokens=width)
    assert padded.shape == (len(lengths), width)
    rest = values.tolist()
    for row, length in zip(padded.tolist(), lengths, strict=True):
        assert row == rest[:length] + [-math.inf] * (width - length)
        rest = rest[length:]
    assert pad_rows(values, torch.tensor(lengths, dtype=torch.int64), fill=0.0).shape[1] == max(lengths, default=0)


# The table.


def small_table(indices, num_candidates=2) -> CandidateTable:
    count = len(indices)
    top = TopSpans(
        start_token_BK=torch.tensor(indices).int()[:, None].expand(count, num_candidates),
        end_token_BK=torch.tensor(indices).int()[:, None].expand(count, num_candidates) + 1,
        start_logit_BK=torch.zeros(count, num_candidates),
        end_logit_BK=torch.zeros(count, num_candidates),
        null_start_logit_B=torch.tensor(indices).float(),
        null_end_logit_B=torch.zeros(count),
    )
    return top.to_table(torch.tensor(indices))


def test_tables_of_ranks_are_put_in_order():
    table = CandidateTable.concatenate([small_table([3, 0]), CandidateTable.empty(2), small_table([2, 1])]).ordered(4)
    assert len(table) == 4
    assert table.feature_index_N.tolist() == [0, 1, 2, 3]
    assert table.start_token_NK[:, 0].tolist() == [0, 1, 2, 3]
    assert table.null_start_logit_N.tolist() == [0, 1, 2, 3]
    assert table.candidates(1) == [Candidate(1, 1, 2, 0.0, 0.0)] * 2
    assert CandidateTable.empty(3).ordered(0).num_candidates == 3


def test_missing_repeated_and_foreign_features_are_refused():
    with pytest.raises(ScoringError, match=r"1 missing \(first: 1\), 0 more than once"):
        small_table([0, 2]).ordered(3)
    with pytest.raises(ScoringError, match=r"1 missing \(first: 1\), 1 more than once \(first: 2\)"):
        small_table([0, 2, 2]).ordered(3)
    with pytest.raises(ScoringError, match=r"outside 0 .. 1 \(first: 7, -1\)"):
        small_table([0, 7, -1]).ordered(2)


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one number of candidates, not \[2, 3\]"):
        CandidateTable.concatenate([small_table([0]), small_table([1], 3)])
    with pytest.raises(ValueError, match="not \\[\\]"):
        CandidateTable.concatenate([])
    table = small_table([0, 1])
    with pytest.raises(ValueError, match="same length"):
        CandidateTable(*(getattr(table, name)[: 1 if i else 2] for i, name in enumerate(CandidateTable.__slots__)))


# Answers.


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

    def table(self, *, num_candidates, max_answer_length, mode) -> CandidateTable:
        """Candidates as ranks would send them: a few features at a time, in another order."""
        order = np.random.default_rng(0).permutation(len(self.features))
        tables = []
        for indices in np.array_split(order, max(1, len(order) // 5)):
            rows = [
                (*self.logits[i], f.context_start, f.context_start + len(f.context_offsets))
                for i in indices
                for f in [self.features[i]]
            ]
            top = run_top_spans(rows, num_candidates=num_candidates, max_answer_length=max_answer_length, mode=mode)
            tables.append(top.to_table(indices))
        return CandidateTable.concatenate(tables).ordered(len(self.features))

    def decode(self, *, num_candidates=20, max_answer_length=30, mode, **settings):
        table = self.table(num_candidates=num_candidates, max_answer_length=max_answer_length, mode=mode)
        features = map_of(self.features)
        return decode(table, features, self.contexts, self.ids, n_best_size=num_candidates, **settings)


def looped_answers(case: Case, *, n_best_size, max_answer_length, mode, version_2, threshold):
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
            spans = ORACLES[mode](
                start_logits,
                end_logits,
                feature.context_start,
                feature.context_start + len(offsets),
                10**6 if mode == "span" else n_best_size,
                max_answer_length,
            )
            for start, end, score in spans:
                first, last = offsets[start - feature.context_start], offsets[end - feature.context_start]
                entries.append((context[first[0] : last[1]], score, start_logits[start], end_logits[end]))
        null = ("", null_score, None, None)
        if version_2:
            entries.append(null)
        entries = sorted(entries, key=lambda entry: entry[1], reverse=True)[:n_best_size]
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("version_2", "threshold"), [(False, 0.0), (True, 0.0), (True, 2.0), (True, -3.1), (True, 100.0)]
)
@pytest.mark.parametrize(("n_best_size", "max_answer_length"), [(20, 30), (3, 4), (2, 1)])
def test_answers_equal_those_of_the_loops(mode, ties, version_2, threshold, n_best_size, max_answer_length):
    case = Case(np.random.default_rng([ties, n_best_size]), ties=ties)
    answers = case.decode(
        num_candidates=n_best_size,
        max_answer_length=max_answer_length,
        mode=mode,
        version_2=version_2,
        null_score_diff_threshold=threshold,
    )
    expected = looped_answers(
        case,
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
        mode=mode,
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
    expected = list(case.decode(mode="span", version_2=True))
    order = np.random.default_rng(6).permutation(len(case.features))
    case.features = [case.features[i] for i in order]
    case.logits = [case.logits[i] for i in order]
    assert list(case.decode(mode="span", version_2=True)) == expected


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
def test_texts_of_mode_n_best_equal_those_of_the_hugging_face_loops(version_2):
    case = Case(np.random.default_rng(11), num_examples=200)
    answers = case.decode(mode="n_best", version_2=version_2, null_score_diff_threshold=0.5)
    expected = hf_texts(case, n_best_size=20, max_answer_length=30, version_2=version_2, threshold=0.5)
    assert answers.predictions() == expected


def one_example(context, offsets, logits, *, version_2, n_best_size=2, threshold=0.0):
    """Answers to one example of one feature: CLS, the context, SEP."""
    start_logits, end_logits = logits
    top = run_top_spans(
        [(start_logits, end_logits, 1, 1 + len(offsets))],
        num_candidates=n_best_size,
        max_answer_length=5,
        mode="span",
    )
    features = FeatureMap(
        example_index_N=np.array([0], np.int32),
        window_N=np.array([0], np.int32),
        context_start_N=np.array([1], np.int32),
        context_offsets_T2=np.array(offsets, np.int32).reshape(-1, 2),
        first_offset_N1=np.array([0, len(offsets)]),
    )
    return decode(
        top.to_table([0]),
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


def test_the_null_answer_is_the_worst_of_the_windows():
    case = Case(np.random.default_rng(0), num_examples=1, max_windows=1)
    twin = case.features[0]
    case.features.append(
        Feature(**{name: getattr(twin, name) for name in Feature.__slots__ if name != "window"}, window=1)
    )
    case.logits.append(case.logits[0].copy())
    case.logits[0][:, 0] = 50.0
    case.logits[1][:, 0] = -50.0
    answers = case.decode(mode="span", version_2=True)
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
    table = case.table(num_candidates=4, max_answer_length=5, mode="span")
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
