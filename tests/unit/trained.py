"""A model, data, and the adapter of a short run on them, for tests that spoil one of these."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_dist import train
from qa_dist.config.options import ModelConfig
from tests.tiny import tiny_model, tiny_squad, tiny_tokenizer

if TYPE_CHECKING:
    from qa_dist.model.calibration import Calibration


def trained_folder(folder: Path, **options: str) -> Path:
    """`folder` with model/, train.json, adapter/ and stores/ in it; `options` are the run's, on top of its own."""
    tiny_model("bert", folder / "model")
    tiny_squad(folder / "train.json", 12, seed=1, longest=30)
    reset_accelerate()
    own = {**options_of(folder), "output_dir": str(folder / "adapter"), "num_train_epochs": "1"}
    assert train.main(words({**own, **options})) == 0
    return folder


def random_adapter(folder: Path, model_type: str, *, num_layers: int = 2, **options: Any) -> ModelConfig:
    """An adapter in folder/adapter, on folder/base, whose every tensor moved far from where it began."""
    import torch

    from qa_dist.model.building import build_model
    from qa_dist.model.saved import save_trained

    base = tiny_model(model_type, folder / "base", num_layers=num_layers)
    config = ModelConfig(model_name_or_path=str(base), model_dropout=0.2, **options)
    model, _ = build_model(config, seed=1, max_seq_length=64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    (folder / "adapter").mkdir()
    weights = {name: parameter.detach() for name, parameter in model.trainable()}
    save_trained(model, weights, tiny_tokenizer(), folder / "adapter")
    return config


def copy_of(trained: Path, folder: Path) -> Path:
    """`folder` with copies of the model and the adapter; data and stores stay where they are."""
    shutil.copytree(trained / "model", folder / "model")
    shutil.copytree(trained / "adapter", folder / "adapter")
    reset_accelerate()
    return folder


def options_of(folder: Path) -> dict[str, str]:
    """Options of a run on what is in the folder, but for --output_dir."""
    return {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.json"),
        "validation_file": str(folder / "train.json"),
        "store_dir": str(folder / "stores"),
        "max_seq_length": "64",
        "doc_stride": "16",
        "global_batch_size": "8",
        "disable_tqdm": "true",
    }


def words(options: dict[str, str]) -> list[str]:
    """Options as the words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def reset_accelerate() -> None:
    """Let the next run in this process start afresh."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def some_calibration(temperature: float = 2.0, threshold: float | None = None) -> "Calibration":
    """What might have been tuned for a model."""
    from qa_dist.model.calibration import Calibration

    data = {"data": "dev.json", "part": "half", "num_questions": 300}
    error = {"ece": 5.0}
    scores = {"threshold": 0.0, "f1": 50.0}
    found = None if threshold is None else {"before": scores, "after": scores}
    report = {"calibration": {"before": error, "after": error}, "null_threshold": found}
    return Calibration(temperature, threshold, "squad", data, data, report)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; ... removes one."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}), encoding="utf-8")


def export_words(folder: Path, *more: str, model: str = "adapter", output: str = "exported") -> list[str]:
    """A command that exports folder/adapter into folder/exported, compared on folder/dev.json."""
    data = ["--validation_file", str(folder / "dev.json"), "--max_seq_length", "64", "--doc_stride", "16"]
    return [str(folder / model), "--output_dir", str(folder / output), *data, *more]
