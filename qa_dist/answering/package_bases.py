"""Adapters whose base is `package:NAME/FOLDER`, opened by `transformers.pipeline`.

Transformers takes the base's name out of the adapter's configuration and looks for it on the hub, before it asks the
class that loads the model. So the function with which it finds that configuration is replaced by one that, for these
adapters, gives a copy of it in which the base is the folder of the package.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers.pipelines

from qa_dist.common.reading import read_json_object
from qa_dist.model.pretrained import ADAPTER_CONFIG, resolve_model_path

_FINDER = "find_adapter_config_file"
"""What that function is called in the module of the pipelines."""

_BASE = "base_model_name_or_path"


def let_bases_be_packages() -> None:
    """Let `transformers.pipeline` open such adapters in this process, where it has such a function."""
    find = getattr(transformers.pipelines, _FINDER, None)
    if find is not None and not hasattr(find, "__wrapped__"):
        setattr(transformers.pipelines, _FINDER, _with_packages(find))


def _with_packages(find: Callable[..., str | None]) -> Callable[..., str | None]:
    @functools.wraps(find)
    def found(*args: Any, **options: Any) -> str | None:
        path = find(*args, **options)
        if path is None:
            return None
        description = read_json_object(Path(path))
        base = description.get(_BASE)
        if not isinstance(base, str) or not base.startswith("package:"):
            return path
        return _kept({**description, _BASE: resolve_model_path(base)})

    return found


def _kept(description: Mapping[str, Any]) -> str:
    """A file that holds this, until the process ends."""
    folder = tempfile.mkdtemp(prefix="qa_dist-adapter-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / ADAPTER_CONFIG
    path.write_text(json.dumps(description), encoding="utf-8")
    return str(path)
