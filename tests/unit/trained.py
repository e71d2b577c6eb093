"""A model, data, and the adapter of a short run on them, for tests that spoil one of these."""

import json
import shutil
from pathlib import Path
from typing import Any

from qa_dist import train
from tests.tiny import tiny_model, tiny_squad


def trained_folder(folder: Path, **options: str) -> Path:
    """`folder` with model/, train.json, adapter/ and stores/ in it; `options` are the run's, on top of its own."""
    tiny_model("bert", folder / "model")
    tiny_squad(folder / "train.json", 12, seed=1, longest=30)
    reset_accelerate()
    own = {**options_of(folder), "output_dir": str(folder / "adapter"), "num_train_epochs": "1"}
    assert train.main(words({**own, **options})) == 0
    return folder


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


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; ... removes one."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}), encoding="utf-8")
