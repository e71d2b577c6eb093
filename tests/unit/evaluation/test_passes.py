"""Candidates of a stream of passes: those of each feature, and on a CPU nothing of a pass left when the next begins."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation import passes
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.passes import BatchLogits, candidates

LENGTHS = ((9, 7), (), (5,), (8, 8, 3))
CONFIG = EvaluationConfig(n_best_size=3, max_answer_length=4)


def passes_of(kept: list[Any]) -> Iterator[BatchLogits]:
    """Passes of features of these lengths; what is kept of those before is noted each time."""
    generator = torch.Generator().manual_seed(1)
    made: list[Any] = []
    first = 0
    for lengths in LENGTHS:
        kept.append([reference() for reference in made if reference() is not None])
        lengths_B = torch.tensor(lengths, dtype=torch.long)
        batch: Any = SimpleNamespace(
            indices=np.arange(first, first + len(lengths)),
            lengths=lengths,
            lengths_B=lengths_B,
            context_start_B=torch.ones_like(lengths_B),
            context_end_B=lengths_B,
            cls_token_B=torch.zeros_like(lengths_B),
        )
        first += len(lengths)
        logits = BatchLogits(batch, *torch.randn(2, sum(lengths), generator=generator))
        made += [weakref.ref(logits.start_T), weakref.ref(lengths_B)]
        yield logits
        del logits, batch, lengths_B


@pytest.mark.parametrize("together", [1, 4, 256])
def test_the_candidates_of_a_feature_do_not_depend_on_how_many_are_searched_for_in_one_go(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    alone = CandidateTable.concatenate(list(candidates(passes_of([]), CONFIG)))
    monkeypatch.setitem(passes._DECODED_TOGETHER, "cpu", together)
    tables = list(candidates(passes_of([]), CONFIG))
    assert len(tables) == {1: 3, 4: 1, 256: 1}[together]
    found = CandidateTable.concatenate(tables)
    assert [found.candidates(row) for row in range(6)] == [alone.candidates(row) for row in range(6)]
    assert found.feature_index_N.tolist() == list(range(6))


def test_on_a_cpu_nothing_of_a_pass_is_left_when_the_next_begins() -> None:
    kept: list[Any] = []
    assert len(list(candidates(passes_of(kept), CONFIG))) == 3
    assert kept == [[]] * 4
