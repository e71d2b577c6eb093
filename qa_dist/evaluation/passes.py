"""Forward passes of an evaluation on one device, and the candidates that their logits give; no other rank is asked.

Shapes: B features of a batch, T tokens of them together.
"""

import collections
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch

from qa_dist.common.arrays import Indices
from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.graph_passes import EvaluationGraphs
from qa_dist.evaluation.top_spans import pad_rows, top_spans
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.table import FeatureTable
from qa_dist.model.span_model import SpanModel, span_loss


class BatchLogits(NamedTuple):
    """What the model says of a batch of B features with T tokens together; B may be 0.

    Attributes:
        batch: the features.
        start_T: float32, start logits.
        end_T: float32, end logits.
        losses_B: float64, the loss of each feature, on the device; empty where it is not asked for.
    """

    batch: FeatureBatch
    start_T: torch.Tensor
    end_T: torch.Tensor
    losses_B: torch.Tensor = torch.zeros(0, dtype=torch.float64)


_DECODED_TOGETHER = {"cpu": 1, "cuda": 256}
"""Features, at least, whose candidates are searched for in one go, by device type.

On a GPU, tensors of a few features cost more in launches than in work. On a CPU a search takes less than a millisecond,
and what is kept of a pass until it begins lies between the blocks that later passes need, so that glibc's heap grows
around it: the reader of `bench answering`, 500 questions of SQuAD dev with MiniLM-L6 on one thread, takes a peak of 590
and 591 MiB, where it took 610 and 627 with 256 and the last pass in hand.
"""


def logits_of(
    model: SpanModel,
    features: FeatureTable,
    batches: Iterable[Indices],
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    with_losses: bool = False,
    one_by_one: bool = False,
    compute_empty: bool = False,
    graphs: EvaluationGraphs | None = None,
) -> Generator[BatchLogits, None, None]:
    """The logits, and the losses where they are asked for, of each batch, in the order of the batches.

    Args:
        model: The model; it is in evaluation mode afterwards.
        features: What the batches are of.
        batches: Places of features; they are taken as they are needed, a few ahead.
        device: Where the model is.
        autocast: Makes the context of a pass.
        with_losses: Whether losses are computed; they are in graphs.
        one_by_one: Whether a batch has to be done before the next begins.
        compute_empty: Whether an empty batch computes a feature all the same, for nothing.
        graphs: What replays passes of this model; None: they are launched.
    """
    model.eval()
    shortest = features.lengths.argmin(0, keepdims=True)

    def compute(indices: Indices) -> BatchLogits:
        batch = FeatureBatch.of(features, indices, device)
        if len(indices):
            return compute_batch(batch)
        if compute_empty:
            compute_batch(FeatureBatch.of(features, shortest, device))
        no_logits = torch.empty(0, device=device)
        return BatchLogits(batch, no_logits, no_logits)

    def compute_batch(batch: FeatureBatch) -> BatchLogits:
        if graphs is not None:
            return BatchLogits(batch, *graphs.run(features, batch))
        # Not inference_mode: what a strategy gathers here may stay for the next step's backward pass.
        with torch.no_grad(), autocast():
            start_T, end_T = model(batch.input_ids_T, batch.token_type_ids_T, batch.lengths, batch.row)
            if not with_losses:
                return BatchLogits(batch, start_T, end_T)
            losses_B = span_loss(start_T, end_T, batch.lengths, batch.labels_B2, batch.row).double()
        return BatchLogits(batch, start_T, end_T, losses_B)

    alone = device.type != "cpu" or one_by_one or graphs is not None or not model.is_thread_safe
    yield from map(compute, batches) if alone else _side_by_side(compute, iter(batches))


def _side_by_side(compute: Callable[[Indices], BatchLogits], batches: Iterator[Indices]) -> Iterator[BatchLogits]:
    """`map` with as many batches at once as torch has CPU threads, each on one of them.

    Threads that share a batch wait for each other in every operation, and much of an encoder's work is too small to
    share. It also makes a batch's rounding the same with any number of threads.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield from map(compute, batches)
        return
    pending: collections.deque[Future[BatchLogits]] = collections.deque()
    # What is done with the results goes on beside the batches that follow.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads, "evaluation", torch.set_num_threads, (1,)) as threads:
            for indices in batches:
                pending.append(threads.submit(compute, indices))
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(num_threads)


def candidates(batches: Iterable[BatchLogits], config: EvaluationConfig) -> Iterator[CandidateTable]:
    """Candidates of all features, which do not depend on how many are searched for in one go."""
    waiting: list[BatchLogits] = []
    for logits in batches:
        if len(logits.batch.indices):
            waiting.append(logits)
        together = _DECODED_TOGETHER[logits.start_T.device.type]
        # Nothing of a pass is kept here when the next one takes memory.
        del logits
        if sum(len(each.batch.indices) for each in waiting) >= together:
            found = _best_spans(waiting, config)
            waiting.clear()
            yield found
    if waiting:
        yield _best_spans(waiting, config)


def _best_spans(logits: Sequence[BatchLogits], config: EvaluationConfig) -> CandidateTable:
    batches = [each.batch for each in logits]
    start_T, end_T = torch.cat([each.start_T for each in logits]), torch.cat([each.end_T for each in logits])
    lengths_B = torch.cat([batch.lengths_B for batch in batches])
    longest = max(max(batch.lengths) for batch in batches)
    return top_spans(
        np.concatenate([batch.indices for batch in batches]),
        pad_rows(start_T, lengths_B, num_tokens=longest),
        pad_rows(end_T, lengths_B, num_tokens=longest),
        torch.cat([batch.context_start_B for batch in batches]),
        torch.cat([batch.context_end_B for batch in batches]),
        torch.cat([batch.cls_token_B for batch in batches]),
        lengths_B,
        num_candidates=config.n_best_size,
        max_answer_length=config.max_answer_length,
        search=config.decoding,
        length_penalty=config.answer_length_penalty,
    )
