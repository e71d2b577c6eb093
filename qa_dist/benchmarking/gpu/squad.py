"""Evaluation twice over, and real SQuAD through the real training loop."""

import json
import shutil
from pathlib import Path
from typing import Any

from qa_dist.benchmarking.gpu.items import Failed, Figures, Skipped
from qa_dist.benchmarking.gpu.scene import Scene, alone, new_model
from qa_dist.common.errors import ConfigError
from qa_dist.evaluation.loop import evaluate
from qa_dist.features.building import prepare_store
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.training.loop import train

FILES = ("train-v1.1.json.gz", "dev-v1.1.json.gz")

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {
        "tuning": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["all-linear"],
        "learning_rate": 2e-3,
    },
    "full": {"tuning": "full", "learning_rate": 4e-4},
}
"""What is trained of the encoder; both in bf16, batch of 128, two epochs, linear decay behind a tenth of warm-up."""


def evaluation(scene: Scene) -> Figures:
    """The same questions evaluated twice: the same answers, scores and loss to the last bit."""
    config = scene.config(
        dataset_name=f"synthetic:{scene.choose(400, 12)}",
        tokenizer_name=str(scene.small_model()),
        mixed_precision="bf16",
        preprocessing_num_workers=1,
    )
    tokenizer = load_tokenizer(config.model)
    store = prepare_store(config, "validation", tokenizer=tokenizer)
    with alone(config) as ranks:
        model = new_model(config, ranks).to(scene.device)
        first, second = (evaluate(model, store, ranks, config.evaluation, version_2=False) for _ in range(2))
    figures: Figures = {"questions": store.num_examples, "features": store.num_features, "loss": first.loss}
    if first.answers is None or second.answers is None:
        raise Failed("an evaluation gave no answers", figures)
    if first.metrics != second.metrics or first.loss != second.loss:
        raise Failed("the second evaluation gives another loss or other scores", figures)
    texts = [json.dumps(each.answers.predictions()) for each in (first, second) if each.answers]
    if texts[0] != texts[1]:
        raise Failed("the second evaluation gives other answers", figures)
    return figures


def find_files(squad: Path | None, model: Path | None) -> None:
    """Make sure of what `--squad` and `--model` name, before anything else is done.

    Raises:
        ConfigError: A file is missing, or one of the two was given without the other.
    """
    if (squad is None) != (model is None):
        raise ConfigError(["--squad and --model belong together: data, and the encoder to train; give both or none"])
    if squad is None or model is None:
        return
    missing = [str(squad / name) for name in FILES if not (squad / name).is_file()]
    missing += [str(model / name) for name in ("config.json", "model.safetensors") if not (model / name).is_file()]
    if missing:
        raise ConfigError([f"{', '.join(missing)} is not there; give folders with these files"])


def squad(scene: Scene, recipe: str, seed: int) -> Figures:
    """Two epochs of SQuAD v1.1 through `qa_dist.training.loop.train`, and its scores."""
    if scene.is_rehearsal:
        source: dict[str, Any] = {"dataset_name": "synthetic:12", "preprocessing_num_workers": 1}
        source["model_name_or_path"] = str(scene.small_weights())
    elif scene.squad is None or scene.model is None:
        raise Skipped("no --squad and --model were given")
    else:
        source = {name: str(scene.squad / file) for name, file in zip(("train_file", "validation_file"), FILES)}  # noqa: B905
        source["model_name_or_path"] = str(scene.model)
    output = scene.folder / f"squad-{recipe}-{seed}"
    config = scene.config(
        **source,
        **RECIPES[recipe],
        output_dir=str(output),
        model_config=None,
        seed=seed,
        model_dropout=0.1,
        num_train_epochs=2,
        global_batch_size=scene.choose(128, 16),
        mixed_precision="bf16",
        lr_scheduler_type="linear",
        warmup_ratio=0.1,
        eval_steps="no",
        checkpointing_steps="no",
        keep="last",
        cuda_graphs="auto",
    )
    final = train(config)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    if final is None:
        raise Failed("there was no evaluation")
    names = ("exact_match", "f1", "num_examples")
    figures: Figures = {name: final.metrics[name] for name in names}
    figures |= {"loss": final.loss, "steps": record.get("num_steps")}
    figures["phase_seconds"] = record.get("seconds")
    figures["peak_memory_bytes"] = max(record.get("peak_memory_bytes_per_rank") or [0])
    return figures
