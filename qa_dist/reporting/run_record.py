"""What the folder of a model says of the model and its run, in words that may leave this machine: no paths.

Folders come from several versions, and from other programs: what a file does not say, or says in another form, is not
known (None).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qa_dist.common.errors import CheckpointError
from qa_dist.common.parsers import is_number
from qa_dist.common.reading import read_json_object
from qa_dist.config.options import DataConfig, EvaluationConfig
from qa_dist.config.recipe_files import read_run_options
from qa_dist.evaluation.ceiling import Ceiling
from qa_dist.evaluation.limits import kept_limits
from qa_dist.features.building import store_root
from qa_dist.model.folder import was_evaluated_without_answers
from qa_dist.model.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_INDEX, MODEL_WEIGHTS
from qa_dist.reporting.hub_ids import HUB_ID

_OWN_NAMES = re.compile(r"sample|synthetic:\d+|package:.*")
"""Names that are neither paths nor hub ids."""

SAMPLE_NAME = "the sample inside qa_dist"


class Source(NamedTuple):
    """A model or data set by a name that says nothing of this machine.

    Attributes:
        name: the hub id, or the last part of a path.
        hub_id: the hub id, if it is one.
    """

    name: str
    hub_id: str | None


def source(value: str) -> Source:
    """What an option that holds a hub id, a path, `sample`, `synthetic:N` or `package:NAME/FOLDER` names."""
    if _OWN_NAMES.fullmatch(value):
        return Source(SAMPLE_NAME if value == "sample" else value, None)
    path = os.path.expanduser(value)
    if os.path.lexists(path) or not HUB_ID.fullmatch(value):
        return Source(os.path.basename(os.path.abspath(path)) or "data", None)
    return Source(value, value)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A model's folder.

    Attributes:
        folder: the folder.
        is_adapter: whether it holds an adapter, and not a whole model.
        adapter: adapter_config.json; empty without an adapter.
        config: the options of its run; empty if it has no config.yaml.
        run: run.json; empty if there is none.
        scores: what the run ended with, in the keys of metrics.json; empty if it was not evaluated.
    """

    folder: Path
    is_adapter: bool
    adapter: Mapping[str, Any] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    run: Mapping[str, Any] = field(repr=False)
    scores: Mapping[str, Any] = field(repr=False)

    @property
    def base(self) -> Source | None:
        """The model that training began with; None if nothing names it, or if it had random weights."""
        if self.config.get("model_config") is not None:
            return None
        for named in (self.config.get("model_name_or_path"), self.adapter.get("base_model_name_or_path")):
            if isinstance(named, str) and named:
                return source(named)
        return None

    def data(self, split: Literal["train", "validation"]) -> Source | None:
        """Where the questions of a split came from; None if nothing says so or there were none."""
        if not self.config or self.counts(split) == {}:
            return None
        named, file = self.config.get("dataset_name"), self.config.get(f"{split}_file")
        if isinstance(named, str) and named:
            return source(named)
        if isinstance(file, str) and file:
            return Source(os.path.basename(os.path.abspath(os.path.expanduser(file))), None)
        files = (self.config.get("train_file"), self.config.get("validation_file"))
        return None if any(files) else source("sample")

    def counts(self, split: Literal["train", "validation"]) -> Mapping[str, Any]:
        """What run.json says of a split: `num_examples` and the like; empty if nothing."""
        data = self.run.get("data")
        found = data.get(split) if isinstance(data, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def may_lack_answers(self) -> bool:
        """Whether "no answer" was a choice in the evaluation of the run: as its option says, else its data."""
        option = self.config.get("version_2_with_negative")
        return was_evaluated_without_answers(str(self.folder)) if option is None else option is True

    def ceiling(self) -> Ceiling | None:
        """The best scores that the validation data allows, if they were computed and their store is still there."""
        fingerprint = self.counts("validation").get("fingerprint")
        if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{8,}", fingerprint):
            return None
        named = {name: self.config.get(name) for name in ("answer_normalization", "max_answer_length")}
        options = EvaluationConfig(**{name: value for name, value in named.items() if value is not None})
        stores = self.config.get("store_dir")
        root = store_root(DataConfig(store_dir=stores if isinstance(stores, str) else None))
        found = kept_limits(root / fingerprint, options, version_2=self.may_lack_answers)
        return None if found is None else found.ceiling


def read_run(name: str) -> RunRecord:
    """What a model's folder says of itself.

    Raises:
        UserError: It holds no model, or one of its files cannot be used.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError(f"{name} is not a folder; name the --output_dir of a training run, or a merged model")
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    wanted = (ADAPTER_WEIGHTS,) if is_adapter else (MODEL_WEIGHTS, MODEL_INDEX)
    if not any((folder / each).is_file() for each in wanted) or not (is_adapter or (folder / MODEL_CONFIG).is_file()):
        raise CheckpointError(
            f"{name} holds no whole adapter and no whole model; name the --output_dir of a run that has ended, or a "
            "merged model"
        )
    run, metrics = (read_json_object(folder / file) for file in ("run.json", "metrics.json"))
    final = run.get("final")
    # An evaluation on other data may have been written into the folder since.
    scores = final if isinstance(final, dict) else metrics
    is_scored = all(is_number(scores.get(key)) for key in ("exact_match", "f1"))
    return RunRecord(
        folder,
        is_adapter,
        read_json_object(folder / ADAPTER_CONFIG),
        read_run_options(folder / "config.yaml"),
        run,
        scores if is_scored else {},
    )
