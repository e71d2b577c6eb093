"""A model that has not been trained yet, saved and read back: what would fail at a run's end fails at its start."""

import shutil
from pathlib import Path
from typing import Any

import torch

from qa_dist.common.errors import CheckpointError, UserError
from qa_dist.common.libraries import reason
from qa_dist.config.options import ModelConfig
from qa_dist.model.loading import library_errors, without_library_messages
from qa_dist.model.pretrained import ADAPTER_WEIGHTS, check_adapter
from qa_dist.model.saved import save_trained, unfilled
from qa_dist.model.span_model import SpanModel, transformers_model

FOLDER = ".rehearsal"
"""The folder inside a run's folder in which a model is saved before its first step; it is gone when that begins."""


def rehearse(model: SpanModel, tokenizer: Any, config: ModelConfig, directory: Path) -> None:
    """Save a model as a run does at its end, into a folder inside `directory`; see whether it would load; remove it.

    What is saved is compared with the tensors in memory. Of what was read back, a model is made without numbers: a base
    model is not loaded once more. With adapters, all of this takes some megabytes and a fraction of a second; with
    `--tuning full`, as much of the disk and as long as the first half of a checkpoint.

    Args:
        model: The model, whole and not yet shared out.
        tokenizer: The tokenizer.
        config: What the model was built from.
        directory: A folder that there is.

    Raises:
        UserError: The model cannot be saved, or what is saved cannot be loaded.
    """
    aside = directory / FOLDER
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with library_errors(lambda error: _fails(model, error)), without_library_messages():
            aside.mkdir()
            save_trained(model, {name: tensor.detach() for name, tensor in model.trainable()}, tokenizer, aside)
            if config.tuning == "lora":
                _require_adapter_loads(model, aside)
            else:
                _require_model_loads(aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fails(model: SpanModel, error: Exception) -> UserError:
    kind = transformers_model(model.model).config.model_type
    return UserError(
        f"the untrained {kind} model cannot be saved and read back ({reason(error)}), so that a run on it would be in "
        "vain; make room if a disk is full, else use another model, or other --lora_target_modules"
    )


def _require_adapter_loads(model: SpanModel, folder: Path) -> None:
    from peft import PeftConfig

    check_adapter(folder)
    PeftConfig.from_pretrained(str(folder))
    _require_none(unfilled(model.model, (), folder / ADAPTER_WEIGHTS))


def _require_model_loads(folder: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        again = AutoModelForQuestionAnswering.from_config(config, trust_remote_code=False)
    expected = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    tied = set(getattr(again, "all_tied_weights_keys", None) or ())
    _require_none(sorted(name for name, shape in expected.items() if found.get(name) != shape and name not in tied))


def _require_none(lost: list[str]) -> None:
    if lost:
        raise CheckpointError(
            f"the untrained model, saved and read back, lacks {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}: "
            "a run on it would be in vain; use another model"
        )
