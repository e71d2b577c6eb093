"""Searches that try every span, one at a time, with Python's own sort, tables of candidates to decode, and a skip."""

import math
import re

import numpy as np
import pytest
import torch

from qa_dist.common.errors import ScoringError
from qa_dist.evaluation import numpy_searches
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.top_spans import top_spans

f32 = np.float32
LARGEST = float(np.finfo(f32).max)


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


def run_top_spans(
    rows, *, num_candidates, max_answer_length, search, padding=0, fill=math.nan, indices=None, cls_token=0, **penalty
) -> CandidateTable:
    """Candidates of rows (start logits, end logits, context start, context end), padded with what must not be read.

    torch and numpy search for them, and must find the same, or refuse with the same words.
    """
    length = max(len(row[0]) for row in rows) + padding
    logits = np.full((2, len(rows), length), fill, f32)
    for i, (start_logits, end_logits, _, _) in enumerate(rows):
        logits[0, i, : len(start_logits)] = start_logits
        logits[1, i, : len(end_logits)] = end_logits
    lengths, starts, ends = np.array([(len(row[0]), row[2], row[3]) for row in rows]).T
    arrays = (*logits, starts.copy(), ends.copy(), np.full(len(rows), cls_token), lengths.copy())
    feature_index = range(len(rows)) if indices is None else indices
    settings = {"num_candidates": num_candidates, "max_answer_length": max_answer_length, "search": search} | penalty
    try:
        found = top_spans(feature_index, *map(torch.from_numpy, arrays), **settings)
    except (ScoringError, ValueError) as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            numpy_searches.top_spans(feature_index, *arrays, **settings)
        raise
    again = numpy_searches.top_spans(feature_index, *arrays, **settings)
    for name in CandidateTable.__slots__:
        mine, other = getattr(found, name), getattr(again, name)
        assert mine.dtype == other.dtype, name
        # Of tokens that a feature has, the logits too are the same bits: -0.0 is not 0.0.
        assert mine.tobytes() == np.ascontiguousarray(other).tobytes(), name
    return found


def small_table(indices, num_candidates=2) -> CandidateTable:
    count = len(indices)
    token_NK = np.repeat(np.array(indices, np.int32)[:, None], num_candidates, axis=1)
    return CandidateTable(
        feature_index_N=np.array(indices, np.int64),
        start_token_NK=token_NK,
        end_token_NK=token_NK + np.int32(1),
        start_logit_NK=np.zeros((count, num_candidates), f32),
        end_logit_NK=np.zeros((count, num_candidates), f32),
        null_start_logit_N=np.array(indices, f32),
        null_end_logit_N=np.zeros(count, f32),
    )


def skip_without_package_of(normalization: str) -> None:
    """Skip a test of a set of rules whose package is not installed."""
    if normalization == "cmrc":
        pytest.importorskip("nltk", reason="nltk is not installed (the extra cmrc)")
