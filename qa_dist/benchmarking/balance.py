"""How evenly the tokens of a step are divided among ranks, simulated: no processes are needed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qa_dist.benchmarking.synthetic import squad_windows
from qa_dist.features.batching import balance, token_imbalance

WORLD_SIZES = (2, 8, 64, 512)
FEATURES_PER_RANK = 16

_MIN_STEPS, _SIMULATED_RANKS = 20, 2048


def simulate(world_sizes: Sequence[int] = WORLD_SIZES, *, seed: int = 0) -> list[dict[str, Any]]:
    """Most tokens of any rank over the mean, for each world size: the mean over simulated steps.

    `dealt` divides a step as qa_dist does, `plain` as data loaders do, by position in a random order. Each rank has 16
    features of SQuAD's lengths per step.
    """
    simulated = []
    for world_size in world_sizes:
        num_steps = max(_MIN_STEPS, _SIMULATED_RANKS // world_size)
        size = world_size * FEATURES_PER_RANK
        lengths = squad_windows(num_steps * size, seed=seed).lengths
        # Windows of one context stand together; an epoch's order is random.
        lengths = np.random.default_rng(seed).permutation(lengths).reshape(num_steps, size)
        dealt = [token_imbalance([int(step[share].sum()) for share in balance(step, world_size)]) for step in lengths]
        plain = [token_imbalance(step.reshape(world_size, -1).sum(1).tolist()) for step in lengths]
        simulated.append(
            {
                "world_size": world_size,
                "features_per_rank": FEATURES_PER_RANK,
                "num_steps": num_steps,
                "dealt": float(np.mean(dealt)),
                "plain": float(np.mean(plain)),
            }
        )
    return simulated
