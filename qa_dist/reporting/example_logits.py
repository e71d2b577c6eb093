"""What a trained model says of an example: the logits of each token of its windows, and its n-best list."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qa_dist.config.options import RunConfig
from qa_dist.evaluation.answers import decode
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.passes import BatchLogits, candidates, logits_of
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.building import may_lack_answers
from qa_dist.features.store import FeatureStore
from qa_dist.features.table import FeatureTable
from qa_dist.features.token_budget import EVALUATION_TOKENS
from qa_dist.features.windows import FeatureColumns
from qa_dist.model.precision import autocast
from qa_dist.model.saved import load_as_trained
from qa_dist.model.trainable import check_vocabulary


def add_answers(found: dict[str, Any], store: FeatureStore, config: RunConfig, adapter: str, tokenizer: Any) -> None:
    """Add what a model says to the view of an example.

    Every token gets `start_logit` and `end_logit`, and the view `adapter` and `answers`: the n-best list over all
    windows of the example, as an evaluation makes it, whichever of them are shown. All is computed on the CPU, in
    float32.

    Args:
        found: What `examples.example_view` gave.
        store: The examples and their features.
        config: The configuration that the model was trained and is evaluated with.
        adapter: Its folder.
        tokenizer: Its tokenizer.

    Raises:
        UserError: The model cannot be loaded, its vocabulary is too small, or its logits are not numbers.
    """
    rows = np.flatnonzero(store.example_index == found["example"]["index"]).tolist()
    table = FeatureTable.of(FeatureColumns.of([replace(store.feature(row), example_index=0) for row in rows]))
    computed = _logits(table, config, adapter, tokenizer)
    _add_logits(found, rows, computed)
    evaluation = config.evaluation
    answers = decode(
        CandidateTable.concatenate(list(candidates(computed, evaluation))).ordered(table.num_features),
        table.feature_map(),
        [found["example"]["context"]],
        [found["example"]["id"]],
        n_best_size=evaluation.n_best_size,
        version_2=may_lack_answers(config.data, [store]),
        null_score_diff_threshold=evaluation.null_threshold,
    )[0]
    found["adapter"] = adapter
    found["answers"] = [
        {
            "text": each.text,
            "score": each.score,
            "probability": each.probability,
            "start_char": each.start_char,
            "end_char": each.end_char,
            "is_chosen": each is answers.prediction,
        }
        for each in answers.nbest
    ]


def _logits(table: FeatureTable, config: RunConfig, adapter: str, tokenizer: Any) -> list[BatchLogits]:
    """The logits of some windows, batch by batch."""
    device = torch.device("cpu")
    model = load_as_trained(config, adapter, tokenizer, device)
    check_vocabulary(model, table.largest_token_id)
    budget = config.evaluation.eval_tokens_per_device or EVALUATION_TOKENS["cpu"]
    batches = evaluation_batches(table.lengths, budget, model.padded_length)
    return list(logits_of(model, table, batches, device, autocast=lambda: autocast("cpu", "no")))


def _add_logits(found: dict[str, Any], rows: Sequence[int], computed: Sequence[BatchLogits]) -> None:
    """Give the tokens that are shown their logits; `rows` are the features of the data set that were computed."""
    starts, ends = {}, {}
    for logits in computed:
        lengths = list(logits.batch.lengths)
        for place, start, end in zip(
            np.asarray(logits.batch.indices).tolist(),
            torch.split(logits.start_T.float(), lengths),
            torch.split(logits.end_T.float(), lengths),
            strict=True,
        ):
            starts[rows[place]], ends[rows[place]] = start.tolist(), end.tolist()
    for feature in found["features"]:
        for token in feature["tokens"]:
            token["start_logit"] = starts[feature["feature"]][token["position"]]
            token["end_logit"] = ends[feature["feature"]][token["position"]]
