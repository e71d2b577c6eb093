"""What a rank computes in a step: a function of the configuration, the step's number and the token budget."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from qa_dist.common.arrays import Indices
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.data.sources import subset
from qa_dist.features.batching import epoch_order, global_batch, plan_step, steps_in, steps_per_epoch
from qa_dist.features.buckets import BucketBatch
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.store import FeatureStore
from qa_dist.machine.usage import is_out_of_memory
from qa_dist.model.rdrop import copies
from qa_dist.model.span_model import SpanModel


class MicroBatch(NamedTuple):
    """Features of one pass; where `weight` is 0, one that is computed for nothing.

    A rank with nothing left computes one, so that all have the same gradients.

    Attributes:
        batch: the features, each as often as `StepInputs.copies` says.
        weight: what the gradient of each feature's loss is multiplied with: gradients are averaged over W ranks, and
            times W / G_step the average is the mean over the features of the global step.
    """

    batch: FeatureBatch | BucketBatch
    weight: float

    @property
    def is_counted(self) -> bool:
        """Whether its losses are those of the step's features."""
        return self.weight > 0


class StepInputs:
    """The features of every step, and a rank's share of them on its device.

    Attributes:
        copies: how often each feature is in its pass, one behind the other: all once, then all again.
        features: what is trained on, as places in the store.
        steps_per_epoch: optimiser steps of an epoch.
        num_steps: optimiser steps of the run.
        shortfall: what a run that ends before --max_train_steps should hear, as sentences.
        longest: tokens that the longest feature is computed with.
        uses_buckets: whether micro-batches are `BucketBatch`es.
        mean_tokens: tokens of all features of a step, on average.
    """

    def __init__(
        self,
        config: RunConfig,
        store: FeatureStore,
        model: SpanModel,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        training = config.training
        self.copies = copies(training.rdrop_alpha)
        self.features = subset(store.num_features, config.data.max_train_features, config.data.subset_seed)
        self.steps_per_epoch = steps_per_epoch(len(self.features), training.global_batch_size)
        in_all_epochs = steps_in(training.num_train_epochs, self.steps_per_epoch)
        self.num_steps = min(in_all_epochs, training.max_train_steps or in_all_epochs)
        self.shortfall = _shortfall(training, in_all_epochs)
        self.longest = model.padded_length or int(store.lengths[self.features].max())
        self.mean_tokens = float(store.lengths[self.features].sum()) / self.steps_per_epoch
        self._seed, self._global_batch_size = training.seed, training.global_batch_size
        self._store, self._device = store, device
        self._is_padded, self._padded_length = model.padding != "unpadded", model.padded_length
        self._rank, self._world_size = rank, world_size
        self._max_seq_length = config.data.max_seq_length
        self.uses_buckets = False
        self._order: tuple[int, Indices] | None = None
        self._ahead: tuple[tuple[int, int], list[MicroBatch]] | None = None
        self._most_tokens: dict[int, int] = {}

    def global_batch(self, step: int) -> Indices:
        """The features of a step, over all ranks: places in the store, int64 [G_step]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.features), seed=self._seed, epoch=epoch)
        return self.features[global_batch(self._order[1], position, self._global_batch_size)]

    def micro_batches(self, step: int, max_tokens: int) -> list[MicroBatch]:
        """What this rank computes in a step, in passes of at most `max_tokens` tokens."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (step, max_tokens):
            return ahead[1]
        features = self.global_batch(step)
        lengths = self._store.lengths[features]
        plan = plan_step(
            lengths,
            world_size=self._world_size,
            max_tokens=max_tokens,
            padded=self._is_padded,
            padded_length=self._padded_length,
        )
        self._most_tokens[step] = plan.most_tokens
        share = plan.shares[self._rank]
        shortest = lengths.argmin(0, keepdims=True)
        computed = [np.tile(each if len(each) else shortest, self.copies) for each in share]
        groups = [(features[places], places) for places in computed]
        weight = self._world_size / len(features)
        weights = [weight if len(each) else 0.0 for each in share]
        batches: Sequence[FeatureBatch | BucketBatch]
        if self.uses_buckets:
            batches = BucketBatch.several(
                self._store, groups, weights, self._device, longest=self._max_seq_length, max_tokens=max_tokens
            )
        else:
            batches = FeatureBatch.several(self._store, groups, self._device)
        return list(map(MicroBatch, batches, weights))

    def pop_most_tokens(self, step: int) -> int:
        """Real tokens of the rank that has the most in a step whose micro-batches were made, and forget them."""
        return self._most_tokens.pop(step)

    def prepare(self, step: int, max_tokens: int) -> None:
        """Let `micro_batches` have a step's ready, while a GPU is busy; no other step is kept."""
        if self._device.type != "cuda" or step >= self.num_steps:
            return
        try:
            self._ahead = (step, max_tokens), self.micro_batches(step, max_tokens)
        except RuntimeError as error:
            # The step itself will say so, where that can be dealt with.
            if not is_out_of_memory(error):
                raise


def _shortfall(training: TrainingConfig, in_all_epochs: int) -> list[str]:
    asked, epochs = training.max_train_steps, training.num_train_epochs
    if asked is None or asked <= in_all_epochs:
        return []
    return [
        f"note: --num_train_epochs {epochs:g} ends after {in_all_epochs:,} steps, before --max_train_steps {asked:,}; "
        "raise it for more"
    ]
