"""One optimiser step: the same at any number of ranks, micro-batches and processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from qa_dist.common.errors import LocalTrainingError, TrainingError
from qa_dist.config.optimizers import OPTIMIZERS
from qa_dist.config.options import RunConfig
from qa_dist.data.sources import subset
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.strategies.choice import make_engine
from qa_dist.features.batching import Indices, epoch_order, global_batch, plan_step, steps_per_epoch
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.store import FeatureStore
from qa_dist.model.dropout import seed_dropout
from qa_dist.model.span_model import SpanModel, Weights, span_loss
from qa_dist.model.trainable import GradientCheck
from qa_dist.training.checkpoints import Checkpoint
from qa_dist.training.identity import run_identity
from qa_dist.training.memory_probe import token_budget
from qa_dist.training.optimizer import learning_rate, make_optimizer
from qa_dist.training.run_state import RunState

LEAST_LOSS_SCALE = 1.0
"""In float16, losses are scaled up so that small gradients do not vanish; one below 1 would make them vanish more."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step did: its mean loss, the gradient's norm before clipping, and how much it saw.

    The norm is infinite if the step was skipped: its float16 gradient had overflowed.
    """

    loss: float
    grad_norm: float
    num_features: int
    num_tokens: int
    stop: bool = False
    """Whether some rank was asked to stop; the same on all ranks."""


class Trainer:
    """Takes optimiser steps. What a step computes depends on its number and on the state that the steps before left."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        store: FeatureStore,
        model: SpanModel,
        *,
        notice: Callable[[str], object] = lambda text: None,
    ) -> None:
        training = config.training
        self.config = config
        self.ranks = ranks
        self.store = store
        self.features = subset(store.num_features, config.data.max_train_features, config.data.subset_seed)
        self.steps_per_epoch = steps_per_epoch(len(self.features), training.global_batch_size)
        in_all_epochs = math.ceil(training.num_train_epochs * self.steps_per_epoch)
        self.num_steps = min(in_all_epochs, training.max_train_steps or in_all_epochs)
        self._longest = model.padded_length or int(store.lengths[self.features].max())
        self.model = model
        # These three before the tensors are sharded.
        self.gradients = GradientCheck(model)
        self.identity = run_identity(config, store, model, ranks)
        num_elements = [weight.numel() for _, weight in model.trainable()]
        make = partial(make_optimizer, training)
        self.engine = make_engine(ranks, model, make, max_grad_norm=training.max_grad_norm)
        self.notice = notice
        self._stop = False
        self._order: tuple[int, Indices] | None = None
        self.max_tokens = token_budget(
            ranks,
            self.engine,
            store,
            self.features,
            wanted=training.max_tokens_per_device,
            longest=self._longest,
            max_features=training.global_batch_size,
            reserved_bytes=sum(OPTIMIZERS[training.optim].moment_bytes(number) for number in num_elements),
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate(step, self.num_steps, self.config.training)

    def step(self, step: int) -> StepResult:
        """One optimiser step: the same features, and the same mean gradient, at every world size.

        Raises:
            TrainingError: On every rank alike: a loss or the gradient is not finite, or a tensor never gets a gradient.
        """
        features = self._global_batch(step)
        while (losses := self._accumulate(step, features)) is None:
            self._halve_budget(step, features)
        self._require_finite(step, features, losses)
        self.engine.sync_gradients()
        self.gradients.observe(self.engine.has_gradient)
        norm = self.engine.optimizer_step(self.learning_rate(step))
        if math.isfinite(norm):
            self.gradients.updated()
        else:
            self._require_room_below(step, features)
        return StepResult(
            loss=float(losses.mean()),
            grad_norm=norm,
            num_features=len(features),
            num_tokens=int(self.store.lengths[features].sum()),
            stop=self._stop,
        )

    def checkpoint(self, step: int, best: Weights | None, state: RunState) -> Checkpoint:
        """What a run needs to go on after `step` optimiser steps; the tensors are copies.

        Where the ranks hold shards, all must call this together. `best` are the best weights so
        far, and `state` is what the run knows besides.
        """
        return Checkpoint(
            step=step,
            weights=self.engine.weights(),
            optimizer=self.engine.optimizer_tensors(),
            best=best,
            identity=self.identity,
            state=state,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken."""
        self.engine.restore(checkpoint.weights)
        self.engine.load_optimizer_tensors(checkpoint.optimizer)
        self.engine.load_scaler_state(checkpoint.state.gradient_scaler)
        if self.config.training.max_tokens_per_device is None:
            # It may have been halved since; other micro-batches would round differently.
            self.max_tokens = min(self.max_tokens, max(self._longest, checkpoint.state.max_tokens_per_device))

    def _global_batch(self, step: int) -> Indices:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.features), seed=self.config.training.seed, epoch=epoch)
        return self.features[global_batch(self._order[1], position, self.config.training.global_batch_size)]

    def _accumulate(self, step: int, features: Indices) -> torch.Tensor | None:
        """This rank's gradients of a step, and the loss of every feature of the step on every rank, float64 [G_step].

        None, on every rank, if any of them ran out of memory; nothing is left of the step then.
        """
        lengths = self.store.lengths[features]
        plan = plan_step(
            features,
            lengths,
            world_size=self.ranks.world_size,
            max_tokens=self.max_tokens,
            padded=self.model.padding != "unpadded",
            padded_length=self.model.padded_length,
        )
        seed_dropout(self.config.training.seed, step, self.ranks.rank)
        self.engine.module.train()
        # Two more places: how many ranks ran out of memory, and how many were asked to stop.
        losses = torch.zeros(len(features) + 2, device=self.ranks.device, dtype=torch.float64)
        share = plan.shares[self.ranks.rank]
        try:
            for number, micro_batch in enumerate(share, 1):
                self.ranks.watchdog.beat(f"step {step + 1}, micro-batch {number}")
                # A rank with nothing left computes one feature for nothing, so that all have the same gradients.
                chosen = micro_batch if len(micro_batch) else lengths.argmin(0, keepdims=True)
                batch = FeatureBatch.of(self.store, features[chosen], self.ranks.device)
                with self.ranks.autocast():
                    start_T, end_T = self.engine.module(batch.input_ids_T, batch.token_type_ids_T, batch.lengths)
                losses_B = span_loss(start_T, end_T, batch.lengths, batch.labels_B2)
                # Ranks are averaged: times W / G_step the average is the mean over the global step.
                weight = self.ranks.world_size / len(features) if len(micro_batch) else 0.0
                self.engine.backward(losses_B.sum() * weight, last=number == len(share))
                if len(micro_batch):
                    losses[torch.from_numpy(micro_batch).to(losses.device)] = losses_B.detach().double()
                # They hold the graph, in which layers of bitsandbytes keep their inputs even after the backward pass.
                del start_T, end_T, losses_B
        except torch.OutOfMemoryError as error:
            if self.engine.holds_shards:
                raise LocalTrainingError(
                    f"step {step + 1}: out of memory with {self.max_tokens} tokens per device, and with "
                    f"{self.ranks.launch_config.strategy} other ranks are in the middle of the step; lower "
                    "--max_tokens_per_device, or use --gradient_checkpointing"
                ) from error
            losses[-2] = 1.0
        losses[-1] = float(self.ranks.is_asked_to_stop)
        losses = self.ranks.sum(losses)
        self._stop = bool(losses[-1])
        return None if losses[-2] else losses[:-2]

    def _halve_budget(self, step: int, features: Indices) -> None:
        """Go on with half the token budget, on all ranks alike.

        Raises:
            TrainingError: The budget was one feature already.
        """
        self.engine.zero_grad()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        least = self.model.padded_length or int(self.store.lengths[features].max())
        if self.max_tokens <= least:
            raise TrainingError(
                f"step {step + 1}: out of memory with a single feature of {least} tokens at a time; use "
                "--gradient_checkpointing, or lower --max_seq_length"
            )
        self.max_tokens = max(self.max_tokens // 2, least)
        self.notice(f"out of memory in step {step + 1}: it is repeated with {self.max_tokens} tokens per device")

    def _require_finite(self, step: int, features: Indices, losses: torch.Tensor) -> None:
        bad = (~losses.isfinite()).cpu().numpy()
        if bad.any():
            raise TrainingError(
                f"step {step + 1}: the loss of {bad.sum()} of {len(features)} features is not finite: "
                f"{self._names(features[bad])}; lower --learning_rate, or look at these examples"
            )

    def _require_room_below(self, step: int, features: Indices) -> None:
        """After a gradient that is not finite: a smaller loss scale may do, where there is one."""
        scale = self.engine.loss_scale
        if scale is None or scale < LEAST_LOSS_SCALE:
            scaled = "" if scale is None else f", even with losses scaled by {scale:g} in float16; use bf16 or no"
            raise TrainingError(
                f"step {step + 1}: the gradient is not finite{scaled}; features {self._names(features)}"
            )

    def _names(self, features: Indices) -> str:
        names = [f"{self.store.example_ids[self.store.example_index[i]]}#{self.store.window[i]}" for i in features[:8]]
        return ", ".join(names) + (" ..." if len(features) > 8 else "")
