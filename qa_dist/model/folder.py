"""What the folder of a trained model says of itself, without loading it."""

import os
from collections.abc import Iterable
from typing import Any

from qa_dist.config.parsing import read_recipe
from qa_dist.model.pretrained import ADAPTER_CONFIG, MODEL_CONFIG, check_adapter


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
    return {"model_name_or_path": base} if base else {}
