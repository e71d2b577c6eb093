"""What was trained or exported here and is on the hub, by its id: an adapter, a whole model, an exported one.

`huggingface_hub` keeps what it downloads in its cache, and takes it from there where there is no network or
HF_HUB_OFFLINE is set. Only files that are data are asked for, each by its name. Neither torch nor transformers is
imported.
"""

import os

from qa_dist.common.libraries import logs_held_back
from qa_dist.model import calibration
from qa_dist.model.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    SHARDS,
    download,
    resolve_model_path,
)

_EXPORTED = "reader.json"
_MARKS = (ADAPTER_CONFIG, calibration.FILE, "run.json", _EXPORTED)
"""Files of which one is in whatever is published of a run, an export, or an adapter made elsewhere."""

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
_OF_RUN = (*_MARKS, "config.yaml", *_TOKENIZER)
_ADAPTER = (*_OF_RUN, ADAPTER_WEIGHTS)
_WHOLE = (*_OF_RUN, MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX, SHARDS)
_GRAPHS = (*_MARKS, MODEL_CONFIG, "onnx/model.onnx", "onnx/model.onnx.data", "onnx/model_quantized.onnx")


def is_hub_id(name: str) -> bool:
    """Whether a name with an owner, such as `me/model`, can only be one on the hub: nothing here has it."""
    if name.count("/") != 1 or os.path.lexists(os.path.expanduser(name)):
        return False
    try:
        return resolve_model_path(name) == name
    except ValueError:
        return False


def local_copy(name: str, cache_dir: str | None = None) -> str:
    """The folder of what a name stands for, if it is a folder here, or was trained or exported here and is on the hub.

    The name of any other model stays as it is: transformers finds those by themselves.

    Args:
        name: Folder, package:NAME/FOLDER, or hub id.
        cache_dir: Where downloads are kept; None: where the hub's library keeps them.

    Raises:
        UserError: There is nothing under that name.
    """
    path = resolve_model_path(name)
    if os.path.isdir(path):
        return name if name.startswith("package:") and not _marks(path) else path
    # Of a model that others made no file is asked for: without a network that would be an error where it is not there.
    with logs_held_back("huggingface_hub"):
        marks = _marks(download(name, _MARKS, cache_dir=cache_dir))
        if not marks:
            return name
        wanted = _ADAPTER if ADAPTER_CONFIG in marks else _GRAPHS if _EXPORTED in marks else _WHOLE
        return download(name, wanted, cache_dir=cache_dir)


def _marks(folder: str) -> list[str]:
    return [name for name in _MARKS if os.path.isfile(os.path.join(folder, name))]
