"""What the folder of a trained model says of itself, without loading it."""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qa_dist.common.errors import CheckpointError, UserError
from qa_dist.config.given import peek
from qa_dist.config.options import ModelConfig, RunConfig
from qa_dist.config.recipe_files import read_run_options
from qa_dist.model.calibration import read_calibration
from qa_dist.model.pretrained import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    check_adapter,
    is_download,
    load_tokenizer,
    resolve_model_path,
)

_PLACES = ("cache_dir", "store_dir")
"""Options that say where files are written."""

_HOW_MUCH = (
    *("max_train_samples", "max_eval_samples", "max_train_features", "max_eval_features", "subset_seed", "on_invalid"),
)
"""Options on which of the records are used."""


def adapter_problems(adapter: str | None) -> Iterable[str]:
    """What is wrong with the folder that `--adapter` names."""
    if adapter is None:
        return
    if not os.path.isdir(adapter):
        yield f"--adapter {adapter} is not a folder; give the --output_dir of a training run"
    elif not any(os.path.isfile(os.path.join(adapter, name)) for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        yield f"--adapter {adapter} holds no adapter and no model; give the --output_dir of a finished training run"


TRAINING_DATA = ("train_file", "max_train_samples", "max_train_features")
"""Options on the questions that a model is trained on."""

LENGTHS = ("max_seq_length", "doc_stride", "max_question_length")
"""Options of the data that also say what a model can be given."""


def base_options(adapter: str | None, *, tuned: bool = True) -> dict[str, Any]:
    """Options of the run that wrote the folder; of a foreign adapter its base model, of a plain model itself.

    A threshold that was tuned for the model (`calibration`) stands in the place of the run's, unless `tuned` is false.

    Raises:
        UserError: A file in the folder cannot be used.
    """
    if adapter is None:
        return {}
    found, calibration = _options(adapter), read_calibration(adapter) if tuned else None
    if found and calibration is not None and calibration.null_score_diff_threshold is not None:
        found["null_score_diff_threshold"] = calibration.null_score_diff_threshold
    return found


def for_data_of(found: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """The options of a run, without those on how much of its data it used where a command line names other data."""
    named = {name: value for name in ("validation_file", "dataset_name") if (value := peek(argv, name)) is not None}
    if all(str(found.get(name)) == value for name, value in named.items()):
        return dict(found)
    return {name: value for name, value in found.items() if name not in _HOW_MUCH}


def as_tuned(config: RunConfig, folder: str) -> RunConfig:
    """The configuration with the threshold of the model in a folder, where `auto` asks for it.

    Raises:
        UserError: As for `base_options`.
    """
    if config.evaluation.null_score_diff_threshold is not None:
        return config
    threshold = base_options(folder).get("null_score_diff_threshold") if os.path.isdir(folder) else None
    evaluation = dataclasses.replace(config.evaluation, null_score_diff_threshold=threshold)
    return dataclasses.replace(config, evaluation=evaluation)


def _options(adapter: str) -> dict[str, Any]:
    config, foreign, plain = (os.path.join(adapter, name) for name in ("config.yaml", ADAPTER_CONFIG, MODEL_CONFIG))
    if os.path.isfile(config):
        of_run = read_run_options(config)
        found = {name: value for name, value in of_run.items() if name not in _PLACES or not is_download(adapter)}
        # A whole model needs no other folder, which may be gone.
        return {**found, "model_name_or_path": adapter} if found.get("tuning") == "full" else found
    if not os.path.isfile(foreign):
        return {"model_name_or_path": adapter, "tuning": "full"} if os.path.isfile(plain) else {}
    base = check_adapter(adapter).get("base_model_name_or_path")
    if not base:
        # The default of the option would be any model, whose weights the adapter may fit without a complaint.
        raise CheckpointError(
            f"{foreign} names no base model; write its folder or hub id there, as base_model_name_or_path"
        )
    options: dict[str, Any] = {"model_name_or_path": base}
    if has_tokenizer(adapter):
        options["tokenizer_name"] = adapter
    return options


def was_evaluated_without_answers(folder: str) -> bool:
    """Whether some questions of the evaluation that a run ended with have no answer, so that this file was written.

    In a folder that is no run's, such as a merged model's, the file is of an evaluation since, on any data.
    """
    return is_of_run(folder) and os.path.isfile(os.path.join(folder, "null_odds.json"))


def is_of_run(folder: str) -> bool:
    """Whether a run has ended in the folder, so that the results there are its own."""
    return os.path.isfile(os.path.join(folder, "run.json"))


def model_sha256(name: str) -> str:
    """Hex digest of what a model consists of: of the files in its folder, and of those of an adapter's base model.

    Of a model that is on the hub it is that of the name.
    """
    folder = resolve_model_path(name)
    base = base_options(folder).get("model_name_or_path") if os.path.isdir(folder) else None
    digest = hashlib.sha256()
    for part in dict.fromkeys([folder, *([resolve_model_path(base)] if base else [])]):
        files = _model_files(part) if os.path.isdir(part) else []
        digest.update(b"" if files else part.encode())
        for path in files:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{os.path.relpath(path, part)} {content}\n".encode())
    return digest.hexdigest()


def _model_files(folder: str) -> list[str]:
    """Weights, configurations and tokenizer: not the results of the run that lie beside them."""
    names = (ADAPTER_CONFIG, MODEL_CONFIG, "config.yaml", "reader.json", "tokenizer*", "vocab*", "merges.txt")
    patterns = (*names, "spiece.model", "*.bin", "*.safetensors", os.path.join("onnx", "*"))
    found = {path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))}
    return sorted(path for path in found if os.path.isfile(path))


def options_of_run(model: str) -> dict[str, Any]:
    """Options of the run that made a model.

    Raises:
        UserError: There is nothing under that name, or it is no model.
    """
    if not os.path.isdir(model):
        resolve_model_path(model)
        return {"model_name_or_path": model, "tuning": "full"}
    found = base_options(model)
    if not found:
        raise UserError(f"{model} holds no adapter and no model; name the --output_dir of a training run, or a model")
    return found


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
        # What is saved, beside a model that the adapter was folded into, is this.
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
        notes[0] += ", and it reads no token types, as peft's question-answering model passes none on"
    return tokenizer, notes


def has_tokenizer(folder: str) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer_config.json"))


def _is_made_elsewhere(folder: str) -> bool:
    """Whether it holds an adapter that another program trained."""
    if os.path.isfile(os.path.join(folder, "config.yaml")) or not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return False
    # Heads are left out by this pattern in every adapter that is trained here, also where it was copied alone.
    excluded = check_adapter(folder).get("exclude_modules")
    return not (isinstance(excluded, str) and excluded.startswith("(") and r")(\..*)?" in excluded)
