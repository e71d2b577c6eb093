"""What a training step asks of a CUDA device, counted on fake tensors: the table in docs/benchmarks.md.

    python -m tests.support.count_steps --output docs/benchmarks/counted.json

writes what this version asks for, as "after", and Trainer's step beside it; what the file holds as "before" stays. That
was counted with `--as before`, in a checkout of the commit named there, with the files of this folder copied into it
and the function `_fill` of its qa_dist/memory/tracing.py renamed to `fake_weights`.

The model is of BERT base's size, a batch has 32 features of SQuAD's lengths in one micro-batch, products are in
bfloat16.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from qa_dist.benchmarking.synthetic import SyntheticStore
from qa_dist.common.files import write_json
from qa_dist.config.options import ModelConfig, RunConfig, TrainingConfig
from qa_dist.machine.environment import git_commit
from qa_dist.memory.tracing import fake_weights
from tests.support.fake_cuda import CUDA, Counts, count, fake_cuda, run

BATCH = 32
MAX_LENGTH = 384
SEED = 0
FORMAT = 1
MODULE = "tests.support.count_steps"

LORA: dict[str, Any] = {"lora_target_modules": ("query", "value"), "lora_r": 8}
NO_DROPOUT: dict[str, Any] = {"model_dropout": 0.0, "lora_dropout": 0.0}

SCENARIOS: dict[str, dict[str, Any]] = {
    "LoRA on q and v": LORA,
    "LoRA on q and v, no dropout": LORA | NO_DROPOUT,
    "LoRA on all linear layers": {"lora_target_modules": ("all-linear",), "lora_r": 16},
    "full": {"tuning": "full"},
}
"""Ways of training that are counted, with the options of each."""

TRAINER = ("LoRA on q and v", "LoRA on q and v, no dropout", "full")
"""Those that are counted of `Trainer` too."""


def configured(scenario: str) -> RunConfig:
    """The run of a scenario."""
    return RunConfig(
        model=ModelConfig(model_config="bert-base", **SCENARIOS[scenario]),
        training=TrainingConfig(
            mixed_precision="bf16",
            global_batch_size=BATCH,
            max_tokens_per_device=BATCH * MAX_LENGTH,
            # What a graph replays, this counts.
            cuda_graphs="no",
        ),
    )


def features(num_batches: int, vocab_size: int) -> SyntheticStore:
    """Batches of features of SQuAD's lengths."""
    return SyntheticStore(num_batches * BATCH, seed=SEED, vocab_size=vocab_size, max_seq_length=MAX_LENGTH)


def count_step(scenario: str) -> dict[str, Any]:
    """Counts of the third step of qa_dist's own loop, from the choice of its features to its update."""
    from qa_dist.distributed.ranks import Ranks
    from qa_dist.model import lora_check
    from qa_dist.model.building import build_meta_model
    from qa_dist.training import trainer

    config = configured(scenario)
    model = build_meta_model(config.model, max_seq_length=MAX_LENGTH, device=CUDA)
    ranks = Ranks(mixed_precision="bf16")
    ranks.device = CUDA
    ranks.place = lambda placed: placed  # type: ignore[method-assign]
    empty = torch.empty
    with (
        fake_cuda(),
        # No page of memory is pinned, and weights without numbers have no fingerprint.
        mock.patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k)),
        mock.patch.object(trainer, "run_identity", return_value={}),
        # Nor can they be compared.
        mock.patch.object(lora_check, "difference_from_peft", return_value=0.0),
    ):
        fake_weights(model, CUDA)
        made = trainer.Trainer(config, ranks, features(8, 1000), model)
        # What is looked at in the first two steps alone is not there to be seen.
        made.gradients._pending = made.gradients._without = []
        # The one before made the moments.
        count(partial(made.step, 1))
        return _short(count(partial(made.step, 2)))


def count_trainer_step(scenario: str) -> dict[str, Any]:
    """Counts of what transformers' `Trainer` does in a step, on the model that transformers and peft make.

    That is: the batch, padded to its longest feature, moved from pinned memory; forward pass and loss in autocast, and
    backward pass; the look for losses that are not finite (`logging_nan_inf_filter`, as it comes), gradients clipped,
    fused AdamW.
    """
    from qa_dist.benchmarking.hugging_face import load_model

    config = configured(scenario)
    with torch.device("meta"):
        model = load_model(config).train()
    store = features(1, 1000)
    longest = int(store.lengths.max())
    with (
        fake_cuda(),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", one_kernel),
    ):
        fake_weights(model, CUDA)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        names = ("input_ids", "token_type_ids", "attention_mask")
        host = {name: torch.ones(BATCH, longest, dtype=torch.long) for name in names}
        host |= {name: torch.ones(BATCH, dtype=torch.long) for name in ("start_positions", "end_positions")}
        summed = torch.zeros((), device=CUDA)

        def step() -> None:
            inputs = {name: tensor.to(CUDA, non_blocking=True) for name, tensor in host.items()}
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            found = loss.detach()
            if not (torch.isnan(found) or torch.isinf(found)):
                summed.add_(found)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        # The first one makes the moments.
        count(step)
        return _short(count(step))


def one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """torch's attention as its memory-efficient kernel, which is what takes a mask on CUDA."""
    half = [tensor.to(torch.bfloat16) for tensor in (query, key, value)]
    if attn_mask is not None:
        assert attn_mask.dtype == torch.bool
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.bfloat16).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    made: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        *half, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return made


def _short(counts: Counts) -> dict[str, Any]:
    return {key: getattr(counts, key) for key in ("launches", "syncs", "elementwise_bytes", "by_name")}


def steps() -> dict[str, Any]:
    """Counts of every scenario; runs where `run` has put a fake device."""
    return {name: count_step(name) for name in SCENARIOS}


def first_step() -> dict[str, Any]:
    """Counts of the first scenario."""
    return count_step(next(iter(SCENARIOS)))


def trainer_steps() -> dict[str, Any]:
    """Counts of those of `Trainer`."""
    return {name: count_trainer_step(name) for name in TRAINER}


def main() -> None:
    """Count, and write what was found into the file that the words name."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.count_steps", allow_abbrev=False)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="docs/benchmarks/counted.json")
    parser.add_argument("--as", dest="name", choices=("before", "after"), default="after", help="which column this is")
    options = parser.parse_args()
    found = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    found |= {"format": FORMAT, "counted": True, "batch": BATCH, "tokens": int(features(3, 1000).lengths.sum()) // 3}
    found[options.name] = {"commit": git_commit(), "torch": torch.__version__, "steps": run(f"{MODULE}:steps")}
    if options.name == "after":
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        found["trainer"] = {**versions, "steps": run(f"{MODULE}:trainer_steps")}
    write_json(options.output, found)


if __name__ == "__main__":
    main()
