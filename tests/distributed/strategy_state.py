"""What test_strategies does on every rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from qa_dist.config.parsing import parse
from qa_dist.distributed.failures import failures_named
from qa_dist.distributed.launch_config import read_launch_config
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.collate import FeatureBatch
from qa_dist.model.building import build_model
from qa_dist.model.span_model import Weights, span_loss
from qa_dist.training.inputs import load_data
from qa_dist.training.run_state import RunState
from qa_dist.training.trainer import Trainer


def same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def in_autocast(model: nn.Module) -> Iterator[list[bool]]:
    """Context of autocast, as of `--mixed_precision bf16` on a GPU; gives whether passes of the model ran in it.

    DeepSpeed asks whether there is one on CUDA, and would switch off that of the device at hand.
    """
    seen: list[bool] = []
    asked = torch.is_autocast_enabled
    handle = model.register_forward_pre_hook(lambda *_: seen.append(asked("cpu")))
    torch.is_autocast_enabled = lambda device="cuda": device == "cuda" or asked(device)  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield seen
    finally:
        torch.is_autocast_enabled = asked
        handle.remove()


def check(words: list[str], result: str, rank: int) -> int:
    """Take and put back weights and the optimiser's state between steps, and look whether they are what they should be.

    Rank 0 writes the losses of the steps, the final weights and the optimiser's state in the middle to `result`.
    """
    with failures_named():
        _check(words, result)
    return 0


def run_out_of_memory(words: list[str], rank: int) -> int:
    """Train, on rank 1 without memory."""
    from qa_dist.model import rdrop
    from qa_dist.train import main

    def fail(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    if rank == 1:
        rdrop.span_loss = fail
    return main(words)


def _check(words: list[str], result: str) -> None:
    config, _ = parse(words, prog="strategy_state", description="")
    training = config.training
    ranks = Ranks(mixed_precision=training.mixed_precision, launch_config=read_launch_config(os.environ, config))
    data = load_data(config, ranks)

    def start_trainer() -> Trainer:
        model, _ = build_model(
            config.model,
            seed=training.seed,
            max_seq_length=config.data.max_seq_length,
            gradient_checkpointing=training.gradient_checkpointing,
        )
        return Trainer(config, ranks, data.train, model)

    trainer = start_trainer()
    model = trainer.model
    batch = FeatureBatch.of(data.train, np.arange(3), ranks.device)

    def logits() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return torch.stack(model(batch.input_ids_T, batch.token_type_ids_T, batch.lengths))

    start, before = trainer.engine.weights(), logits()
    assert list(start) == [name for name, _ in model.trainable()]
    assert all(tensor.numel() for tensor in start.values())

    trainer.engine.module.train()
    with in_autocast(model) as seen:
        start_T, end_T = trainer.engine.module(batch.input_ids_T, batch.token_type_ids_T, batch.lengths)
    assert seen == [True], "the engine switches autocast off"
    trainer.engine.dry_backward(span_loss(start_T, end_T, batch.lengths, batch.labels_B2).sum())
    assert same(trainer.engine.weights(), start), "a dry backward pass moved the weights"

    losses = [trainer.step(step).loss for step in range(2)]
    state = RunState(
        world_size=ranks.world_size,
        max_tokens_per_device=trainer.max_tokens,
        gradient_scaler=trainer.engine.scaler_state(),
    )
    middle = trainer.checkpoint(2, None, state)
    assert all(torch.equal(middle.weights[name], start[name]) == (tuple(start[name].shape) == (2,)) for name in start)
    assert not torch.equal(logits(), before)

    trainer.engine.restore(start)
    assert same(trainer.engine.weights(), start)
    assert torch.equal(logits(), before), "the model does not compute with what was put back"
    trainer.engine.restore(middle.weights)
    losses += [trainer.step(step).loss for step in range(2, 4)]
    final = trainer.engine.weights()

    again = start_trainer()
    again.restore(middle)
    assert same(again.checkpoint(2, None, state).optimizer, middle.optimizer)
    assert [again.step(step).loss for step in range(2, 4)] == losses[2:]
    assert same(trainer.engine.weights(), final), "a new trainer does not go on from a checkpoint bit for bit"
    if ranks.is_main:
        torch.save((losses, final, middle.optimizer), result)
    ranks.close()
