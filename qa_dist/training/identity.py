"""What a run and a checkpoint must share, so that going on from it computes what the checkpoint's run would have.

That is the options that decide what a step computes, the features, and the weights that training starts from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.config.added_options import with_added
from qa_dist.config.options import RunConfig
from qa_dist.config.removed_options import without_removed
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.store import FeatureStore
from qa_dist.model.fingerprint import weights_fingerprint
from qa_dist.model.span_model import SpanModel

_NOT_COMPARED_IF_ABSENT = ("torch_compile", "subset_seed")
"""Options that checkpoints of earlier versions do not name, and which their runs may have had with any value."""


def run_identity(config: RunConfig, store: FeatureStore, model: SpanModel, ranks: Ranks) -> dict[str, Any]:
    """JSON values by name, to be compared by `differences`; all ranks must ask, before the model is sharded.

    Raises:
        ConfigError: On every rank alike: a rank starts from other weights than rank 0.
    """
    identity = {**config.fixed(), "training data": store.fingerprint, "base model": _base_fingerprint(model, ranks)}
    if config.data.max_train_features is not None:
        # The fingerprint of the data knows of subsets of its examples alone.
        identity["subset_seed"] = config.data.subset_seed
    if config.model.init_adapter is not None:
        # Its numbers and not its name: the folder may have moved.
        identity["initial adapter"] = weights_fingerprint(dict(model.trainable()))
    return identity


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps a run with identity `wanted` from going on from a checkpoint with identity `saved`, as clauses."""
    untold = {name: wanted[name] for name in _NOT_COMPARED_IF_ABSENT if name in wanted}
    saved = {**untold, **with_added(without_removed(saved), wanted)}

    def shown(identity: Mapping[str, Any], name: str) -> str:
        return f"{identity[name]!s:.40}" if name in identity else "absent"

    return [
        f"{name} is {shown(wanted, name)} here and {shown(saved, name)} there"
        for name in sorted({*saved, *wanted})
        if name not in saved or name not in wanted or saved[name] != wanted[name]
    ]


def require_resumable(clauses: Sequence[str], fault: str | None) -> None:
    """Refuse to go on from a checkpoint.

    Args:
        clauses: What `differences` found.
        fault: What `checkpoints.misfit` found.

    Raises:
        ConfigError: The checkpoint is of another run.
        CheckpointError: It holds something else than this run's weights and moments.
    """
    if clauses:
        raise ConfigError(
            [
                f"the checkpoint belongs to another run: {'; '.join(clauses)}; make them agree, or start anew "
                "with --resume_from_checkpoint no and another --output_dir"
            ]
        )
    if fault:
        raise CheckpointError(f"the checkpoint cannot be used: {fault}; name another, or remove it")


def _base_fingerprint(model: SpanModel, ranks: Ranks) -> str:
    """Fingerprint of the weights that training starts from: the frozen ones, or all in full fine-tuning.

    Raises:
        ConfigError: On every rank alike: a rank starts from other weights than rank 0.
    """
    named = dict(model.named_parameters())
    # peft keeps the head as it was drawn beside the one that is trained; nothing uses it.
    kept = {name: weight for name, weight in named.items() if ".original_module." not in name}
    base = {name: weight for name, weight in kept.items() if not weight.requires_grad} or kept
    rest = {name: weight for name, weight in named.items() if name not in base}
    fingerprints = ranks.gather((weights_fingerprint(base), weights_fingerprint(rest)))
    different = [rank for rank, pair in enumerate(fingerprints) if pair != fingerprints[0]]
    first, different = ranks.broadcast((fingerprints[0][0] if fingerprints else "", different))
    if different:
        raise ConfigError(
            [
                f"rank {different[0]} starts from other weights than rank 0: its machine has another "
                "--model_name_or_path under the same name, or other versions; make the files the same on all machines"
            ],
            on_all_ranks=True,
        )
    return first
