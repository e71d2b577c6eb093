"""Searches that try every span, one at a time, with Python's own sort, tables of candidates to decode, and a skip."""

import math

import numpy as np
import pytest
import torch

from qa_dist.evaluation.candidates import CandidateTable, top_spans

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
    rows, *, num_candidates, max_answer_length, search, padding=0, fill=math.nan, indices=None
) -> CandidateTable:
    """`top_spans` of rows (start logits, end logits, context start, context end), padded with what must not be read."""
    length = max(len(row[0]) for row in rows) + padding
    start_BL = torch.full((len(rows), length), fill)
    end_BL = torch.full((len(rows), length), fill)
    for i, (start_logits, end_logits, _, _) in enumerate(rows):
        start_BL[i, : len(start_logits)] = torch.from_numpy(np.asarray(start_logits, f32))
        end_BL[i, : len(end_logits)] = torch.from_numpy(np.asarray(end_logits, f32))
    return top_spans(
        range(len(rows)) if indices is None else indices,
        start_BL,
        end_BL,
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
        torch.zeros(len(rows), dtype=torch.int64),
        torch.tensor([len(row[0]) for row in rows]),
        num_candidates=num_candidates,
        max_answer_length=max_answer_length,
        search=search,
    )


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
