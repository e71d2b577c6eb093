"""Batches as a pure function of (seed, epoch, step), and their fair division among ranks.

The global batch of a step holds the same features at every world size; ranks, micro-batches and token budgets only
decide who computes which of them and when. Nothing here holds state: (epoch, step) is the whole position of a run.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Who computes what in one optimiser step.

    Attributes:
        features: int64 [G_step], the feature indices of the global batch.
        shares: for each rank its micro-batches, each an int64 array of positions in `features`. All ranks have the same
            number of micro-batches, so that collectives inside the forward and backward pass line up; an empty one is
            to be computed with weight zero.
    """

    features: Indices
    shares: tuple[tuple[Indices, ...], ...]


def epoch_order(num_features: int, *, seed: int, epoch: int) -> Indices:
    """The order of the features in an epoch, int64 [num_features]: a permutation drawn from (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(num_features)


def steps_per_epoch(num_features: int, global_batch_size: int) -> int:
    """Optimiser steps of one epoch; the last may be short, none is dropped."""
    return math.ceil(num_features / global_batch_size)


def global_batch(order: Indices, step: int, global_batch_size: int) -> Indices:
    """Feature indices of step `step` (from 0) of an epoch with this order, int64 [G_step]."""
    return order[step * global_batch_size : (step + 1) * global_batch_size]


def balance(costs: npt.NDArray[np.int64] | Lengths, num_bins: int) -> list[Indices]:
    """Positions of `costs` for each bin: largest first, each to the bin with the least cost so far.

    This is Graham's longest-processing-time rule: its largest bin is at most 4/3 of the best possible (R. L. Graham,
    Bounds on multiprocessing timing anomalies, 1969). Ties go to the lower position and the lower bin, so the result
    depends on the arguments alone.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for position in np.argsort(-costs.astype(np.int64), kind="stable"):
        load, index = heapq.heappop(heap)
        bins[index].append(int(position))
        heapq.heappush(heap, (load + int(costs[position]), index))
    return [np.array(members, dtype=np.int64) for members in bins]


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
    features: Indices,
    lengths: Lengths,
    *,
    world_size: int,
    max_tokens: int,
    padded: bool = False,
    padded_length: int | None = None,
) -> StepPlan:
    """The division of a global batch among ranks and micro-batches.

    Args:
        features: Feature indices of the global batch, int64 [G_step].
        lengths: Real tokens of each of them, int32 [G_step].
        world_size: Number of ranks.
        max_tokens: Token budget of a micro-batch.
        padded: Whether the model computes padding, so that it counts.
        padded_length: With `padded`: the length that every feature is padded to; None: the micro-batch's longest.
    """
    shares: list[list[Indices]] = []
    for share in balance(lengths, world_size):
        micro_batches = (
            pack_padded(lengths[share], max_tokens, padded_length)
            if padded
            else pack_unpadded(lengths[share], max_tokens)
        )
        # A fixed order inside a micro-batch: its sums then do not depend on how it came about.
        shares.append([np.sort(share[members]) for members in micro_batches])
    most = max(len(share) for share in shares)
    empty = np.empty(0, dtype=np.int64)
    return StepPlan(features, tuple((*share, *[empty] * (most - len(share))) for share in shares))


def evaluation_batches(lengths: Lengths, max_tokens: int, padded_length: int | None = None) -> list[Indices]:
    """Feature indices of each evaluation batch: neighbours in length, at most `max_tokens` tokens after padding.

    The batches depend on the lengths and the budget alone. Ranks take whole batches, so a feature meets the same
    neighbours, and the same rounding, at every world size.
    """
    return pack_padded(lengths, max_tokens, padded_length)


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
