"""What the folder of a trained model says of itself, without loading it."""

import os
from collections.abc import Iterable
from typing import Any

from qa_dist.config.options import ModelConfig
from qa_dist.config.parsing import read_recipe
from qa_dist.model.pretrained import ADAPTER_CONFIG, MODEL_CONFIG, check_adapter, load_tokenizer


def adapter_problems(adapter: str | None) -> Iterable[str]:
    """What is wrong with the folder that `--adapter` names."""
    if adapter is None:
        return
    if not os.path.isdir(adapter):
        yield f"--adapter {adapter} is not a folder; give the --output_dir of a training run"
    elif not any(os.path.isfile(os.path.join(adapter, name)) for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        yield f"--adapter {adapter} holds no adapter and no model; give the --output_dir of a finished training run"


def base_options(adapter: str | None) -> dict[str, Any]:
    """Options of the run that wrote the folder; of a foreign adapter its base model, of a plain model itself."""
    if adapter is None:
        return {}
    config, foreign, plain = (os.path.join(adapter, name) for name in ("config.yaml", ADAPTER_CONFIG, MODEL_CONFIG))
    if os.path.isfile(config):
        return read_recipe(config)
    if not os.path.isfile(foreign):
        return {"model_name_or_path": adapter, "tuning": "full"} if os.path.isfile(plain) else {}
    base = check_adapter(adapter).get("base_model_name_or_path")
    options: dict[str, Any] = {"model_name_or_path": base} if base else {}
    if _has_tokenizer(adapter):
        options["tokenizer_name"] = adapter
    return options


def load_tokenizer_of(adapter: str, model: ModelConfig) -> tuple[Any, list[str]]:
    """The tokenizer that the model in a folder is evaluated with, and what the user should know about it.

    An adapter made elsewhere for peft's question-answering model was trained without token types, which that model
    (peft 0.21) does not pass on: its tokenizer makes none.

    Raises:
        UserError: The tokenizer or the adapter cannot be used.
    """
    tokenizer = load_tokenizer(model)
    if not _is_made_elsewhere(adapter):
        return tokenizer, []
    source = "its folder" if model.tokenizer_name == adapter else model.tokenizer_name or "its base model"
    notes = [f"{adapter} was made elsewhere (it has no config.yaml): its tokenizer is that of {source}"]
    names = list(tokenizer.model_input_names)
    if check_adapter(adapter).get("task_type") == "QUESTION_ANS" and "token_type_ids" in names:
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
        notes[0] += ", and it reads no token types, as peft's question-answering model passes none on"
    return tokenizer, notes


def _has_tokenizer(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer_config.json"))


def _is_made_elsewhere(folder: str) -> bool:
    """Whether it holds an adapter that another program trained."""
    if os.path.isfile(os.path.join(folder, "config.yaml")) or not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return False
    # Heads are left out by this pattern in every adapter that is trained here, also where it was copied alone.
    excluded = check_adapter(folder).get("exclude_modules")
    return not (isinstance(excluded, str) and excluded.startswith("(") and r")(\..*)?" in excluded)
