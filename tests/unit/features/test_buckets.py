"""Batches of few sizes: what fills them up, and that it changes neither losses nor gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qa_dist.benchmarking.synthetic import SyntheticStore
from qa_dist.config.options import ModelConfig
from qa_dist.features.buckets import Bucket, BucketBatch, BucketInputs
from qa_dist.features.collate import FeatureBatch
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel, span_loss
from tests.tiny import tiny_model

CPU = torch.device("cpu")
LONGEST = 64


@pytest.mark.parametrize("max_tokens", [1, 700, 10**9])
def test_a_bucket_holds_its_features_and_wastes_little(max_tokens: int) -> None:
    rng = np.random.default_rng(0)
    for num_features in (1, 2, 7, 8, 9, 100, 1000):
        lengths = rng.integers(1, LONGEST + 1, num_features).tolist()
        bucket = Bucket.of(lengths, longest=LONGEST, max_tokens=max_tokens)
        filled = bucket.fill(lengths)
        assert list(filled[:num_features]) == lengths
        assert (sum(filled), len(filled)) == (bucket.tokens, bucket.slots)
        assert max(filled) <= LONGEST
        assert bucket.tokens <= max(max_tokens, sum(lengths))
        assert bucket.tokens - sum(lengths) < max(256, sum(lengths) / 32)
        assert bucket.slots & (bucket.slots - 1) == 0
        assert bucket == Bucket.of(lengths[::-1], longest=LONGEST, max_tokens=max_tokens), "sizes alone decide"


def test_rows_of_squad_fall_into_few_buckets() -> None:
    lengths = SyntheticStore(32 * 400, seed=3, vocab_size=100).lengths.reshape(400, 32)
    buckets = {Bucket.of(row.tolist(), longest=384, max_tokens=10**9) for row in lengths}
    assert 2 < len(buckets) <= 14
    waste = sum(Bucket.of(row.tolist(), longest=384, max_tokens=10**9).tokens for row in lengths) / lengths.sum()
    assert waste < 1.03


def model_of(model_type: str, folder: Path) -> SpanModel:
    config = ModelConfig(model_name_or_path=str(tiny_model(model_type, folder)), tuning="full")
    return build_model(config, seed=1, max_seq_length=LONGEST)[0].train()


def gradients(model: SpanModel) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.trainable() if weight.grad is not None}
    model.zero_grad()
    return found


def test_in_float64_a_loss_does_not_see_what_fills_the_bucket() -> None:
    store: Any = SyntheticStore(9, seed=2, vocab_size=200, max_seq_length=LONGEST, doc_stride=16)
    indices = np.arange(9)
    batch = FeatureBatch.of(store, indices, CPU)
    (filled,) = BucketBatch.several(store, [(indices, indices)], [0.25], CPU, longest=LONGEST, max_tokens=10**9)
    inputs = BucketInputs.within(filled.numbers, filled.bucket)
    logits = torch.randn(2, filled.bucket.tokens, dtype=torch.float64) * 8
    num_tokens = sum(batch.lengths)
    whole, alone = logits.clone().requires_grad_(), logits[:, :num_tokens].clone().requires_grad_()
    losses_S = span_loss(*whole, (), inputs.labels_S2, inputs.row)
    losses_B = span_loss(*alone, batch.lengths, batch.labels_B2, batch.row)
    (losses_S * inputs.weights_S).sum().backward()
    (losses_B * 0.25).sum().backward()
    assert losses_S.isfinite().all()
    torch.testing.assert_close(losses_S[:9], losses_B, rtol=0, atol=1e-12)
    assert whole.grad is not None
    torch.testing.assert_close(whole.grad[:, :num_tokens], alone.grad, rtol=0, atol=1e-14)
    assert not whole.grad[:, num_tokens:].any()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_losses_and_gradients_are_those_without_what_fills_the_bucket(model_type: str, tmp_path: Path) -> None:
    model, limit = model_of(model_type, tmp_path), 2e-5
    store: Any = SyntheticStore(60, seed=2, vocab_size=200, max_seq_length=LONGEST, doc_stride=16)
    rng = np.random.default_rng(1)
    for num_features in (1, 5, 9):
        indices = rng.permutation(60)[:num_features]
        batch = FeatureBatch.of(store, indices, CPU)
        losses_B = span_loss(
            *model(batch.input_ids_T, batch.token_type_ids_T, batch.lengths, batch.row),
            batch.lengths,
            batch.labels_B2,
            batch.row,
        )
        (losses_B.sum() * 0.25).backward()
        wanted = gradients(model)
        places = np.arange(num_features)
        (filled,) = BucketBatch.several(store, [(indices, places)], [0.25], CPU, longest=LONGEST, max_tokens=10**9)
        assert filled.bucket.tokens > sum(batch.lengths), "nothing is filled up"
        inputs = BucketInputs.within(filled.numbers, filled.bucket)
        logits = model(inputs.input_ids_T, inputs.token_type_ids_T, (), inputs.row)
        losses_S = span_loss(*logits, (), inputs.labels_S2, inputs.row)
        assert losses_S.isfinite().all()
        (losses_S * inputs.weights_S.float()).sum().backward()
        torch.testing.assert_close(losses_S[:num_features], losses_B, rtol=limit, atol=limit)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        size = max(float(each.abs().max()) for each in wanted.values())
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=limit * size, msg=name)


def test_batches_of_a_step_keep_their_features_places_and_weights() -> None:
    store: Any = SyntheticStore(20, seed=2, vocab_size=200, max_seq_length=LONGEST, doc_stride=16)
    groups = [(np.array([3, 4, 9]), np.array([2, 0, 1])), (np.array([7]), np.array([0]))]
    batches = BucketBatch.several(store, groups, [0.5, 0.0], CPU, longest=LONGEST, max_tokens=10**9)
    for batch, (indices, places), weight in zip(batches, groups, [0.5, 0.0], strict=True):
        inputs, count = BucketInputs.within(batch.numbers, batch.bucket), len(indices)
        ids, types = store.flat(indices)
        assert batch.num_features == count
        assert batch.places_B.tolist() == places.tolist()
        assert inputs.input_ids_T[: len(ids)].tolist() == ids.tolist()
        assert inputs.token_type_ids_T[: len(ids)].tolist() == types.tolist()
        assert not inputs.input_ids_T[len(ids) :].any()
        assert inputs.labels_S2[:count, 0].tolist() == store.start_token[indices].tolist()
        assert inputs.labels_S2[:count, 1].tolist() == store.end_token[indices].tolist()
        assert inputs.weights_S.tolist() == [weight] * count + [0.0] * (batch.bucket.slots - count)
        assert inputs.row.cumulative.diff().tolist()[:count] == store.lengths[indices].tolist()
        assert inputs.row.cumulative[-1] == batch.bucket.tokens
        assert int(inputs.row.positions_T.max()) < LONGEST
