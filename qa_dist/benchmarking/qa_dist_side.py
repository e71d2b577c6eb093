"""qa_dist as it is measured: the real training loop, `qa_dist.training.trainer.Trainer.step`, over every feature once.

Warm-up steps come before, steps that are taken apart into phases come after.

**Phases.** Hooks of the model, its engine and `Ranks` note the time at which one phase ends and the next begins; on
CUDA each first waits for the device, which is why these steps are not among the measured ones. `gradient_sync` is the
time in `Ranks.sum` (the losses) and `Engine.sync_gradients`, the wait for the slowest rank included, and of the
gradients what the backward pass has not hidden. `optimizer` is all else behind the backward pass: checks, clipping, the
update.

**Exchange.** The bytes of gradients of a step, and what they are per second of training and in an all-reduce of as many
bytes alone, both as `qa_dist.distributed.bandwidth` counts: what each rank sends and receives.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from qa_dist.benchmarking.flops import StepFlops, matmul_rates
from qa_dist.benchmarking.job import Job, Result
from qa_dist.benchmarking.measuring import rates, synchronize, synthetic_store
from qa_dist.config.options import DataConfig, RunConfig
from qa_dist.distributed import bandwidth
from qa_dist.distributed.engine import Engine
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation import loop as evaluating
from qa_dist.evaluation.loop import evaluate_loss, score
from qa_dist.evaluation.passes import candidates
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.building import prepare_store
from qa_dist.features.token_budget import EVALUATION_TOKENS
from qa_dist.model.building import build_model
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.model.span_model import SpanModel, transformers_model
from qa_dist.training.graph_passes import GraphPasses
from qa_dist.training.trainer import Trainer

PHASES = ("data", "forward", "backward", "gradient_sync", "optimizer")

_CEILING_SECONDS = 0.5
_EXCHANGE_SECONDS = 0.5
_RENDEZVOUS_SECONDS = 300.0


class PhaseClock:
    """Seconds by phase: each `mark` gives the time since the last one to the phase that ends there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: float | None = None
        self._seconds: dict[str, float] = {}

    def start(self) -> None:
        """Begin, with empty phases."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._last = self._now()

    def stop(self) -> dict[str, float]:
        """The phases since `start`; marks are ignored from here on."""
        self._last = None
        return self._seconds

    def mark(self, phase: str) -> None:
        """The end of a piece of this phase."""
        if self._last is not None:
            now = self._now()
            self._seconds[phase] += now - self._last
            self._last = now

    def watch(self, engine: Engine, ranks: Ranks) -> None:
        """Note when the parts of a step begin and end; it cannot be undone."""
        engine.module.register_forward_pre_hook(lambda *_: self.mark("data"))
        engine.module.register_forward_hook(lambda *_: self.mark("forward"))
        # What comes before the backward pass is the loss, before the sum of the losses the rest of the pass.
        self._watch_method(engine, "backward", before="forward", itself="backward")
        self._watch_method(ranks, "sum", before="backward", itself="gradient_sync")
        self._watch_method(engine, "sync_gradients", before="optimizer", itself="gradient_sync")

    def _watch_method(self, owner: Engine | Ranks, name: str, *, before: str, itself: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        @wraps(method)
        def watched(*args: Any, **options: Any) -> Any:
            self.mark(before)
            returned = method(*args, **options)
            self.mark(itself)
            return returned

        setattr(owner, name, watched)

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def train(job: Job, config: RunConfig, spec: Mapping[str, Any]) -> Result | None:
    """Rates, memory, phases and matrix rate of qa_dist's training loop; on rank 0, None elsewhere."""
    ranks = Ranks(mixed_precision=config.training.mixed_precision)
    model, _ = build_model(
        config.model,
        seed=config.training.seed,
        max_seq_length=config.data.max_seq_length,
        gradient_checkpointing=config.training.gradient_checkpointing,
        device=ranks.device,
    )
    store = synthetic_store(job, config, int(transformers_model(model.model).config.vocab_size))
    trainer = Trainer(config, ranks, store, model)
    for step in range(job.warmup_steps):
        trainer.step(step)
    # Whole epochs later, so that the measured steps see every feature once.
    first = -(-job.warmup_steps // trainer.steps_per_epoch) * trainer.steps_per_epoch
    ceiling = _Ceiling(job, config, trainer) if job.measure_ceiling else None
    if ceiling:
        ceiling.measure()
    _rendezvous(spec)
    ranks.barrier()
    num_tokens = 0
    synchronize(ranks.device)
    ends = [time.perf_counter()]
    for step in range(first, first + trainer.steps_per_epoch):
        num_tokens += trainer.step(step).num_tokens
        ends.append(time.perf_counter())
    synchronize(ranks.device)
    ends[-1] = time.perf_counter()
    seconds = [end - start for start, end in pairwise(ends)]
    memory = ranks.peak_memory_bytes()
    if ceiling:
        ceiling.measure()
    phases = _profile(job, trainer, first)
    exchange = _exchange(trainer, median(seconds))
    result = None
    if ranks.is_main:
        result = rates(store.num_features, num_tokens, seconds)
        result["peak_memory_bytes_per_rank"] = memory
        result["peak_memory_bytes"] = max(memory)
        result["max_tokens_per_device"] = trainer.max_tokens
        if phases:
            result["phase_seconds"] = phases
        result.update(exchange)
        if ceiling:
            result.update(ceiling.results(store.lengths.tolist(), sum(seconds)))
    ranks.close()
    return result


def evaluate(config: RunConfig) -> Result:
    """Seconds of each phase of an evaluation, from the questions to the scores."""
    ranks = Ranks(mixed_precision=config.training.mixed_precision)
    tokenizer = load_tokenizer(config.model)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        data = dataclasses.replace(config.data, store_dir=directory)
        # Imports, which the Hugging Face side has behind it too.
        some = DataConfig(dataset_name="synthetic:16", store_dir=directory)
        prepare_store(dataclasses.replace(config, data=some), "validation", tokenizer=tokenizer)
        begin = time.perf_counter()
        store = prepare_store(dataclasses.replace(config, data=data), "validation", tokenizer=tokenizer)
        seconds["tokenise"] = time.perf_counter() - begin
        model, _ = build_model(config.model, seed=config.training.seed, max_seq_length=config.data.max_seq_length)
        model.to(ranks.device)
        evaluate_loss(model, store, ranks, config.evaluation, np.arange(min(16, store.num_features)))
        remembering = cast(SpanModel, _Remembering(model))
        synchronize(ranks.device)
        begin = time.perf_counter()
        evaluation = evaluating.evaluate(remembering, store, ranks, config.evaluation, version_2=False)
        whole = time.perf_counter() - begin
        # Again from the logits on: in the evaluation this went on beside the forward pass.
        batches = evaluation_batches(store.lengths, EVALUATION_TOKENS[ranks.device.type], model.padded_length)
        computed = list(evaluating.forward(remembering, store, ranks, batches))
        synchronize(ranks.device)
        begin = time.perf_counter()
        tables = list(candidates(computed, config.evaluation))
        answers = evaluating.answer(tables, store, config.evaluation, version_2=False)
        seconds["decode"] = time.perf_counter() - begin
        begin = time.perf_counter()
        score(store, answers, version_2=False)
        seconds["score"] = time.perf_counter() - begin
        seconds["forward"] = whole - seconds["decode"] - seconds["score"]
        num_examples, num_features = store.num_examples, store.num_features
    memory = ranks.peak_memory_bytes()
    ranks.close()
    return {
        "phase_seconds": seconds,
        "seconds": seconds["tokenise"] + whole,
        "num_examples": num_examples,
        "num_features": num_features,
        "peak_memory_bytes": max(memory),
        "exact_match": evaluation.metrics["exact_match"],
        "f1": evaluation.metrics["f1"],
    }


class _Remembering(nn.Module):
    """A model that computes a batch once, and has its logits from then on."""

    def __init__(self, model: SpanModel) -> None:
        super().__init__()
        self._model = model
        self._known: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        self.padded_length = model.padded_length
        self.is_thread_safe = model.is_thread_safe

    def forward(
        self, input_ids_T: torch.Tensor, token_type_ids_T: torch.Tensor, lengths: tuple[int, ...], *layout: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the model."""
        key = input_ids_T.cpu().numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._model(input_ids_T, token_type_ids_T, lengths, *layout)
        return self._known[key]


def _profile(job: Job, trainer: Trainer, first: int) -> dict[str, float]:
    """Median seconds of each phase of a step on this rank; empty if no steps are to be profiled.

    A pass that a CUDA graph replays has no phases: all passes are launched from here on.
    """
    if job.profiled_steps and isinstance(trainer.passes, GraphPasses):
        trainer.passes.give_up("the phases of a step are timed")
    clock = PhaseClock(trainer.ranks.device)
    clock.watch(trainer.engine, trainer.ranks)
    steps: list[dict[str, float]] = []
    for number in range(job.profiled_steps):
        trainer.ranks.barrier()
        clock.start()
        trainer.step(first + number % trainer.steps_per_epoch)
        clock.mark("optimizer")
        steps.append(clock.stop())
    return {name: median(phases[name] for phases in steps) for name in PHASES} if steps else {}


def _exchange(trainer: Trainer, step_seconds: float) -> Result:
    """Bytes of gradients in a step and per second, in training and alone; nothing where ranks exchange none."""
    num_bytes, ranks = trainer.engine.exchanged_bytes, trainer.ranks
    if not num_bytes:
        return {}
    (alone,) = bandwidth.measure(ranks, seconds=_EXCHANGE_SECONDS, sizes=(num_bytes,))
    return {
        "exchanged_bytes_per_step": num_bytes,
        "exchanged_bytes_per_second": bandwidth.bus_bandwidth(num_bytes, step_seconds, ranks.world_size),
        "exchanged_bytes_per_second_alone": alone.bus_bytes_per_second,
    }


class _Ceiling:
    """Matrix products of the model's shapes, timed before and after the measured steps."""

    def __init__(self, job: Job, config: RunConfig, trainer: Trainer) -> None:
        self._flops = StepFlops.of_training(trainer.model)
        lengths = trainer.store.lengths
        share = lengths.mean() * min(config.training.global_batch_size, len(lengths)) / job.num_processes
        self._num_tokens = max(1, min(trainer.max_tokens, int(share)))
        self._dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else torch.float32
        self._device = trainer.ranks.device
        self._rates: list[float] = []

    def measure(self) -> None:
        """Time products for half a second."""
        self._rates += matmul_rates(
            self._flops.products,
            num_tokens=self._num_tokens,
            dtype=self._dtype,
            device=self._device,
            seconds=_CEILING_SECONDS,
        )

    def results(self, lengths: Sequence[int], seconds: float) -> Result:
        """Model FLOP/s of the measured steps beside the rate of products alone."""
        achieved = self._flops.of(lengths) / seconds
        ceiling = median(self._rates)
        return {
            "model_flops_per_second": achieved,
            "matmul_ceiling_flops_per_second": ceiling,
            "matmul_ceiling_tokens": self._num_tokens,
            "fraction_of_matmul_ceiling": achieved / ceiling,
        }


def _rendezvous(spec: Mapping[str, Any]) -> None:
    """Wait for the processes of the other jobs that are measured at the same time."""
    together, directory = spec["together"], Path(spec["directory"])
    if together == 1:
        return
    (directory / f"ready-{Path(spec['result']).stem}").touch()
    deadline = time.monotonic() + _RENDEZVOUS_SECONDS
    while len(list(directory.glob("ready-*"))) < together:
        if time.monotonic() > deadline:
            raise RuntimeError("the processes measured at the same time did not all come")
        time.sleep(0.001)
