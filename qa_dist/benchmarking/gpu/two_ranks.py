"""A rank of two that share one GPU: `torchrun ... -m qa_dist.benchmarking.gpu.two_ranks SPEC.json`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from qa_dist.benchmarking.measuring import synthetic_features
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.sharing import join_over_gloo
from qa_dist.model.span_model import transformers_model
from qa_dist.training.start import build_trainable
from qa_dist.training.trainer import Trainer

NUM_STEPS = 3


def step_and_save(config: RunConfig, ranks: Ranks, path: Path) -> None:
    """Take some steps; rank 0 writes the weights and the losses."""
    model, _ = build_trainable(config, ranks, None)
    num_features = NUM_STEPS * config.training.global_batch_size
    store = synthetic_features(config, num_features, int(transformers_model(model.model).config.vocab_size))
    trainer = Trainer(config, ranks, store, model)
    losses = [trainer.step(step).loss for step in range(NUM_STEPS)]
    weights = trainer.engine.weights()
    if ranks.is_main:
        save_file({**weights, "losses": torch.tensor(losses, dtype=torch.float64)}, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Be a rank of the run that a file describes."""
    (path,) = sys.argv[1:] if argv is None else argv
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    config, _ = parse([], prog="two_ranks", description="", groups=(), base=spec["options"])
    join_over_gloo()
    ranks = Ranks(mixed_precision=config.training.mixed_precision)
    step_and_save(config, ranks, Path(spec["result"]))
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
