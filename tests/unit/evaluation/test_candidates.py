"""Candidates against oracles that try every span, one at a time, with Python's own sort."""

import math
import typing
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import ScoringError
from qa_dist.config.options import EvaluationConfig
from qa_dist.data.records import Candidate
from qa_dist.evaluation import numpy_searches
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.searches import SEARCHES
from qa_dist.evaluation.top_spans import pad_rows, top_spans
from tests.unit.evaluation.oracles import LARGEST, ORACLES, every_span, f32, run_top_spans, small_table

COLUMNS = [name for name in CandidateTable.__slots__ if name != "feature_index_N"]


def spans_of(top: CandidateTable, row: int) -> list[tuple[int, int]]:
    starts, ends = top.start_token_NK[row].tolist(), top.end_token_NK[row].tolist()
    present = [(start, end) for start, end in zip(starts, ends, strict=True) if start >= 0]
    assert present == list(zip(starts, ends, strict=True))[: len(present)], "absent candidates must come last"
    return present


def check_against_oracle(rows, *, num_candidates, max_answer_length, search, padding=0):
    top = run_top_spans(
        rows, num_candidates=num_candidates, max_answer_length=max_answer_length, search=search, padding=padding
    )
    assert top.start_token_NK.shape == top.end_logit_NK.shape == (len(rows), num_candidates)
    assert top.start_token_NK.dtype == top.end_token_NK.dtype == np.int32
    assert top.start_logit_NK.dtype == top.null_end_logit_N.dtype == f32
    for i, (start_logits, end_logits, context_start, context_end) in enumerate(rows):
        start_logits, end_logits = np.asarray(start_logits, f32), np.asarray(end_logits, f32)
        with np.errstate(over="ignore"):
            expected = ORACLES[search](
                start_logits, end_logits, context_start, context_end, num_candidates, max_answer_length
            )
        assert spans_of(top, i) == [span[:2] for span in expected]
        found = len(expected)
        starts, ends = top.start_token_NK[i, :found], top.end_token_NK[i, :found]
        assert np.array_equal(top.start_logit_NK[i, :found], start_logits[starts])
        assert np.array_equal(top.end_logit_NK[i, :found], end_logits[ends])
        assert (top.start_token_NK[i, found:] == -1).all()
        assert (top.end_token_NK[i, found:] == -1).all()
        assert (top.start_logit_NK[i, found:] == -math.inf).all()
        assert (top.end_logit_NK[i, found:] == -math.inf).all()
        assert top.null_start_logit_N[i] == start_logits[0]
        assert top.null_end_logit_N[i] == end_logits[0]


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
    search=st.sampled_from(list(SEARCHES)),
    padding=st.integers(0, 3),
)
@example([([0.0] * 12, [0.0] * 12, 0, 12)], 9, 3, "span", 0)
@example([([0.0] * 12, [0.0] * 12, 0, 12)], 9, 3, "n_best", 0)
@example([([-math.inf] * 5, [-math.inf] * 5, 1, 4)], 9, 14, "span", 2)
@example([([1.0, 2.0], [3.0, 4.0], 1, 1)], 3, 2, "span", 0)
@example([([1.0, 2.0], [3.0, 4.0], 1, 2)], 3, 2, "n_best", 0)
@example([([LARGEST] * 6, [LARGEST] * 6, 0, 6)], 5, 2, "span", 0)
def test_candidates_equal_those_of_the_loops(rows, num_candidates, max_answer_length, search, padding):
    check_against_oracle(
        rows, num_candidates=num_candidates, max_answer_length=max_answer_length, search=search, padding=padding
    )


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("values", ["normal", "ties", "constant", "far outside"])
def test_candidates_of_long_features_equal_those_of_the_loops(search: str, values: str):
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
    check_against_oracle(rows, num_candidates=20, max_answer_length=30, search=search)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("num_candidates", [1, 2, 5])
@pytest.mark.parametrize("max_answer_length", [1, 2, 3, 5, 6, 7, 8, 9, 15, 31, 99])
def test_few_candidates_equal_those_of_the_loops(search, num_candidates, max_answer_length):
    # With few candidates a reach of the wrong length puts the wrong starts first.
    generator = np.random.default_rng(max_answer_length)
    rows = [(*np.round(generator.normal(size=(2, 40)) * 20).astype(f32), 3, 38) for _ in range(40)]
    check_against_oracle(rows, num_candidates=num_candidates, max_answer_length=max_answer_length, search=search)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(features(TIES), min_size=1, max_size=4),
    length_penalty=st.sampled_from([0.25, 0.5, 1.0, 8.0]),
    num_candidates=st.integers(1, 9),
    max_answer_length=st.integers(1, 14),
    padding=st.integers(0, 3),
)
@example([([0.0] * 12, [0.0] * 12, 0, 12)], 0.25, 9, 3, 0)
@example([([0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0], 0, 4)], 0.5, 1, 4, 0)
def test_each_token_behind_the_first_takes_the_penalty_off(
    rows, length_penalty, num_candidates, max_answer_length, padding
):
    # Of such numbers all sums are exact, in whatever order.
    settings = {"num_candidates": num_candidates, "max_answer_length": max_answer_length, "search": "span"}
    top = run_top_spans(rows, padding=padding, length_penalty=length_penalty, **settings)
    for i, (start_logits, end_logits, context_start, context_end) in enumerate(rows):
        spans = every_span(start_logits, end_logits, context_start, context_end, 10**6, max_answer_length)
        scores = {(start, end): score - length_penalty * (end - start) for start, end, score in spans}
        expected = sorted(scores, key=lambda span: (-scores[span], span))[:num_candidates]
        assert spans_of(top, i) == expected
        found = top.start_logit_NK[i] + top.end_logit_NK[i]
        assert found[: len(expected)].tolist() == [scores[span] for span in expected]


@pytest.mark.parametrize("cls_token", [0, 39])
def test_the_penalty_leaves_no_answer_as_it_is(cls_token):
    generator = np.random.default_rng(5)
    rows = [(*generator.normal(size=(2, 40)).astype(f32), 3, 38) for _ in range(9)]
    settings = {"num_candidates": 20, "max_answer_length": 30, "search": "span", "cls_token": cls_token}
    plain, other = (run_top_spans(rows, length_penalty=penalty, **settings) for penalty in (0.0, 0.1))
    for name in ("null_start_logit_N", "null_end_logit_N"):
        assert np.array_equal(getattr(plain, name), getattr(other, name))
    lengths = [(top.end_token_NK - top.start_token_NK).mean() for top in (plain, other)]
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize("search", SEARCHES)
def test_padding_is_never_in_the_context(search):
    settings = {"num_candidates": 9, "max_answer_length": 4, "search": search, "padding": 5}
    found = run_top_spans([([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, 7)], **settings)
    expected = run_top_spans([([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, 3)], **settings)
    assert spans_of(found, 0) == spans_of(expected, 0) == [(2, 2), (1, 2), (1, 1)]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(features(TIES), min_size=2, max_size=5),
    search=st.sampled_from(list(SEARCHES)),
    padding=st.integers(1, 40),
    fill=st.sampled_from([math.nan, math.inf, -math.inf, 1e9]),
)
def test_candidates_do_not_depend_on_the_batch(rows, search, padding, fill):
    settings = {"num_candidates": 5, "max_answer_length": 4, "search": search}
    together = run_top_spans(rows, padding=padding, fill=fill, **settings)
    for i, row in enumerate(rows):
        alone = run_top_spans([row], **settings)
        for name in COLUMNS:
            assert np.array_equal(getattr(together, name)[i], getattr(alone, name)[0]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("search", SEARCHES)
def test_other_number_formats_are_read_as_float32(dtype, search):
    generator = torch.Generator().manual_seed(3)
    start_BL = torch.randn(4, 30, generator=generator).to(dtype)
    end_BL = torch.randn(4, 30, generator=generator).to(dtype)
    places = (torch.full((4,), 5), torch.full((4,), 29), torch.zeros(4, dtype=torch.int64), torch.full((4,), 30))
    settings = {"num_candidates": 20, "max_answer_length": 8, "search": search}
    found = top_spans(range(4), start_BL, end_BL, *places, **settings)
    expected = top_spans(range(4), start_BL.float(), end_BL.float(), *places, **settings)
    for name in COLUMNS:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("search", SEARCHES)
def test_a_batch_without_features_has_no_candidates(search):
    none = torch.zeros(0, dtype=torch.int64)
    top = top_spans(
        [], torch.zeros(0, 7), torch.zeros(0, 7), *[none] * 4, num_candidates=3, max_answer_length=2, search=search
    )
    assert top.start_token_NK.shape == (0, 3)
    table = numpy_searches.top_spans(
        [], np.zeros((0, 7), f32), np.zeros((0, 7), f32), *[none.numpy()] * 4, num_candidates=3, max_answer_length=2
    )
    assert table.start_token_NK.shape == (0, 3)
    assert top.null_start_logit_N.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_without_an_order_are_refused(bad, side):
    rows = [([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, 3), ([0.0, 1.0], [0.0, 1.0], 1, 2)]
    rows[1][side][1] = bad
    with pytest.raises(ScoringError, match=r"1 of 2 features have logits that are NaN or \+inf"):
        run_top_spans(rows, num_candidates=2, max_answer_length=2, search="span")


def test_settings_that_make_no_sense_are_refused():
    rows = [([0.0, 1.0], [0.0, 1.0], 1, 2)]
    with pytest.raises(ValueError, match=f"search must be one of {', '.join(SEARCHES)}, not 'best'"):
        run_top_spans(rows, num_candidates=2, max_answer_length=2, search="best")
    with pytest.raises(ValueError, match="at least 1, not 0 and 2"):
        run_top_spans(rows, num_candidates=0, max_answer_length=2, search="span")
    with pytest.raises(ValueError, match="at least 1, not 2 and 0"):
        run_top_spans(rows, num_candidates=2, max_answer_length=0, search="span")


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


def test_a_search_is_an_option_and_the_other_way_round():
    (option,) = (item for item in fields(EvaluationConfig) if item.name == "decoding")
    needs = {
        "a value of EvaluationConfig.decoding": set(
            typing.get_args(typing.get_type_hints(EvaluationConfig)["decoding"])
        ),
        "a clause of that option's help that begins with its name": {
            clause.split()[0] for clause in option.metadata["help"].split("; ")
        },
        "a row of searches.SEARCHES": set(SEARCHES),
        "a row of numpy_searches.SEARCHES": set(numpy_searches.SEARCHES),
        "an oracle in tests/unit/evaluation/oracles.py": set(ORACLES),
    }
    everywhere = set().union(*needs.values())
    missing = [f"{name}: {need}" for need, have in needs.items() for name in sorted(everywhere - have)]
    assert not missing, f"a search needs {', '.join(needs)}; missing are {missing}"
    assert option.default in SEARCHES


# The table.


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
