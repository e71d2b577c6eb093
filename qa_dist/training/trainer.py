"""One optimiser step: the same at any number of ranks, micro-batches and processes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from qa_dist.common.errors import ConfigError, LocalTrainingError, TrainingError
from qa_dist.config.options import RunConfig
from qa_dist.data.sources import subset
from qa_dist.distributed.engine import NamedParameters
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.strategies.choice import make_engine
from qa_dist.features.batching import Indices, epoch_order, global_batch, plan_step, steps_per_epoch
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.store import FeatureStore
from qa_dist.features.token_budget import CPU_TOKENS, measured_budget
from qa_dist.model.span_model import SpanModel, Weights, span_loss
from qa_dist.model.trainable import GradientCheck
from qa_dist.training.checkpoints import Checkpoint, weights_fingerprint
from qa_dist.training.optimizer import learning_rate, make_adamw, moment_bytes, parameter_groups
from qa_dist.training.progress import StepResult

LEAST_LOSS_SCALE = 1.0
"""In float16, losses are scaled up so that small gradients do not vanish; one below 1 would make them vanish more."""


class Trainer:
    """The state of a run and its one loop. A position is a step number: everything drawn depends on it alone."""

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
        self.num_steps = math.ceil(training.num_train_epochs * self.steps_per_epoch)
        self.num_steps = min(self.num_steps, training.max_train_steps or self.num_steps)
        longest = model.padded_length or int(store.lengths[self.features].max())
        wanted = training.max_tokens_per_device
        if wanted is not None and wanted < longest:
            raise ConfigError(
                [
                    f"--max_tokens_per_device {wanted} is less than one feature, which may have {longest} tokens; "
                    "raise it or lower --max_seq_length"
                ]
            )
        self.model = model
        self._longest = longest
        # These three before the tensors are sharded.
        self.gradients = GradientCheck(model)
        self._moment_bytes = sum(moment_bytes(training.optim, weight.numel()) for _, weight in model.trainable())
        self.identity = {
            **config.fixed(),
            "training data": store.fingerprint,
            "base model": _common_base(model, ranks),
        }
        self.engine = make_engine(ranks, model, self._make_optimizer, max_grad_norm=training.max_grad_norm)
        self.notice = notice
        self._stop = False
        self._order: tuple[int, Indices] | None = None
        self.max_tokens = self._find_budget(longest) if wanted is None else wanted

    def _make_optimizer(self, parameters: NamedParameters) -> torch.optim.Optimizer:
        training = self.config.training
        return make_adamw(
            training.optim,
            parameter_groups(parameters, training.weight_decay),
            learning_rate=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            epsilon=training.adam_epsilon,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate(
            step,
            num_steps=self.num_steps,
            peak=self.config.training.learning_rate,
            warmup_ratio=self.config.training.warmup_ratio,
            shape=self.config.training.lr_scheduler_type,
        )

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

    def checkpoint(self, step: int, best: Weights | None, progress: Mapping[str, Any]) -> Checkpoint:
        """What a run needs to go on after `step` optimiser steps; the tensors are copies.

        Where the ranks hold shards, all must call this together.
        """
        return Checkpoint(
            step=step,
            weights=self.engine.weights(),
            optimizer=self.engine.optimizer_tensors(),
            best=best,
            identity=self.identity,
            progress={
                **progress,
                "max_tokens_per_device": self.max_tokens,
                "gradient_scaler": self.engine.scaler_state(),
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken."""
        self.engine.restore(checkpoint.weights)
        self.engine.load_optimizer_tensors(checkpoint.optimizer)
        self.engine.load_scaler_state(checkpoint.progress["gradient_scaler"])
        if self.config.training.max_tokens_per_device is None:
            # It may have been halved since; other micro-batches would round differently.
            self.max_tokens = min(self.max_tokens, max(self._longest, checkpoint.progress["max_tokens_per_device"]))

    def _find_budget(self, longest: int) -> int:
        """Tokens of a forward pass, the same on all ranks: a constant on the CPU, measured on CUDA."""
        if self.ranks.device.type != "cuda":
            return max(CPU_TOKENS, longest)
        by_length = self.features[np.argsort(-self.store.lengths[self.features], kind="stable")]

        def run_pass(tokens: int) -> int:
            features = by_length[: max(1, tokens // longest)]
            batch = FeatureBatch.of(self.store, features, self.ranks.device)
            self.engine.module.train()
            with self.ranks.autocast():
                start_T, end_T = self.engine.module(batch.input_ids_T, batch.token_type_ids_T, batch.lengths)
            self.engine.dry_backward(span_loss(start_T, end_T, batch.lengths, batch.labels_B2).sum())
            return longest * len(features)

        most = longest * min(len(self.features), self.config.training.global_batch_size)
        found = measured_budget(
            run_pass, longest=longest, most=most, device=self.ranks.device, reserved_bytes=self._moment_bytes
        )
        return self.ranks.minimum(found)

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
        _seed_dropout(self.config.training.seed, step, self.ranks.rank)
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


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the dropout of a step depend on (seed, step, rank) alone, so that a resumed run draws the same masks."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


def _common_base(model: SpanModel, ranks: Ranks) -> str:
    """Fingerprint of the weights that training starts from: the frozen ones, or all in full fine-tuning.

    Raises:
        ConfigError: On every rank alike: a rank starts from other weights than rank 0.
    """
    named = dict(model.named_parameters())
    # peft keeps the head as it was drawn beside the one that is trained; nothing uses it.
    kept = {name: weight for name, weight in named.items() if ".original_module." not in name}
    base = {name: weight for name, weight in kept.items() if not weight.requires_grad} or kept
    rest = {name: weight for name, weight in named.items() if name not in base}
    found = ranks.gather((weights_fingerprint(base), weights_fingerprint(rest)))
    different = [rank for rank, fingerprints in enumerate(found) if fingerprints != found[0]]
    first, different = ranks.broadcast((found[0][0] if found else "", different))
    if different:
        raise ConfigError(
            [
                f"rank {different[0]} starts from other weights than rank 0: its machine has another "
                "--model_name_or_path under the same name, or other versions; make the files the same on all machines"
            ],
            on_all_ranks=True,
        )
    return first
