"""An example as a value: what `qa-dist inspect` shows of one, from Python."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qa_dist.answering.opening import configuration_of
from qa_dist.answering.terminal import Style
from qa_dist.common.errors import ConfigError
from qa_dist.common.notebook import ShownAsText, named_as_in_python
from qa_dist.config.options import RunConfig
from qa_dist.data.folders import Split
from qa_dist.data.sources import require_split
from qa_dist.features.building import prepare_store
from qa_dist.model.folder import as_tuned, load_tokenizer_of
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.reporting.example_lines import example_lines
from qa_dist.reporting.example_logits import add_answers
from qa_dist.reporting.examples import chosen_features, example_view

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class ExampleView(ShownAsText):
    """An example with its windows and their tokens, in the words of `qa-dist inspect --json`; `str` is the whole text.

    Attributes:
        found: what `qa-dist inspect --json` prints.
    """

    found: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"ExampleView(id={self.example['id']!r}, {len(self.features)} of {self.found['num_windows']} windows)"

    def __str__(self) -> str:
        style = Style(is_terminal=False, has_colours=False, width=_WIDTH)
        return "\n".join(example_lines(self.found, style))

    @property
    def example(self) -> Mapping[str, Any]:
        """The record: `id`, `question`, `context`, `answers` and so on."""
        record: Mapping[str, Any] = self.found["example"]
        return record

    @property
    def features(self) -> Sequence[Mapping[str, Any]]:
        """The windows that are shown, each with its label and its `tokens`."""
        windows: Sequence[Mapping[str, Any]] = self.found["features"]
        return windows

    @property
    def tokens(self) -> list[Mapping[str, Any]]:
        """The tokens of these windows, one behind the other: rows for a table of any library."""
        return [token for feature in self.features for token in feature["tokens"]]

    @property
    def answers(self) -> Sequence[Mapping[str, Any]]:
        """The n-best list over all windows, best first; empty without a model."""
        answers: Sequence[Mapping[str, Any]] = self.found.get("answers", ())
        return answers


def inspect_example(
    config: RunConfig | None = None,
    *,
    id: str | None = None,
    feature: int | None = None,
    split: Split = "train",
    model: str | os.PathLike[str] | None = None,
) -> ExampleView:
    """An example as a model gets it, and with `model` as the model sees it: logits of each token, and answers.

    Args:
        config: Data, lengths and tokenizer; None: those of the run that wrote the folder of `model`.
        id: The example, with all its windows.
        feature: Instead, one window by its number in the split, counted from 0.
        split: Where it is.
        model: Folder of a trained adapter or model.

    Raises:
        UserError: There is no such example, or data or model cannot be used.
    """
    folder = None if model is None else os.path.expanduser(os.fspath(model))
    with named_as_in_python():
        if (id is None) == (feature is None):
            raise ConfigError(["one of id and feature names what to show; give one of them"])
        if config is None:
            if folder is None:
                raise ConfigError(["config is missing; give one, or the folder of a trained model as model"])
            config = configuration_of(folder, {})
        elif folder is not None:
            config = as_tuned(config, folder)
        require_split(config.data, split)
        tokenizer = load_tokenizer(config.model) if folder is None else load_tokenizer_of(folder, config.model)[0]
        store = prepare_store(config, split, tokenizer=tokenizer, progress=True)
        found = {"split": split, **example_view(store, tokenizer, chosen_features(store, id, feature))}
        if folder is not None:
            add_answers(found, store, config, folder, tokenizer)
    return ExampleView(found)
