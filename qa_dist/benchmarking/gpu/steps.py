"""Part A: whole optimiser steps - against the CPU, in float16, out of memory, compiled, quantised."""

import ctypes
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qa_dist.benchmarking.gpu.items import Failed, Figures, Skipped, require_installed
from qa_dist.benchmarking.gpu.scene import (
    RanksOnCpu,
    Scene,
    alone,
    furthest,
    new_model,
    replaced,
)
from qa_dist.benchmarking.measuring import synchronize
from qa_dist.config.options import RunConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.collate import FeatureBatch
from qa_dist.model.compiling import try_layers
from qa_dist.model.span_model import SpanModel, Weights
from qa_dist.training.trainer import StepResult, Trainer

MAX_SYNCS = 1
"""Waits of the host for the device in a step, however many micro-batches it has."""

_STEADY = {"learning_rate": 1e-3, "adam_epsilon": 1e-3}
"""Adam divides a gradient by its own size, so that rounding turns the step of one that is nearly zero around; not so
with an epsilon above such gradients."""


def _stepped(
    scene: Scene, config: RunConfig, *, kind: type[Ranks] = Ranks, num_steps: int = 3
) -> tuple[Weights, list[StepResult]]:
    """The weights after some steps of a new model, and what each step did."""
    with alone(config, kind) as ranks:
        trainer = scene.trainer(config, ranks, num_features=num_steps * config.training.global_batch_size)
        results = [trainer.step(step) for step in range(num_steps)]
        return trainer.engine.weights(), results


def _require(figures: Figures, limits: dict[str, float]) -> Figures:
    """The figures, if none is above its limit.

    Raises:
        Failed: One is.
    """
    wrong = [
        f"{name} is {figures[name]:.3g}, more than {limit:g}"
        for name, limit in limits.items()
        if not figures[name] <= limit
    ]
    if wrong:
        raise Failed("; ".join(wrong), figures)
    return figures


def _loss_error(found: Sequence[StepResult], wanted: Sequence[StepResult]) -> float:
    """The greatest difference of the losses of steps, relative to those wanted."""
    return max(abs(ours.loss - theirs.loss) / theirs.loss for ours, theirs in zip(found, wanted, strict=True))


def cpu_against_device(scene: Scene) -> Figures:
    """Three steps in float32: on the CPU, on the device, on the device in micro-batches, with LoRA and full."""
    figures: Figures = {}
    limits: dict[str, float] = {}
    longest = scene.choose(384, 64)
    for tuning in ("lora", "full"):
        config = scene.config(tuning=tuning, **_STEADY, max_tokens_per_device=8 * longest)
        wanted, losses = _stepped(scene, config, kind=RanksOnCpu)
        for name, changed in (("", config), ("_micro_batches", replaced(config, max_tokens_per_device=2 * longest))):
            found, results = _stepped(scene, changed)
            figures[f"{tuning}{name}_weights"] = furthest(found, wanted)
            figures[f"{tuning}{name}_loss"] = _loss_error(results, losses)
            limits |= {f"{tuning}{name}_weights": 1e-4, f"{tuning}{name}_loss": 1e-4}
    return _require(figures, limits)


def half_precision(scene: Scene) -> Figures:
    """Three steps in bf16 and in fp16 against float32: losses and the norms of gradients.

    Weights are a figure only: Adam's first steps are as long for a gradient that is mostly rounding as for any other.
    """
    figures: Figures = {}
    plain = scene.config(**_STEADY)
    wanted, losses = _stepped(scene, plain)
    for precision in ("bf16", "fp16"):
        found, results = _stepped(scene, replaced(plain, mixed_precision=precision))
        figures[f"{precision}_weights"] = furthest(found, wanted)
        figures[f"{precision}_loss"] = _loss_error(results, losses)
        figures[f"{precision}_norm"] = max(
            abs(ours.grad_norm - theirs.grad_norm) / theirs.grad_norm
            for ours, theirs in zip(results, losses, strict=True)
        )
    # 8 and 11 bits of mantissa: a rounding is 2^-9 and 2^-12 of a value, and the gradient has gone through dozens.
    return _require(figures, {"bf16_loss": 2e-2, "fp16_loss": 5e-3, "bf16_norm": 5e-2, "fp16_norm": 1e-2})


def overflow(scene: Scene) -> Figures:
    """In fp16, a step that overflows changes no weight and lowers the scale; the steps after it go on."""
    config = scene.config(mixed_precision="fp16", learning_rate=1e-3)
    with alone(config) as ranks:
        trainer = scene.trainer(config, ranks, num_features=4 * config.training.global_batch_size)
        trainer.step(0)
        state = trainer.engine.scaler_state()
        if state is None:
            raise Failed("fp16 has no loss scaling")
        trainer.engine.load_scaler_state({**state, "scale": 2.0**60})
        before, moments = trainer.engine.weights(), trainer.engine.optimizer_tensors()
        skipped = trainer.step(1)
        after, scale = trainer.engine.weights(), trainer.engine.loss_scale
        figures: Figures = {"scale": 2.0**60, "scale_after": scale, "grad_norm": skipped.grad_norm}
        if any(not torch.equal(after[name], tensor) for name, tensor in before.items()):
            raise Failed("a step that overflowed changed the weights", figures)
        again = trainer.engine.optimizer_tensors()
        if any(not torch.equal(again[name], tensor) for name, tensor in moments.items()):
            raise Failed("a step that overflowed changed the optimiser's state", figures)
        if scale is None or not scale < 2.0**60:
            raise Failed("the scale is not lower after an overflow", figures)
        trainer.engine.load_scaler_state({**state, "scale": 2.0**10})
        last = trainer.step(2)
        if not math.isfinite(last.grad_norm) or torch.equal(
            torch.cat([tensor.reshape(-1) for tensor in trainer.engine.weights().values()]),
            torch.cat([tensor.reshape(-1) for tensor in after.values()]),
        ):
            raise Failed("the step after an overflow did nothing", figures)
        return figures


# ----------------------------------------------------------------------------------------------------- out of memory


def out_of_memory(scene: Scene) -> Figures:
    """A step that does not fit is repeated in smaller micro-batches, with the same result."""
    size = scene.choose(64, 8)
    longest = scene.choose(384, 64)
    config = scene.config(global_batch_size=size, max_tokens_per_device=size * longest, **_STEADY)
    with alone(config) as ranks:
        trainer = scene.trainer(config, ranks, num_features=size)
        base = torch.cuda.memory_allocated() if scene.is_cuda else 0
        _reset_peak(scene)
        wanted = trainer.step(0)
        peak = _peak(scene)
        weights = trainer.engine.weights()
    del trainer
    notices: list[str] = []
    with alone(config) as ranks:
        model = new_model(config, ranks)
        trainer = scene.trainer(config, ranks, num_features=size, model=model, notice=notices.append)
        with _short_of_memory(scene, model, base + (peak - base) // 2, wanted.num_tokens // 2):
            found = trainer.step(0)
        figures: Figures = {"peak_bytes": peak, "budget": size * longest, "budget_after": trainer.max_tokens}
        figures["loss_error"] = abs(found.loss - wanted.loss) / wanted.loss
        figures["weights_error"] = furthest(trainer.engine.weights(), weights)
    if not notices or trainer.max_tokens >= size * longest:
        raise Failed("nothing ran out of memory", figures)
    return _require(figures, {"loss_error": 1e-4, "weights_error": 1e-4})


def out_of_memory_at_start(scene: Scene) -> Figures:
    """Where not even the passes that find out the budget fit, a run starts all the same, and its steps are right."""
    longest = scene.choose(384, 64)
    config = scene.config(global_batch_size=32, max_tokens_per_device=None)
    notices: list[str] = []
    with alone(config) as ranks:
        model = new_model(config, ranks).to(scene.device)
        # What a pass of 16 of the longest features takes is measured; a third of it is left.
        tokens = torch.zeros(16 * longest, dtype=torch.int64, device=scene.device)
        _reset_peak(scene)
        base = _peak(scene)
        start_T, end_T = model(tokens, tokens, (longest,) * 16)
        (start_T.sum() + end_T.sum()).backward()
        room = (_peak(scene) - base) // 3
        model.zero_grad(set_to_none=True)
        del start_T, end_T, tokens
        with _ballast(scene, room), _short_of_memory(scene, model, None, 5 * longest):
            trainer = scene.trainer(config, ranks, num_features=32, model=model, notice=notices.append)
            result = trainer.step(0)
        figures = {"room_bytes": room, "budget": trainer.max_tokens, "loss": result.loss, "halved": len(notices)}
    if not math.isfinite(result.loss) or not longest <= trainer.max_tokens < 16 * longest:
        raise Failed(f"the budget is {trainer.max_tokens}", figures)
    return figures


def budget(scene: Scene) -> Figures:
    """The measured token budget against the memory that full micro-batches then take."""
    if not scene.is_cuda:
        raise Skipped("on a CPU the budget is a constant")
    config = scene.config(global_batch_size=1024, max_tokens_per_device=None, tuning="full", mixed_precision="bf16")
    room = 8 * 2**30
    notices: list[str] = []
    with alone(config) as ranks, _ballast(scene, room):
        trainer = scene.trainer(config, ranks, num_features=2048, notice=notices.append)
        _reset_peak(scene)
        results = [trainer.step(step) for step in range(2)]
        peak = torch.cuda.max_memory_allocated()
        figures: Figures = {
            "budget": trainer.max_tokens,
            "step_tokens": results[0].num_tokens,
            "peak_bytes": peak,
            "fraction_of_free_memory": peak / room,
            "halved": len(notices),
        }
    if notices:
        raise Failed(f"the budget was too large: {notices[0]}", figures)
    return figures


@contextmanager
def _ballast(scene: Scene, room: int) -> Iterator[None]:
    """Fill the device until about so many bytes are free; nothing on a CPU.

    Through the driver, as another program would: what torch's allocator holds counts as memory that a run may have.
    """
    if not scene.is_cuda:
        yield
        return
    driver = ctypes.CDLL("libcuda.so.1")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(scene.device)
    place = ctypes.c_uint64()
    if code := driver.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(max(1, free - room))):
        raise RuntimeError(f"the driver gave no {free - room} bytes (error {code})")
    try:
        yield
    finally:
        driver.cuMemFree_v2(place)


@contextmanager
def _short_of_memory(scene: Scene, model: SpanModel, limit: int | None, tokens: int) -> Iterator[None]:
    """Let torch have no more than `limit` bytes of the device; on a CPU, let passes of more than `tokens` fail.

    On CUDA a `limit` of None changes nothing.
    """
    if scene.is_cuda:
        if limit is not None:
            torch.cuda.empty_cache()
            _, total = torch.cuda.mem_get_info(scene.device)
            torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(_: Any, inputs: tuple[Any, ...]) -> None:
        if len(inputs[0]) > tokens:
            raise torch.OutOfMemoryError(f"a rehearsal: {len(inputs[0])} tokens are more than {tokens}")

    handle = model.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _reset_peak(scene: Scene) -> None:
    if scene.is_cuda:
        torch.cuda.reset_peak_memory_stats()


def _peak(scene: Scene) -> int:
    return torch.cuda.max_memory_allocated() if scene.is_cuda else 0


# ------------------------------------------------------------------------------------------------- syncs and compiling


def syncs(scene: Scene) -> Figures:
    """How often the host waits for the device in a step of one micro-batch, and in one of four."""
    if not scene.is_cuda:
        raise Skipped("a CPU has nothing to wait for")
    figures: Figures = {}
    for name, share in (("one_micro_batch", 1), ("four_micro_batches", 4)):
        config = scene.config(mixed_precision="bf16", global_batch_size=32, max_tokens_per_device=32 * 384 // share)
        with alone(config) as ranks:
            trainer = scene.trainer(config, ranks, num_features=32 * 12)
            # The first steps look for weights without a gradient.
            for step in range(4):
                trainer.step(step)
            places = count_syncs(trainer, range(4, 8))
        figures[name] = sum(places.values()) / 4
        figures[f"{name}_places"] = dict(places.most_common(12))
    return _require(figures, {"one_micro_batch": MAX_SYNCS, "four_micro_batches": MAX_SYNCS})


def count_syncs(trainer: Trainer, steps: Sequence[int] | range) -> Counter[str]:
    """Where the host waited for the device during these steps, by file and line, as CUDA's sync debug mode says it."""
    synchronize(trainer.ranks.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in steps:
                trainer.step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return Counter(f"{'/'.join(warning.filename.split('/')[-3:])}:{warning.lineno}" for warning in waits)


def compiled(scene: Scene) -> Figures:
    """`--torch_compile layers`: all graphs are made at the start, serve rows of any length, and change no loss."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    config = scene.config(max_tokens_per_device=8 * 384, mixed_precision="bf16" if scene.is_cuda else "no")
    wanted, losses = _stepped(scene, config, num_steps=6)
    torch._dynamo.reset()
    counters.clear()
    compilation_time_metrics.clear()
    notices: list[str] = []
    with alone(config) as ranks:
        changed = config if scene.is_rehearsal else replaced(config, torch_compile="layers")
        model = new_model(changed, ranks)
        num_features = 6 * config.training.global_batch_size
        begin = time.perf_counter()
        trainer = scene.trainer(changed, ranks, num_features=num_features, model=model, notice=notices.append)
        figures: Figures = {"start_seconds": time.perf_counter() - begin}
        if scene.is_rehearsal:
            # Captured and not translated: that takes minutes on two cores.
            try_layers(model, "no", scene.device, backend="eager")
        figures |= {"graphs": counters["stats"]["unique_graphs"], "said": notices}
        results = [trainer.step(step) for step in range(6)]
        found = trainer.engine.weights()
        batch = trainer.inputs.micro_batches(3, trainer.max_tokens)[0].batch
        assert isinstance(batch, FeatureBatch)
        with torch.no_grad(), ranks.autocast():
            model.eval()(batch.input_ids_T, batch.token_type_ids_T, batch.lengths, batch.row)
    figures |= {
        "graphs_later": counters["stats"]["unique_graphs"] - figures["graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "loss_error": _loss_error(results, losses),
        "weights_error": furthest(found, wanted),
        "compile_seconds": compile_seconds(),
    }
    if counters["graph_break"]:
        raise Failed(f"the graph breaks: {dict(counters['graph_break'])}"[:500], figures)
    if not figures["graphs"]:
        raise Failed("nothing was compiled", figures)
    limit = 2e-2 if scene.is_cuda else 1e-4
    return _require(figures, {"graphs": 2, "graphs_later": 0, "loss_error": limit})


def compile_seconds() -> dict[str, float]:
    """Where torch.compile spent its time so far, in seconds: whole graphs, and the longest of what is inside them."""
    from torch._dynamo.utils import compilation_time_metrics

    sums = {name: round(sum(seconds), 1) for name, seconds in compilation_time_metrics.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:16])


# ---------------------------------------------------------------------------------------------------- bitsandbytes


def quantised(scene: Scene) -> Figures:
    """Bases in 4 and 8 bits: three steps whose losses are near those of the whole weights."""
    require_installed("bitsandbytes")
    precision = "bf16" if scene.is_cuda else "no"
    weights = {"model_config": None, "model_name_or_path": str(scene.small_weights()), "mixed_precision": precision}
    plain = scene.config(**weights, learning_rate=1e-3)
    _, losses = _stepped(scene, plain)
    figures: Figures = {}
    for kind in ("4bit", "8bit"):
        config = scene.config(**weights, learning_rate=1e-3, quantization=kind)
        with alone(config) as ranks:
            trainer = scene.trainer(config, ranks, num_features=3 * config.training.global_batch_size)
            before = trainer.engine.weights()
            results = [trainer.step(step) for step in range(3)]
            after = trainer.engine.weights()
        figures[f"{kind}_loss_error"] = _loss_error(results, losses)
        if not all(math.isfinite(result.grad_norm) for result in results):
            raise Failed(f"{kind}: a gradient is not finite", figures)
        if all(torch.equal(after[name], tensor) for name, tensor in before.items()):
            raise Failed(f"{kind}: nothing was trained", figures)
    return _require(figures, {"4bit_loss_error": 0.1, "8bit_loss_error": 0.1})


def small_moments(scene: Scene) -> Figures:
    """AdamW with moments in 8 bits, paged too where there is a GPU, against AdamW's own."""
    require_installed("bitsandbytes")
    plain = scene.config(tuning="full", learning_rate=1e-4, adam_epsilon=1e-6)
    wanted, losses = _stepped(scene, plain)
    figures: Figures = {}
    names = ("adamw_8bit", "paged_adamw_8bit") if scene.is_cuda else ("adamw_8bit",)
    for name in names:
        found, results = _stepped(scene, replaced(plain, optim=name))
        figures[f"{name}_loss_error"] = _loss_error(results, losses)
        figures[f"{name}_weights"] = furthest(found, wanted)
    limits = {f"{name}_loss_error": 2e-2 for name in names}
    return _require(figures, limits | {f"{name}_weights": 0.2 for name in names})
