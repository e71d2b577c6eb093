"""The model of a reader in torch: real tokens alone are computed, by the code that evaluates a run."""

import threading
from collections import defaultdict
from collections.abc import Sequence

import torch

from qa_dist.answering.backend import Backend
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.passes import candidates, logits_of
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.table import FeatureTable
from qa_dist.features.token_budget import EVALUATION_TOKENS
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureColumns
from qa_dist.machine.allocator import return_freed_memory
from qa_dist.model.precision import Precision, computing
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import check_vocabulary

_MANY_PASSES = 16
"""Passes on a CPU behind which what glibc's heap has kept of them is given back: they take much longer than that does.

A process that is asked now and then would keep tens of MiB for nothing.
"""

_DEVICE_LOCKS: dict[str, threading.Lock] = defaultdict(threading.Lock)
"""One for each device. A chunk takes all of a device, and on CPUs the number of torch's threads is of the process."""


class TorchBackend(Backend):
    """A span model on one device.

    Attributes:
        model: the model, in evaluation mode.
    """

    def __init__(
        self,
        model: SpanModel,
        tokenizer: TokenizerSpec,
        device: torch.device,
        *,
        mixed_precision: Precision = "no",
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = str(device)
        self.notes = tuple(notes)
        self._device = device
        self.mixed_precision = mixed_precision
        self._lock = device_lock(device)

    def candidates(self, features: FeatureColumns, config: EvaluationConfig) -> CandidateTable:
        table = FeatureTable.of(features)
        check_vocabulary(self.model, table.largest_token_id)
        budget = config.eval_tokens_per_device or EVALUATION_TOKENS[self._device.type]
        batches = evaluation_batches(table.lengths, budget, self.model.padded_length)
        with self._lock:
            computed = logits_of(
                self.model,
                table,
                batches,
                self._device,
                autocast=lambda: computing(self._device.type, self.mixed_precision),
            )
            found = list(candidates(computed, config))
        if self._device.type == "cpu" and len(batches) >= _MANY_PASSES:
            return_freed_memory()
        return CandidateTable.concatenate(found).ordered(table.num_features)


def device_lock(device: torch.device) -> threading.Lock:
    """What a thread holds while it computes on a device."""
    return _DEVICE_LOCKS[str(device)]


def chosen_device(name: str | None) -> torch.device:
    """The device of this name; None: the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: There is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in EVALUATION_TOKENS:
        raise ConfigError([f"the device {name!r} is none that is known; give cpu, cuda or cuda:N"])
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError([f"the device {name} is not there: torch finds {found} GPUs; give cpu, or leave it out"])
    return device
