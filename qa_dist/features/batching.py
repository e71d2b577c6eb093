"""Batches as a pure function of (seed, epoch, step), and their fair division among ranks.

The global batch of a step holds the same features at every world size; ranks, micro-batches and token budgets only
decide who computes which of them and when. Nothing here holds state: (epoch, step) is the whole position of a run.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Indices

Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Who computes what in one optimiser step.

    Attributes:
        shares: for each rank its micro-batches, each an int64 array of positions in the global batch. All ranks have
            the same number of micro-batches, so that collectives inside the forward and backward pass line up; an empty
            one is to be computed with weight zero.
        most_tokens: real tokens of the rank that has the most.
    """

    shares: tuple[tuple[Indices, ...], ...]
    most_tokens: int


def epoch_order(num_features: int, *, seed: int, epoch: int) -> Indices:
    """The order of the features in an epoch, int64 [num_features]: a permutation drawn from (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(num_features)


def steps_per_epoch(num_features: int, global_batch_size: int) -> int:
    """Optimiser steps of one epoch; the last may be short, none is dropped."""
    return math.ceil(num_features / global_batch_size)


def steps_in(share: float, num_steps: int) -> int:
    """Steps of a share of some, such as 2.2 epochs or a tenth of a run; a step that is begun is taken whole."""
    # As decimals: 2.2 times 25 is a little more than 55 in binary.
    return math.ceil(Fraction(repr(float(share))) * num_steps)


def global_batch(order: Indices, step: int, global_batch_size: int) -> Indices:
    """Feature indices of step `step` (from 0) of an epoch with this order, int64 [G_step]."""
    return order[step * global_batch_size : (step + 1) * global_batch_size]


def balance(costs: npt.NDArray[np.int64] | Lengths, num_bins: int) -> list[Indices]:
    """Positions of `costs` for each bin: largest first, each to the bin with the least cost so far.

    This is Graham's longest-processing-time rule: its largest bin is at most 4/3 of the best possible (R. L. Graham,
    Bounds on multiprocessing timing anomalies, 1969). Ties go to the lower position and the lower bin, so the result
    depends on the arguments alone.
    """
    order = _stable_order(-costs.astype(np.int64))
    bin_of = _deal(costs[order].astype(np.int64), num_bins)
    return _grouped(order[_stable_order(bin_of)], bin_of, num_bins)


def _stable_order(values: npt.NDArray[np.int64]) -> Indices:
    """Positions of the values, smallest first, equal ones as they come."""
    if len(values) and int(np.abs(values).max()) < 1 << 15:
        # numpy sorts numbers of 16 bits by their digits, in a fraction of the time.
        return np.argsort(values.astype(np.int16), kind="stable")
    return np.argsort(values, kind="stable")


_FEW = 64
"""Below so many bins at a time, a heap is faster than arrays (measured on a CPU with AVX2)."""


def _deal(costs: npt.NDArray[np.int64], num_bins: int) -> npt.NDArray[np.int64]:
    """The bin of each cost by Graham's rule, int64 [len(costs)]; costs come largest first.

    Bins are put in the order in which they would be taken if none came up twice, and dealt to in that order, until one
    that has been dealt to is due again: for lengths of features that is seldom before all have had one.
    """
    loads = np.zeros(num_bins, dtype=np.int64)
    if num_bins < _FEW:
        return np.array(_deal_one_by_one(costs, loads), dtype=np.int64)
    bin_of = np.empty(len(costs), dtype=np.int64)
    done = 0
    while done < len(costs):
        bins = np.argsort(loads, kind="stable")[: len(costs) - done]
        waiting = loads[bins]
        # Loads and numbers of bins in one figure: of equal loads the lower bin is due.
        filled = (waiting + costs[done : done + len(bins)]) * num_bins + bins
        is_due_again = np.minimum.accumulate(filled[:-1]) < waiting[1:] * num_bins + bins[1:]
        count = int(is_due_again.argmax()) + 1 if is_due_again.any() else len(bins)
        if count < _FEW:
            count = min(len(costs) - done, num_bins)
            bin_of[done : done + count] = _deal_one_by_one(costs[done : done + count], loads)
        else:
            bin_of[done : done + count] = bins[:count]
            loads[bins[:count]] += costs[done : done + count]
        done += count
    return bin_of


def _deal_one_by_one(costs: npt.NDArray[np.int64], loads: npt.NDArray[np.int64]) -> list[int]:
    """The bin of each cost, given what the bins hold, which is brought up to date."""
    num_bins = len(loads)
    heap = (loads * num_bins + np.arange(num_bins)).tolist()
    heapq.heapify(heap)
    bin_of = []
    for cost in costs.tolist():
        bin_of.append(heap[0] % num_bins)
        heapq.heapreplace(heap, heap[0] + cost * num_bins)
    for figure in heap:
        loads[figure % num_bins] = figure // num_bins
    return bin_of


def _grouped(members: Indices, bin_of: npt.NDArray[np.int64], num_bins: int) -> list[Indices]:
    """The members of each bin, which come one bin behind the other, given the bin of each in any order."""
    ends = np.cumsum(np.bincount(bin_of, minlength=num_bins)).tolist()
    return [members[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def pack_unpadded(lengths: Lengths, max_tokens: int) -> list[Indices]:
    """Positions of `lengths` in as few micro-batches of at most `max_tokens` real tokens as balancing finds.

    A feature longer than the budget gets a micro-batch of its own.
    """
    if not len(lengths):
        return []
    for num_bins in range(math.ceil(int(lengths.sum()) / max_tokens), len(lengths)):
        bins = balance(lengths, num_bins)
        if all(int(lengths[members].sum()) <= max_tokens for members in bins):
            return bins
    return [np.array([position], dtype=np.int64) for position in range(len(lengths))]


def pack_padded(lengths: Lengths, max_tokens: int, padded_length: int | None = None) -> list[Indices]:
    """Positions of `lengths`, longest first, in micro-batches of at most `max_tokens` tokens after padding.

    Args:
        lengths: Real tokens per feature.
        max_tokens: Budget, padding included; a feature longer than it gets a micro-batch of its own.
        padded_length: Pad to this length; None: to the longest of the micro-batch.
    """
    bins: list[list[int]] = []
    width = 0
    for position in np.argsort(-lengths, kind="stable"):
        if not bins or (len(bins[-1]) + 1) * width > max_tokens:
            bins.append([])
            width = padded_length or int(lengths[position])
        bins[-1].append(int(position))
    return [np.array(members, dtype=np.int64) for members in bins]


def plan_step(
    lengths: Lengths,
    *,
    world_size: int,
    max_tokens: int,
    padded: bool = False,
    padded_length: int | None = None,
) -> StepPlan:
    """The division of a global batch among ranks and micro-batches.

    Args:
        lengths: Real tokens of each feature of the global batch, int32 [G_step].
        world_size: Number of ranks.
        max_tokens: Token budget of a micro-batch.
        padded: Whether the model computes padding, so that it counts.
        padded_length: With `padded`: the length that every feature is padded to; None: the micro-batch's longest.
    """
    order = _stable_order(-lengths.astype(np.int64))
    rank_of = np.empty(len(lengths), dtype=np.int64)
    rank_of[order] = _deal(lengths[order].astype(np.int64), world_size)
    tokens = np.bincount(rank_of, weights=lengths, minlength=world_size).tolist()
    # A fixed order inside a micro-batch: its sums then do not depend on how it came about.
    of_ranks = _grouped(_stable_order(rank_of), rank_of, world_size)
    shares: list[list[Indices]] = []
    for share, num_tokens in zip(of_ranks, tokens, strict=True):
        if not padded and num_tokens <= max_tokens:
            shares.append([share] if len(share) else [])
            continue
        largest_first = share[np.argsort(-lengths[share].astype(np.int64), kind="stable")]
        micro_batches = (
            pack_padded(lengths[largest_first], max_tokens, padded_length)
            if padded
            else pack_unpadded(lengths[largest_first], max_tokens)
        )
        shares.append([np.sort(largest_first[members]) for members in micro_batches])
    most = max(len(share) for share in shares)
    empty = np.empty(0, dtype=np.int64)
    padded_shares = tuple((*share, *[empty] * (most - len(share))) for share in shares)
    return StepPlan(padded_shares, int(max(tokens)))


def evaluation_batches(lengths: Lengths, max_tokens: int, padded_length: int | None = None) -> list[Indices]:
    """Feature indices of each evaluation batch: neighbours in length, at most `max_tokens` tokens after padding.

    The batches depend on the lengths and the budget alone. Ranks take whole batches, so a feature meets the same
    neighbours, and the same rounding, at every world size.

    The batch with the most tokens comes first. What a pass takes then fits where that of the pass before has been: with
    passes of more and fewer tokens in turn, heaps grow around gaps that are a little too small.
    """
    batches = pack_padded(lengths, max_tokens, padded_length)
    return sorted(batches, key=lambda batch: -int(lengths[batch].sum()))


def share_batches(batches: Sequence[Indices], lengths: Lengths, *, world_size: int, rank: int) -> list[Indices]:
    """The evaluation batches that `rank` computes: whole batches, balanced by tokens.

    Empty batches at the end give all ranks the same number, so that those which compute together can.
    """
    costs = np.array([int(lengths[batch].sum()) for batch in batches], dtype=np.int64)
    shares = balance(costs, world_size)
    empty = [np.empty(0, dtype=np.int64)] * (max(map(len, shares)) - len(shares[rank]))
    return [batches[position] for position in shares[rank]] + empty


def token_imbalance(shares_tokens: Sequence[int]) -> float:
    """Most tokens of any rank over the mean: 1.0 is perfect balance, the excess is time others wait."""
    return max(shares_tokens) * len(shares_tokens) / sum(shares_tokens)
