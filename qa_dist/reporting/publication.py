"""What of a model's folder is published: weights, configuration, tokenizer, card, and the record of the run.

Small files are published without what is this machine's: paths are reduced to names, what looks like a secret is
masked, and the command line is left out. Checkpoints, logs, predictions and stores are never published.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.common.reading import decoded, read_bytes, read_json_file, read_json_object
from qa_dist.common.secrets import masked
from qa_dist.config.options import RunConfig
from qa_dist.model.calibration import FILE as CALIBRATION
from qa_dist.model.calibration import read_calibration
from qa_dist.model.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    require_safetensors,
)
from qa_dist.reporting.card import FILE as CARD
from qa_dist.reporting.card import is_card
from qa_dist.reporting.run_record import RunRecord, source

_TOKENIZER = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
_CLEANED = (ADAPTER_CONFIG, MODEL_CONFIG, "tokenizer_config.json", "run.json", CALIBRATION)
"""JSON files that may hold paths."""

_PATHS = ("/", "~/", "./", "../")
_OF_THIS_MACHINE = (
    *("output_dir", "overwrite_output_dir", "store_dir", "cache_dir", "init_adapter", "preprocessing_num_workers"),
    *("max_tokens_per_device", "eval_tokens_per_device", "report_to", "disable_tqdm", "resume_from_checkpoint"),
)
"""Options that say nothing of the model."""


class File(NamedTuple):
    """A file to publish.

    Attributes:
        name: its name in the repository.
        content: its bytes, or the path of what is published as it is.
    """

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def publication(run: RunRecord, repo_id: str, base_model: str | None) -> list[File]:
    """The files to publish, by name.

    Args:
        run: The model's folder.
        repo_id: Where they go.
        base_model: Hub id of an adapter's base model; None: as the run names it.

    Raises:
        UserError: Something is missing that others need, a file cannot be used, or the card is of another model or
            holds a secret.
    """
    # What readers would refuse is not sent.
    read_calibration(run.folder)
    base = base_model or (run.base.hub_id if run.base else None)
    if run.is_adapter and base is None:
        named = f"is {run.base.name}, which is on no hub" if run.base else "is not known"
        raise ConfigError(
            [f"the base model of {run.folder} {named}; name its hub id with --base_model, or publish a merged model"]
        )
    found = [_card(run, repo_id, base if run.is_adapter else None), *_weights(run)]
    tokenizer = [File(name, run.folder / name) for name in _TOKENIZER if (run.folder / name).is_file()]
    if not tokenizer:
        raise CheckpointError(f"{run.folder} holds no tokenizer; copy its files there")
    found += tokenizer
    changes: dict[str, Any] = {"base_model_name_or_path": base} if run.is_adapter else {}
    for name in _CLEANED:
        if (run.folder / name).is_file():
            value = read_json_object(run.folder / name)
            found.append(File(name, _json({**_public(value), **(changes if name == ADAPTER_CONFIG else {})})))
    found += _options(run, base)
    return sorted(found)


def _card(run: RunRecord, repo_id: str, base: str | None) -> File:
    """The card, if it is fit to be seen and names what is published."""
    path = run.folder / CARD
    command = f"qa-dist card {run.folder} --repo_id {repo_id}" + (f" --base_model {base}" if base else "")
    if not path.is_file():
        raise ConfigError([f"{run.folder} holds no {CARD}; write it first: {command}"])
    text = decoded(read_bytes(path), path)
    if masked(text) != text:
        raise ConfigError([f"{path} holds what looks like an access token or password; take it out"])
    lacks = [name for name in (repo_id, base) if name and f'"{name}"' not in text] if is_card(text) else []
    if lacks:
        raise ConfigError([f"{path} does not name {lacks[0]}; write it anew: {command}"])
    return File(CARD, text.encode())


def _weights(run: RunRecord) -> Iterator[File]:
    """The safetensors, and where there are several the index of them.

    Raises:
        CheckpointError: One that the index names is missing, or one is not whole.
    """
    single = ADAPTER_WEIGHTS if run.is_adapter else MODEL_WEIGHTS
    if (run.folder / single).is_file():
        require_safetensors(run.folder / single)
        yield File(single, run.folder / single)
        return
    index = read_json_file(run.folder / MODEL_INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    names = sorted({str(name) for name in files.values()}) if isinstance(files, dict) else []
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors") or not (run.folder / name).is_file():
            raise CheckpointError(f"{run.folder / MODEL_INDEX} names {name}, which is no safetensors file beside it")
        require_safetensors(run.folder / name)
        yield File(name, run.folder / name)
    if not names:
        raise CheckpointError(f"{run.folder / MODEL_INDEX} names no files; save the model again")
    yield File(MODEL_INDEX, run.folder / MODEL_INDEX)


def _options(run: RunRecord, base: str | None) -> Iterator[File]:
    """The options of the run, by which readers cut windows and decode; none if they name a tokenizer of this machine.

    A reader takes the tokenizer in the folder where there are no options.
    """
    tokenizer = run.config.get("tokenizer_name")
    if not run.config or (tokenizer is not None and source(str(tokenizer)).hub_id is None):
        return
    import yaml

    known = RunConfig().flat()
    kept = {name: value for name, value in run.config.items() if name in known and name not in _OF_THIS_MACHINE}
    for name in ("train_file", "validation_file"):
        if isinstance(kept.get(name), str):
            kept[name] = os.path.basename(os.path.normpath(kept[name]))
    named = kept.get("dataset_name")
    if isinstance(named, str) and named != "sample":
        kept["dataset_name"] = source(named).name
    if base is not None:
        kept["model_name_or_path"] = base
    elif run.base is not None:
        kept["model_name_or_path"] = run.base.name
    if kept.get("version_2_with_negative") is None and run.may_lack_answers:
        # What says so stays here.
        kept["version_2_with_negative"] = True
    yield File("config.yaml", yaml.safe_dump(_public(kept), sort_keys=False, allow_unicode=True).encode())


def _public(value: Any) -> Any:
    """A JSON value without paths, secrets and the command line."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items() if key not in ("command", "_name_or_path")}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    is_path = value.startswith(_PATHS) and (value.count("/") > 1 or os.path.lexists(path))
    return masked(os.path.basename(os.path.normpath(path)) if is_path else value)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
