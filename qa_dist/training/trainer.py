"""One optimiser step: the same at any number of ranks, micro-batches and processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qa_dist.common.arrays import Indices
from qa_dist.common.errors import DivergedError, LocalTrainingError, TrainingError
from qa_dist.config.options import RunConfig
from qa_dist.distributed.lora_choice import group_adapters
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.strategies.choice import make_engine
from qa_dist.features.store import FeatureStore
from qa_dist.machine.usage import is_out_of_memory
from qa_dist.model.casts import remove_redundant_casts
from qa_dist.model.dropout import seed_dropout
from qa_dist.model.span_model import SpanModel, Weights
from qa_dist.model.trainable import GradientCheck, least_weight
from qa_dist.training.checkpoints import Checkpoint
from qa_dist.training.compile_choice import compile_and_verify
from qa_dist.training.identity import run_identity
from qa_dist.training.lr_multipliers import lr_multipliers
from qa_dist.training.memory_probe import token_budget
from qa_dist.training.optimizer import is_fused, learning_rate, make_optimizer, step_bytes
from qa_dist.training.pass_choice import choose_passes
from qa_dist.training.run_state import RunState
from qa_dist.training.step_inputs import StepInputs
from qa_dist.training.step_report import Outcome, StepReport

MIN_LOSS_SCALE = 1.0
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
    most_tokens: int
    """Real tokens of the rank that has the most."""
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
        training, strategy = config.training, ranks.launch_config.strategy
        self.config = config
        self.ranks = ranks
        self.store = store
        self.inputs = StepInputs(
            config, store, model, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device
        )
        self.num_steps, self.steps_per_epoch = self.inputs.num_steps, self.inputs.steps_per_epoch
        self.model = model
        # These before the tensors are sharded.
        multipliers = lr_multipliers(model, training)
        self.gradients = GradientCheck(model, least_weight=least_weight(training.mixed_precision, multipliers))
        self.identity = run_identity(config, store, model, ranks)
        self.shapes = {name: tuple(weight.shape) for name, weight in model.trainable()}
        # Only now, so that the identity is that of the weights as they were loaded.
        remove_redundant_casts(
            model, config.model, training.mixed_precision, ranks.device, shards_one_type=strategy.startswith("zero")
        )
        num_elements = [weight.numel() for _, weight in model.trainable()]
        fused = is_fused(training.optim, strategy, ranks.device.type)
        make = partial(make_optimizer, training, fused=fused, lr_multipliers=multipliers)
        exchange_dtype = _exchange_dtype(config, ranks, notice)
        self.engine = make_engine(
            ranks, model, make, max_grad_norm=training.max_grad_norm, exchange_dtype=exchange_dtype
        )
        # On the device, and before anything is captured or measured.
        group_adapters(config, ranks, model, notice)
        compile_and_verify(config, ranks, model, self.inputs, notice)
        self.passes, self.evaluation_graphs = choose_passes(config, ranks, self.engine, model, notice)
        self.inputs.uses_buckets = self.passes.takes_buckets
        self.notice = notice
        self.max_tokens = token_budget(
            ranks,
            self.engine,
            store,
            self.inputs.features,
            wanted=training.max_tokens_per_device,
            longest=self.inputs.longest,
            max_features=training.global_batch_size,
            reserved_bytes=step_bytes(training.optim, num_elements, fused=fused),
            num_passes=2 if self.passes.takes_buckets else 1,
            rdrop_alpha=training.rdrop_alpha,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate(step, self.num_steps, self.config.training)

    def step(self, step: int) -> StepResult:
        """One optimiser step: the same features, and the same mean gradient, at every world size.

        Raises:
            DivergedError: On every rank alike: a loss or the gradient is not finite.
            TrainingError: On every rank alike: a tensor never gets a gradient.
        """
        features = self.inputs.global_batch(step)
        while (outcome := self._attempt(step, features)).is_out_of_memory:
            self._halve_budget(step, features)
        self._require_finite(step, features, outcome.losses)
        if math.isfinite(outcome.grad_norm):
            self.gradients.updated(self.learning_rate(step))
        else:
            self._require_room_below(step, features)
        return StepResult(
            loss=float(outcome.losses.mean()),
            grad_norm=outcome.grad_norm,
            num_features=len(features),
            num_tokens=int(self.store.lengths[features].sum()),
            most_tokens=self.inputs.pop_most_tokens(step),
            stop=outcome.stop,
        )

    def _attempt(self, step: int, features: Indices) -> Outcome:
        """A step with the token budget as it is; it changes nothing if a rank runs out of memory or a loss is bad.

        All of it is asked for before the host waits for any result.
        """
        report = StepReport(len(features), self.ranks.device)
        if not self._accumulate(step, report):
            # What is missing counts as zero, so that the others do not wait for it.
            self.engine.give_up_step()
            report.note_out_of_memory()
        report.exchange(self.ranks)
        self.engine.sync_gradients()
        self.gradients.observe(self.engine.have_gradients)
        report.note_norm(self.engine.optimizer_step(self.learning_rate(step), report.check()))
        self.inputs.prepare(step + 1, self.max_tokens)
        with self.ranks.watchdog.waiting():
            outcome = report.read()
        self.engine.conclude_step(is_whole=not outcome.is_out_of_memory)
        return outcome

    def describe_passes(self) -> dict[str, Any]:
        """How this rank computed its passes, for run.json; {} where there was no choice."""
        evaluation = {} if self.evaluation_graphs is None else self.evaluation_graphs.describe()
        return {**self.passes.describe(), **({"evaluation": evaluation} if evaluation else {})}

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
        if self.config.training.max_tokens_per_device == checkpoint.state.wanted_tokens_per_device:
            # It may have been halved since; other micro-batches would round differently, and drop other units.
            self.max_tokens = min(self.max_tokens, checkpoint.state.max_tokens_per_device)

    def _accumulate(self, step: int, report: StepReport) -> bool:
        """This rank's gradients of a step, and its losses in the report; False if it ran out of memory."""
        seed_dropout(self.config.training.seed, step, self.ranks.rank, self.ranks.device)
        self.passes.begin_step()
        try:
            self.ranks.watchdog.beat(f"step {step + 1}, before its first micro-batch")
            micro_batches = self.inputs.micro_batches(step, self.max_tokens)
            for number, micro_batch in enumerate(micro_batches, 1):
                self.ranks.watchdog.beat(f"step {step + 1}, micro-batch {number}")
                losses_B = self.passes.run(micro_batch, last=number == len(micro_batches))
                if micro_batch.is_counted:
                    report.add_losses(micro_batch.batch.places_B[: len(losses_B)], losses_B)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.engine.holds_shards:
                raise LocalTrainingError(
                    f"step {step + 1}: out of memory with {self.max_tokens} tokens per device, and with "
                    f"{self.ranks.launch_config.strategy} other ranks are in the middle of the step; lower "
                    "--max_tokens_per_device, or use --gradient_checkpointing"
                ) from error
            return False
        return True

    def _halve_budget(self, step: int, features: Indices) -> None:
        """Go on with half the token budget, on all ranks alike.

        Raises:
            TrainingError: The budget was one feature already.
        """
        self.engine.zero_grad()
        self.passes.release()
        if self.evaluation_graphs is not None:
            self.evaluation_graphs.release()
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
        bad = (~losses.isfinite()).numpy()
        if bad.any():
            raise DivergedError(
                f"step {step + 1}: the loss of {bad.sum()} of {len(features)} features is not finite: "
                f"{self._names(features[bad])}; lower --learning_rate, or look at these examples"
            )

    def _require_room_below(self, step: int, features: Indices) -> None:
        """After a gradient that is not finite: a smaller loss scale may do, where there is one."""
        scale = self.engine.loss_scale
        if scale is None or scale < MIN_LOSS_SCALE:
            scaled = "" if scale is None else f", even with losses scaled by {scale:g} in float16; use bf16 or no"
            raise DivergedError(
                f"step {step + 1}: the gradient is not finite{scaled}; features {self._names(features)}"
            )

    def _names(self, features: Indices) -> str:
        names = [f"{self.store.example_ids[self.store.example_index[i]]}#{self.store.window[i]}" for i in features[:8]]
        return ", ".join(names) + (" ..." if len(features) > 8 else "")


def _exchange_dtype(config: RunConfig, ranks: Ranks, notice: Callable[[str], object]) -> torch.dtype:
    """In which type gradients are exchanged; with a notice if it was chosen and nothing is exchanged."""
    name = config.training.gradient_exchange_dtype
    if name != "float32" and ranks.world_size == 1:
        notice(f"--gradient_exchange_dtype {name} changes nothing here: one process exchanges no gradients")
    return {"float32": torch.float32, "bf16": torch.bfloat16}[name]
