"""One model of several that were trained from the same weights: the mean of what they learnt.

Runs that differ in their seed, or in the order of their data, end at different weights around the same place. Their
mean is often better than each of them, as their predictions together are, and costs no more to use than one of them
(Wortsman et al. 2022, "Model soups", arXiv:2203.05482).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.config.options import RunConfig
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.model.fingerprint import weights_fingerprint
from qa_dist.model.folder import load_tokenizer_of
from qa_dist.model.loading import without_library_messages
from qa_dist.model.merging import fold, kept_options, load_plain, quantization_notes, write_kept_options
from qa_dist.model.saved import require_written
from qa_dist.model.span_model import Weights

LARGEST_SPREAD = 0.5
"""Models further apart were not trained from one base.

Two models of independent weights are 1 apart, as a share of their mean; runs from one base a few hundredths.
"""

_NAMES_ONLY = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id"),
)
"""Entries of a model's configuration that say nothing of what it computes; nor do those about dropout."""


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        folder: where it lies.
        config: what it is loaded and used with.
    """

    folder: str
    config: RunConfig


class MeanWeights:
    """The mean of models' weights, added one at a time; the sums are float64, so that their order changes nothing."""

    def __init__(self) -> None:
        self._sums: Weights = {}
        self._squares = 0.0
        self._num_models = 0

    def add(self, weights: Weights) -> None:
        """Add a model's tensors by name, of the same names and shapes in all models.

        Of tensors that are no floating-point numbers, such as tables of positions, those of the first model stay.
        """
        for name, tensor in weights.items():
            if not tensor.is_floating_point():
                self._sums.setdefault(name, tensor.clone())
                continue
            wide = tensor.double()
            self._squares += float(wide.square().sum())
            self._sums[name] = self._sums[name].add_(wide) if name in self._sums else wide.clone()
        self._num_models += 1

    def weights(self) -> Weights:
        """The means, float32, and the tensors that are no floating-point numbers, by name."""
        return {
            name: (total / self._num_models).float() if total.is_floating_point() else total
            for name, total in self._sums.items()
        }

    def spread(self) -> float:
        """Root mean square of the models' distances from the mean, as a share of its norm."""
        means = (total / self._num_models for total in self._sums.values() if total.is_floating_point())
        of_mean = math.fsum(float(mean.square().sum()) for mean in means)
        # The mean of squared distances is that of the squares less the square of the mean; rounding may make it less.
        return math.sqrt(max(self._squares / self._num_models / of_mean - 1, 0.0))


class _Loaded(NamedTuple):
    """A transformers model without adapters, its tokenizer, and the folder that they are of."""

    folder: str
    model: Any
    tokenizer: Any


class Mean(NamedTuple):
    """The mean of several models.

    Attributes:
        first: the first of them, in whose form it is written.
        weights: the mean of every tensor, by name.
        spread: `MeanWeights.spread` of the models.
    """

    first: _Loaded
    weights: Weights
    spread: float

    def write(self, directory: Path) -> None:
        """Write it as a plain transformers model, with the tokenizer and options of the first, into an empty folder.

        Raises:
            CheckpointError: What was written is not what is read back.
        """
        self.first.model.load_state_dict(self.weights)
        with without_library_messages():
            self.first.model.save_pretrained(str(directory))
        require_written(self.weights, directory)
        self.first.tokenizer.save_pretrained(str(directory))
        write_kept_options(self.first.folder, directory)


def average(models: Sequence[Trained], notice: Callable[[str], object] = lambda text: None) -> Mean:
    """The mean of two or more models: adapters, which are folded into their bases, or whole models.

    Args:
        models: Where they are.
        notice: Hears what the user should know about one of them.

    Raises:
        UserError: A model cannot be loaded.
        ConfigError: They are of different architectures, tokenizers or beginnings, or two are the same.
        CheckpointError: A mean is not finite.
    """
    first, mean, seen = _load(models[0], notice), MeanWeights(), dict[str, str]()
    for number, trained in enumerate(models):
        other = _load(trained, notice) if number else first
        _require_one_kind(first, other)
        weights = other.model.state_dict()
        if (same := seen.setdefault(weights_fingerprint(weights), trained.folder)) != trained.folder:
            raise ConfigError([f"{same} and {trained.folder} hold the same weights; name each model once"])
        mean.add(weights)
    weights = mean.weights()
    if broken := next((name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())), None):
        raise CheckpointError(f"the mean of {broken} is not finite; leave out the model that has such weights")
    if (spread := mean.spread()) > LARGEST_SPREAD:
        raise ConfigError(
            [
                f"the weights lie {spread:.2f} of their mean apart, and those of models that began as one at most "
                f"{LARGEST_SPREAD:g}; average runs from the same base model"
            ]
        )
    return Mean(first, weights, spread)


def option_notes(models: Sequence[Trained]) -> Iterator[str]:
    """What the user should know about the options that the mean of these models keeps, as a sentence."""
    first = models[0].folder
    own, *others = (kept_options(trained.folder) for trained in models)
    known = [other for other in others if other is not None]
    if own is None and known:
        yield f"{first} was made by no run here, so that the result has no lengths and rules of scores, as others have"
    elif own is not None:
        differing = {name for other in known for name in own | other if own.get(name) != other.get(name)}
        if differing:
            yield f"the runs differ in {', '.join(sorted(differing))}; the result has the values of {first}"


def _load(trained: Trained, notice: Callable[[str], object]) -> _Loaded:
    tokenizer, notes = load_tokenizer_of(trained.folder, trained.config.model)
    for note in (*notes, *(f"{trained.folder}: {note}" for note in quantization_notes(trained.config))):
        notice(note)
    model = load_plain(trained.config, trained.folder, tokenizer_pads_left=tokenizer.padding_side == "left")
    return _Loaded(trained.folder, fold(model), tokenizer)


def _require_one_kind(first: _Loaded, other: _Loaded) -> None:
    """Make sure that two models make features alike and have the same tensors.

    Raises:
        ConfigError: They do not; the message names the first thing that differs.
    """
    both = f"{first.folder} and {other.folder}"
    if TokenizerSpec.of(first.tokenizer) != TokenizerSpec.of(other.tokenizer):
        raise ConfigError([f"the tokenizers of {both} differ; average models of one tokenizer"])
    left, right = ({**each.model.config.to_dict(), **dict.fromkeys(_NAMES_ONLY)} for each in (first, other))
    names = (name for name in left | right if "drop" not in name)
    if differing := [name for name in names if left.get(name) != right.get(name)]:
        # What kind a model is explains the most.
        name = min(differing, key=lambda name: (name != "model_type", name))
        values = f"{left.get(name)!s:.40} and {right.get(name)!s:.40}"
        raise ConfigError([f"{name} of {both} differs, {values}; average models of one architecture"])
