"""Batches must not depend on the world that computes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.features.batching import (
    balance,
    epoch_order,
    evaluation_batches,
    global_batch,
    pack_padded,
    pack_unpadded,
    plan_step,
    share_batches,
    steps_per_epoch,
    token_imbalance,
)

LENGTHS = st.lists(st.integers(1, 384), min_size=1, max_size=60).map(lambda values: np.array(values, dtype=np.int32))


def test_epoch_order_is_a_permutation_of_seed_and_epoch() -> None:
    first = epoch_order(101, seed=7, epoch=0)
    assert sorted(first.tolist()) == list(range(101))
    assert np.array_equal(first, epoch_order(101, seed=7, epoch=0))
    assert not np.array_equal(first, epoch_order(101, seed=7, epoch=1))
    assert not np.array_equal(first, epoch_order(101, seed=8, epoch=0))


@pytest.mark.parametrize(("num_features", "size"), [(1, 16), (16, 16), (17, 16), (100, 7)])
def test_an_epoch_sees_every_feature_once_and_keeps_the_short_step(num_features: int, size: int) -> None:
    order = epoch_order(num_features, seed=0, epoch=3)
    steps = [global_batch(order, step, size) for step in range(steps_per_epoch(num_features, size))]
    assert np.concatenate(steps).tolist() == order.tolist()
    assert len(steps[-1]) == (num_features % size or size)


@given(LENGTHS, st.integers(1, 9))
def test_balance_gives_every_position_to_one_bin_within_grahams_bound(costs: np.ndarray, num_bins: int) -> None:
    bins = balance(costs, num_bins)
    assert len(bins) == num_bins
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(costs)))
    # What any list schedule keeps, and putting two large costs together needlessly breaks (Graham 1966).
    bound = costs.sum() / num_bins + (1 - 1 / num_bins) * costs.max()
    assert max(costs[members].sum() for members in bins) <= bound + 1e-9


def test_squad_like_lengths_are_balanced() -> None:
    costs = np.random.default_rng(0).integers(60, 384, 8 * 16).astype(np.int32)
    assert token_imbalance([int(costs[members].sum()) for members in balance(costs, 8)]) < 1.01
    plain = [int(costs[rank::8].sum()) for rank in range(8)]
    assert token_imbalance(plain) > 1.03


@given(LENGTHS, st.integers(384, 4000))
def test_unpadded_micro_batches_hold_the_budget(lengths: np.ndarray, budget: int) -> None:
    bins = pack_unpadded(lengths, budget)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= budget for members in bins)
    # No two bins fit together less than half: never more than twice the least number.
    assert len(bins) <= max(1, 2 * int(np.ceil(lengths.sum() / budget)))


@given(LENGTHS, st.integers(384, 4000), st.sampled_from([None, 384]))
def test_padded_micro_batches_hold_the_budget_with_padding(lengths: np.ndarray, budget: int, fixed: int | None) -> None:
    bins = pack_padded(lengths, budget, fixed)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert all((fixed or lengths[members].max()) * len(members) <= budget for members in bins)


def test_a_feature_longer_than_the_budget_stands_alone() -> None:
    lengths = np.array([10, 500, 10], dtype=np.int32)
    for bins in (pack_unpadded(lengths, 100), pack_padded(lengths, 100)):
        assert [1] in [members.tolist() for members in bins]
        assert sorted(np.concatenate(bins).tolist()) == [0, 1, 2]


@given(LENGTHS, st.integers(1, 7), st.integers(384, 3000), st.booleans())
def test_a_step_computes_each_feature_once_in_equally_many_micro_batches(
    lengths: np.ndarray, world_size: int, budget: int, padded: bool
) -> None:
    plan = plan_step(lengths, world_size=world_size, max_tokens=budget, padded=padded)
    assert plan.most_tokens == max(sum(int(lengths[part].sum()) for part in share) for share in plan.shares)
    assert len(plan.shares) == world_size
    assert len({len(share) for share in plan.shares}) == 1
    seen = np.concatenate([members for share in plan.shares for members in share])
    assert sorted(seen.tolist()) == list(range(len(lengths)))


def test_ranks_without_a_feature_get_an_empty_micro_batch() -> None:
    plan = plan_step(np.array([3, 4], dtype=np.int32), world_size=3, max_tokens=100)
    assert [len(share[0]) for share in plan.shares] == [1, 1, 0]


@given(LENGTHS, st.integers(384, 3000), st.integers(1, 7))
def test_evaluation_batches_are_the_same_at_every_world_size(lengths: np.ndarray, budget: int, world_size: int) -> None:
    batches = evaluation_batches(lengths, budget)
    shares = [share_batches(batches, lengths, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    shared = sorted(tuple(batch.tolist()) for share in shares for batch in share if len(batch))
    assert shared == sorted(tuple(batch.tolist()) for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))


@given(LENGTHS, st.integers(384, 3000), st.sampled_from([None, 384]), st.integers(1, 7))
def test_each_rank_evaluates_its_largest_batch_first(
    lengths: np.ndarray, budget: int, fixed: int | None, world_size: int
) -> None:
    batches = evaluation_batches(lengths, budget, fixed)
    packed = pack_padded(lengths, budget, fixed)
    assert sorted(batch.tolist() for batch in batches) == sorted(batch.tolist() for batch in packed)
    for rank in range(world_size):
        share = share_batches(batches, lengths, world_size=world_size, rank=rank)
        tokens = [int(lengths[batch].sum()) for batch in share]
        assert tokens == sorted(tokens, reverse=True)
    assert batches[0].tolist() == share_batches(batches, lengths, world_size=1, rank=0)[0].tolist()


def one_by_one(costs: np.ndarray, num_bins: int) -> list[list[int]]:
    """Graham's rule in its plainest form: the largest cost that is left goes to the bin with the least."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for position in sorted(range(len(costs)), key=lambda place: (-int(costs[place]), place)):
        least = loads.index(min(loads))
        bins[least].append(position)
        loads[least] += int(costs[position])
    return bins


@pytest.mark.parametrize("num_bins", [1, 2, 7, 64, 65, 150])
@pytest.mark.parametrize("largest", [1, 3, 384, 100_000])
def test_dealing_many_at_a_time_is_dealing_one_by_one(num_bins: int, largest: int) -> None:
    rng = np.random.default_rng((num_bins, largest))
    for num_costs in (0, 1, num_bins - 1, num_bins, 3 * num_bins + 1, 700):
        costs = rng.integers(1, largest + 1, num_costs).astype(np.int32)
        assert [members.tolist() for members in balance(costs, num_bins)] == one_by_one(costs, num_bins)
    # One that outweighs all others, so that its bin is never due again.
    costs[0] = costs.sum()
    assert [members.tolist() for members in balance(costs, num_bins)] == one_by_one(costs, num_bins)


@pytest.mark.parametrize("world_size", [1, 5, 100])
def test_a_share_within_the_budget_is_one_micro_batch_in_the_order_of_its_features(world_size: int) -> None:
    lengths = np.random.default_rng(world_size).integers(1, 385, 400).astype(np.int32)
    plan = plan_step(lengths, world_size=world_size, max_tokens=1 << 20)
    wanted = [sorted(members) for members in one_by_one(lengths, world_size)]
    assert [[batch.tolist() for batch in share] for share in plan.shares] == [[members] for members in wanted]
