"""The evaluation loop: every rank turns its features into candidates, rank 0 turns candidates into scored answers.

Evaluation batches are fixed by the data and the token budget, and ranks take whole batches: a feature is computed with
the same neighbours at every world size, so the results are the same, byte for byte.
"""

import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qa_dist.common.arrays import Indices
from qa_dist.common.columns import mib
from qa_dist.common.errors import LocalTrainingError
from qa_dist.common.files import staged
from qa_dist.config.options import EvaluationConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.answers import Answers, decode
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.graph_passes import EvaluationGraphs
from qa_dist.evaluation.normalization import SQUAD, Normalization, normalization
from qa_dist.evaluation.passes import BatchLogits, candidates, logits_of
from qa_dist.evaluation.results import Evaluation, Metrics
from qa_dist.evaluation.scoring import Scores, score_v1, score_v2
from qa_dist.features.batching import evaluation_batches, share_batches
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.store import FeatureStore
from qa_dist.features.token_budget import EVALUATION_TOKENS
from qa_dist.model.span_model import SpanModel


class _Losses:
    """Losses of features as they come; a GPU's stay there until all are, so that nobody waits for each batch."""

    def __init__(self) -> None:
        self._indices: list[Indices] = []
        self._losses: list[torch.Tensor] = []

    def add(self, logits: BatchLogits) -> None:
        """Note the losses of a batch, which may be empty."""
        if len(logits.batch.indices):
            self._indices.append(logits.batch.indices)
            self._losses.append(logits.losses_B)

    def summed(self, ranks: Ranks, num_features: int) -> npt.NDArray[np.float64]:
        """The losses of all ranks, [num_features] and 0 where there is none; all ranks must ask together."""
        losses = torch.zeros(num_features, dtype=torch.float64, device=ranks.device)
        if self._indices:
            losses[torch.from_numpy(np.concatenate(self._indices)).to(ranks.device)] = torch.cat(self._losses)
        # Every rank adds to its own entries of a vector of zeros, so the sum has no rounding and no order.
        summed: npt.NDArray[np.float64] = ranks.sum(losses).cpu().numpy()
        return summed


def evaluate(
    model: SpanModel,
    store: FeatureStore,
    ranks: Ranks,
    config: EvaluationConfig,
    *,
    version_2: bool,
    forward_needs_all_ranks: bool = False,
    graphs: EvaluationGraphs | None = None,
    logits_path: Path | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Score the model on all examples of a store; every rank must call this.

    Args:
        model: The model, unwrapped; it is in evaluation mode afterwards.
        store: The examples and their features.
        ranks: The processes that share the work.
        config: How logits become answers.
        version_2: Whether the null answer is a choice.
        forward_needs_all_ranks: Whether a forward pass must be done by all ranks together, as the engine of a model in
            training says.
        graphs: What replays passes of the model; None: they are launched.
        logits_path: With `config.gather` "logits": where rank 0 keeps them, float32 [tokens of the store, 2] in the
            order of the features, start logits in column 0. A file that is there is replaced when the answers are
            scored, and not before.
        advance: Called after each batch with the number of features that this rank has computed and has to compute.

    Raises:
        ConfigError: `config.answer_normalization` needs a package that is not installed.
        Stopped: On every rank, if any of them was asked to stop meanwhile.
    """
    rules = normalization(config.answer_normalization)
    batches = evaluation_batches(store.lengths, _budget(config, ranks), model.padded_length)
    mine = share_batches(batches, store.lengths, world_size=ranks.world_size, rank=ranks.rank)
    losses = _Losses()
    if config.gather == "logits" and logits_path is None:
        raise ValueError("gathering logits needs a path to keep them at")
    answers = None
    metrics: Metrics = {}
    with ExitStack() as stack:
        passes = stack.enter_context(closing(forward(model, store, ranks, mine, forward_needs_all_ranks, graphs)))
        logits = _noted(passes, losses, sum(map(len, mine)), advance)
        if config.gather == "logits":
            path = stack.enter_context(staged(logits_path)) if logits_path and ranks.is_main else None
            tables = _through_logits(logits, store, ranks, config, batches, len(mine), path)
        else:
            table = CandidateTable.concatenate([CandidateTable.empty(config.n_best_size), *candidates(logits, config)])
            ranks.stop_if_asked()
            tables = ranks.gather(table)
        loss = _mean(losses.summed(ranks, store.num_features), store.is_labelled)
        if ranks.is_main:
            answers = answer(tables, store, config, version_2=version_2)
            metrics = score(store, answers, version_2=version_2, rules=rules)
    return Evaluation(ranks.broadcast(metrics), loss, answers, rules.name)


def evaluate_loss(
    model: SpanModel,
    store: FeatureStore,
    ranks: Ranks,
    config: EvaluationConfig,
    features: Indices,
    *,
    forward_needs_all_ranks: bool = False,
    graphs: EvaluationGraphs | None = None,
) -> Evaluation:
    """Mean loss on these features of a store; every rank must call this. For the arguments see `evaluate`."""
    lengths = store.lengths[features]
    batches = evaluation_batches(lengths, _budget(config, ranks), model.padded_length)
    mine = share_batches(batches, lengths, world_size=ranks.world_size, rank=ranks.rank)
    losses = _Losses()
    for logits in forward(model, store, ranks, [features[batch] for batch in mine], forward_needs_all_ranks, graphs):
        losses.add(logits)
    ranks.stop_if_asked()
    summed = losses.summed(ranks, store.num_features)
    return Evaluation({}, _mean(summed[features], store.is_labelled[features]), None)


def _mean(losses: npt.NDArray[np.float64], is_labelled: npt.NDArray[np.bool_]) -> float | None:
    """Mean of the losses of labelled features; None without any."""
    return float(losses[is_labelled].mean()) if is_labelled.any() else None


def answer(
    tables: Sequence[CandidateTable], store: FeatureStore, config: EvaluationConfig, *, version_2: bool
) -> Answers:
    """One answer to each example of a store, from the candidates of all its features."""
    return decode(
        CandidateTable.concatenate(tables).ordered(store.num_features),
        store.feature_map(),
        store.contexts,
        store.example_ids,
        n_best_size=config.n_best_size,
        version_2=version_2,
        null_score_diff_threshold=config.null_threshold,
    )


def known_references(store: FeatureStore) -> dict[str, list[str]]:
    """Texts of the reference answers by id, of those examples of a store whose references are known."""
    ids = [(index, example_id) for index, example_id in enumerate(store.example_ids) if store.has_references[index]]
    return {example_id: store.answer_texts(index) for index, example_id in ids}


def score(store: FeatureStore, answers: Answers, *, version_2: bool, rules: Normalization = SQUAD) -> Metrics:
    """Official scores of the answers to those examples of a store whose references are known.

    `num_examples` counts these. Where there are others, `num_unlabelled` counts them, and no scores are given if there
    are none but these. `num_dropped` counts the records that were left out as invalid, where there are any.
    """
    references = known_references(store)
    counts: Metrics = {"num_examples": len(references)}
    if num_unlabelled := store.num_examples - len(references):
        counts["num_unlabelled"] = num_unlabelled
    if store.report.num_invalid:
        counts["num_dropped"] = store.report.num_invalid
    if not references:
        return counts
    predictions = {key: text for key, text in answers.predictions().items() if key in references}
    if version_2:
        scores = score_v2(references, predictions, rules=rules)
        scores |= best_scores(references, answers, rules)
        return {"exact_match": scores["exact"], "f1": scores["f1"], **counts, **scores}
    scores = score_v1(references, predictions, rules=rules)
    return {"exact_match": scores["exact_match"], "f1": scores["f1"], **counts}


def best_scores(references: Mapping[str, Sequence[str]], answers: Answers, rules: Normalization = SQUAD) -> Scores:
    """`best_exact`, `best_exact_thresh`, `best_f1` and `best_f1_thresh` by the rule of evaluate-v2.0.py.

    A threshold on the null odds lets in the best entry with a text of each n-best list, also where the answers at hand
    are that there is none: their own threshold does not hide what another would have brought.

    Raises:
        ScoringError: The answers lack a question of the references.
    """
    texts, odds = answers.best_texts(), answers.null_odds() or {}
    found = score_v2(
        references,
        {key: text for key, text in texts.items() if key in references},
        null_odds={key: value for key, value in odds.items() if key in references},
        na_prob_thresh=math.inf,
        rules=rules,
    )
    return {name: value for name, value in found.items() if name.startswith("best_")}


def _budget(config: EvaluationConfig, ranks: Ranks) -> int:
    return config.eval_tokens_per_device or EVALUATION_TOKENS[ranks.device.type]


def forward(
    model: SpanModel,
    store: FeatureStore,
    ranks: Ranks,
    batches: Sequence[Indices],
    needs_all_ranks: bool = False,
    graphs: EvaluationGraphs | None = None,
) -> Generator[BatchLogits, None, None]:
    """The logits and losses of each batch, in the order of the batches.

    It ends early when this rank is asked to stop or, where a pass needs all ranks, when any of them is.
    """

    def wanted() -> Iterator[Indices]:
        for indices in batches:
            if _is_to_stop(ranks, together=needs_all_ranks):
                return
            ranks.watchdog.beat("evaluation")
            yield indices

    return logits_of(
        model,
        store,
        wanted(),
        ranks.device,
        autocast=ranks.autocast,
        with_losses=True,
        one_by_one=needs_all_ranks,
        # A rank with nothing left computes one feature for nothing, so that the others get its shard of the model.
        compute_empty=needs_all_ranks,
        graphs=graphs,
    )


def _is_to_stop(ranks: Ranks, *, together: bool) -> bool:
    if not together:
        return ranks.is_asked_to_stop
    return bool(ranks.sum(torch.tensor(float(ranks.is_asked_to_stop), device=ranks.device)))


def _noted(
    batches: Iterator[BatchLogits],
    losses: _Losses,
    total: int,
    advance: Callable[[int, int], object],
) -> Iterator[BatchLogits]:
    """The same; losses are noted, and progress is reported, on the way."""
    done = 0
    for logits in batches:
        indices = logits.batch.indices
        losses.add(logits)
        yield logits
        if len(indices):
            done += len(indices)
            advance(done, total)


def _through_logits(
    logits: Iterator[BatchLogits],
    store: FeatureStore,
    ranks: Ranks,
    config: EvaluationConfig,
    batches: Sequence[Indices],
    rounds: int,
    path: Path | None,
) -> list[CandidateTable]:
    """Collect all logits in a file at rank 0, batch by batch; then search for candidates there, in the same batches."""
    first_token = np.concatenate([[0], np.cumsum(store.lengths, dtype=np.int64)])
    kept = None
    if path is not None:
        kept = _new_array(path, (int(first_token[-1]), 2))
    for _ in range(rounds):
        piece = None  # This rank was asked to stop; the others may go on until all agree.
        for batch, start_T, end_T, _ in islice(logits, 1):
            piece = (batch.indices, torch.stack((start_T, end_T), 1).cpu().numpy())
        for arrived in ranks.gather(piece):
            if arrived is None or kept is None:
                continue
            indices, rows = arrived
            ends = np.cumsum(store.lengths[indices])
            for index, end, length in zip(indices, ends, store.lengths[indices], strict=True):
                kept[first_token[index] : first_token[index] + length] = rows[end - length : end]
    ranks.stop_if_asked()
    if kept is None:
        return []
    kept.flush()

    def read_back() -> Iterator[BatchLogits]:
        for indices in batches:
            batch = FeatureBatch.of(store, indices, torch.device("cpu"))
            rows = np.concatenate([kept[first_token[index] : first_token[index + 1]] for index in indices])
            start_T, end_T = torch.from_numpy(rows).unbind(1)
            yield BatchLogits(batch, start_T, end_T)

    return [CandidateTable.empty(config.n_best_size), *candidates(read_back(), config)]


def _new_array(path: Path, shape: tuple[int, int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """A float32 array in a file, whose place on the disk is there: a page that there is none for ends the process.

    Raises:
        LocalTrainingError: The file cannot be written.
    """
    try:
        kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise LocalTrainingError(
            f"the logits, {mib(math.prod(shape) * 4)} MiB, cannot be written to {path.parent}: "
            f"{error.strerror or error}; free some space, or use --gather candidates"
        ) from error
    return kept


@contextmanager
def evaluation_bar(*, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over the features of an evaluation; call what it gives with the features done and their total."""
    from tqdm import tqdm

    with tqdm(desc="evaluating", unit="feature", disable=not shown, leave=False, file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
