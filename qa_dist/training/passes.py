"""How a micro-batch is computed: forward pass, losses and backward pass."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from qa_dist.distributed.engine import Engine
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.collate import FeatureBatch
from qa_dist.model.rdrop import loss_of
from qa_dist.training.step_inputs import MicroBatch


class Passes(ABC):
    """Computes micro-batches: what they cost differs, what they give does not.

    Attributes:
        takes_buckets: whether micro-batches must be `BucketBatch`es.
    """

    takes_buckets: ClassVar[bool] = False

    @abstractmethod
    def begin_step(self) -> None:
        """Before the first micro-batch of a step, which may follow an evaluation."""

    @abstractmethod
    def run(self, micro_batch: MicroBatch, *, last: bool) -> torch.Tensor:
        """Add a micro-batch's gradients to this rank's; the loss of each of its features, float32 [B], on the device.

        `last` says that it is the last one of its step. The losses are good until the next call.
        """

    def release(self) -> None:  # noqa: B027 - most keep nothing
        """Give back the memory that is kept from one pass to the next."""

    def describe(self) -> dict[str, Any]:
        """What was used, for run.json; {} where there is no choice."""
        return {}


class EagerPasses(Passes):
    """Operation by operation, as the model's code says; or compiled, where the model is."""

    def __init__(self, ranks: Ranks, engine: Engine, *, rdrop_alpha: float = 0.0) -> None:
        self._ranks, self._engine = ranks, engine
        self._loss = loss_of(rdrop_alpha)

    def begin_step(self) -> None:
        # Always: a model that was just loaded has parts that do not drop anything, whatever its own mode says.
        self._engine.module.train()

    def run(self, micro_batch: MicroBatch, *, last: bool) -> torch.Tensor:
        batch = micro_batch.batch
        assert isinstance(batch, FeatureBatch)
        with self._ranks.autocast():
            start_T, end_T = self._engine.module(batch.input_ids_T, batch.token_type_ids_T, batch.lengths, batch.row)
        losses_B = self._loss(start_T, end_T, batch.lengths, batch.labels_B2, batch.row)
        with self._ranks.products():
            self._engine.backward(losses_B.sum() * micro_batch.weight, last=last)
        # Without the graph, in which layers of bitsandbytes keep their inputs even after the backward pass.
        return losses_B.detach()
