"""How many tokens a forward and backward pass of a rank may hold: tried out on the devices before the first step."""

from collections.abc import Callable

import numpy as np
import torch

from qa_dist.common.arrays import Indices
from qa_dist.common.errors import ConfigError, LocalTrainingError
from qa_dist.distributed.engine import Engine
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.store import FeatureStore
from qa_dist.features.token_budget import CPU_TOKENS, measured_budget
from qa_dist.machine.usage import is_out_of_memory
from qa_dist.model.rdrop import copies, loss_of


def token_budget(
    ranks: Ranks,
    engine: Engine,
    store: FeatureStore,
    features: Indices,
    *,
    wanted: int | None,
    longest: int,
    max_features: int,
    reserved_bytes: int,
    num_passes: int = 1,
    rdrop_alpha: float = 0.0,
) -> int:
    """Tokens of a pass, the same on all ranks: as wanted, else a constant on the CPU and measured on CUDA.

    Args:
        ranks: All ranks; they must call this together.
        engine: The model as the ranks hold it.
        store: The features.
        features: Those that are trained on.
        wanted: What `--max_tokens_per_device` says.
        longest: Tokens of the longest feature; the least that a budget may be.
        max_features: The most of them that a pass can have.
        reserved_bytes: Memory that a step takes besides: gradients, the optimiser's moments, what it makes in a step.
        num_passes: Passes whose memory is held at the same time: 2 where graphs keep that of the largest.
        rdrop_alpha: `--rdrop_alpha`; above 0, a pass computes each of its features twice. The budget counts them once.

    Raises:
        ConfigError: The wanted budget is less than one feature.
        LocalTrainingError: This rank ran out of memory where others are in the middle of the same pass.
    """
    if wanted is not None and wanted < longest:
        raise ConfigError(
            [
                f"--max_tokens_per_device {wanted} is less than one feature, which may have {longest} tokens; "
                "raise it or lower --max_seq_length"
            ]
        )
    if wanted is not None:
        return wanted
    if ranks.device.type != "cuda":
        return max(CPU_TOKENS, longest)
    by_length = features[np.argsort(-store.lengths[features], kind="stable")]

    def run_pass(tokens: int) -> int | None:
        chosen = by_length[: max(1, tokens // longest)]
        fits = _try_pass(ranks, engine, store, np.tile(chosen, copies(rdrop_alpha)), longest, loss_of(rdrop_alpha))
        return longest * len(chosen) if fits else None

    most = longest * min(len(features), max_features)
    budget = measured_budget(
        run_pass,
        longest=longest,
        most=most,
        device=ranks.device,
        reserved_bytes=reserved_bytes,
        num_passes=num_passes,
    )
    return ranks.minimum(budget)


def _try_pass(
    ranks: Ranks,
    engine: Engine,
    store: FeatureStore,
    chosen: Indices,
    longest: int,
    loss: Callable[..., torch.Tensor],
) -> bool:
    """Whether a forward and backward pass over the chosen features, of up to `longest` tokens, fits into memory."""
    engine.module.train()
    try:
        batch = FeatureBatch.of(store, chosen, ranks.device)
        with ranks.autocast():
            start_T, end_T = engine.module(batch.input_ids_T, batch.token_type_ids_T, batch.lengths, batch.row)
        engine.dry_backward(loss(start_T, end_T, batch.lengths, batch.labels_B2, batch.row).sum())
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if engine.holds_shards:
            raise LocalTrainingError(
                f"out of memory in a trial with {len(chosen)} features of {longest} tokens, and with "
                f"{ranks.launch_config.strategy} other ranks are in the middle of it; set --max_tokens_per_device, "
                "or use --gradient_checkpointing"
            ) from error
    # Only here: the error holds what the pass had made.
    engine.zero_grad()
    return False
