"""Part B: how fast qa_dist trains, and transformers' `Trainer` beside it, on a model of BERT base's size."""

import time
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qa_dist.benchmarking import hugging_face
from qa_dist.benchmarking.flops import StepFlops
from qa_dist.benchmarking.gpu.items import Figures, Skipped
from qa_dist.benchmarking.gpu.numerics import PEAK_BF16, product_rate
from qa_dist.benchmarking.gpu.scene import Scene, alone
from qa_dist.benchmarking.gpu.steps import compile_seconds, count_syncs
from qa_dist.benchmarking.job import Job
from qa_dist.benchmarking.measuring import synchronize
from qa_dist.benchmarking.settings import MODEL_DROPOUT, NO_DROPOUT
from qa_dist.config.options import RunConfig
from qa_dist.distributed.sharing import forget_accelerate
from qa_dist.machine.usage import peak_memory_bytes
from qa_dist.training.trainer import Trainer

SQUAD_FEATURES = 88_524
"""Features of SQuAD v1.1 train at 384/128 with BERT's tokenizer."""

TUNINGS: Mapping[str, Mapping[str, Any]] = {
    "q, v": {"tuning": "lora", "lora_r": 8, "lora_target_modules": ["attention"]},
    "all-linear": {"tuning": "lora", "lora_r": 16, "lora_target_modules": ["all-linear"]},
    "full": {"tuning": "full"},
}
"""What is trained, by the names in the results."""

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_PROFILED_STEPS = 4
_WARMUP_STEPS = 8


def _config(scene: Scene, tuning: str, batch_size: int, *, dropout: bool, **options: Any) -> RunConfig:
    named = {} if scene.is_rehearsal else {"model_config": "bert-base"}
    values = {**named, **TUNINGS[tuning], **(MODEL_DROPOUT if dropout else NO_DROPOUT)}
    values |= {"global_batch_size": batch_size, "mixed_precision": "bf16", "learning_rate": 1e-5, **options}
    return scene.config(**values)


def train(scene: Scene, tuning: str, batch_size: int, *, dropout: bool = True, **options: Any) -> Figures:
    """Steps of qa_dist's training loop: rates, fractions, what the profiler counts."""
    batch_size = scene.choose(batch_size, max(2, batch_size // 32))
    config = _config(scene, tuning, batch_size, dropout=dropout, **options)
    most = 60 if config.training.cuda_graphs == "auto" else 120
    num_steps = scene.choose(max(30, min(most, 6000 // batch_size)), 2)
    warmup = scene.choose(_WARMUP_STEPS, 1)
    with alone(config) as ranks:
        begin, notices = time.perf_counter(), list[str]()
        trainer = scene.trainer(config, ranks, num_features=(num_steps + warmup) * batch_size, notice=notices.append)
        start_seconds = time.perf_counter() - begin
        for step in range(warmup):
            trainer.step(step)
        if trainer.passes.takes_buckets:
            # Every pass is launched once, and recorded when it comes again: what is timed is what a long run does.
            for step in 2 * [*range(warmup, warmup + num_steps)]:
                trainer.step(step)
        figures = _timed(trainer, range(warmup, warmup + num_steps), _rate(scene))
        figures |= {"budget": trainer.max_tokens, "start_seconds": start_seconds, "said": notices}
        if config.training.torch_compile == "layers":
            figures["compile_seconds"] = compile_seconds()
        figures |= trainer.passes.describe()
        if scene.is_cuda and trainer.passes.takes_buckets:
            # What graphs keep counts as free between their replays.
            figures["peak_memory_bytes"] = torch.cuda.max_memory_reserved()
        figures |= _profiled(scene, trainer, warmup)
    return figures


def epoch(scene: Scene) -> Figures:
    """A whole epoch of features with SQuAD's lengths: LoRA on query and value, a batch of 32."""
    config = _config(scene, "q, v", scene.choose(32, 4), dropout=True, cuda_graphs="auto")
    with alone(config) as ranks:
        trainer = scene.trainer(config, ranks, num_features=scene.choose(SQUAD_FEATURES, 12))
        trainer.step(0)
        return _timed(trainer, range(trainer.steps_per_epoch), _rate(scene))


def _timed(trainer: Trainer, steps: range, product: float) -> Figures:
    """Rates of these steps; each feature is in one of them."""
    device = trainer.ranks.device
    flops = StepFlops.of_training(trainer.model)
    trainer.engine.zero_grad()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    results = []
    ends = [time.perf_counter()]
    for step in steps:
        results.append(trainer.step(step))
        ends.append(time.perf_counter())
    synchronize(device)
    ends[-1] = time.perf_counter()
    seconds = [end - begin for begin, end in pairwise(ends)]
    total, num_tokens = sum(seconds), sum(result.num_tokens for result in results)
    # Lengths of a few thousand features hardly differ from those of all: the operations of pairs are few.
    lengths = trainer.store.lengths
    achieved = flops.of(lengths.tolist()) / float(lengths.sum()) * num_tokens / total
    return {
        "steps": len(results),
        "seconds": total,
        "features_per_second": sum(result.num_features for result in results) / total,
        "tokens_per_second": num_tokens / total,
        "tokens_per_step": num_tokens / len(results),
        "ms_per_step": 1e3 * total / len(results),
        "median_ms_per_step": 1e3 * median(seconds),
        "slowest_tenth_ms": 1e3 * (quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]),
        "model_flops_per_second": achieved,
        "fraction_of_measured_products": achieved / product,
        "fraction_of_989": achieved / PEAK_BF16,
        "peak_memory_bytes": peak_memory_bytes(device),
        "loss": results[-1].loss,
    }


@lru_cache(maxsize=1)
def _rate(scene: Scene) -> float:
    """Operations per second of large products in bf16 on this device."""
    return product_rate(scene, torch.bfloat16, scene.choose(8192, 128))


def _profiled(scene: Scene, trainer: Trainer, first: int) -> Figures:
    """Launches, waits and time on the device of a step, from the profiler; the ten kernels that take longest."""
    steps = range(first, first + (_PROFILED_STEPS if scene.is_cuda else 1))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if scene.is_cuda else [])]
    with profile(activities=activities) as profiler:
        for step in steps:
            trainer.step(step)
        synchronize(scene.device)
    events = profiler.key_averages()
    count, number = len(steps), {event.key: event.count for event in events}
    if not scene.is_cuda:
        return {"operators_per_step": sum(n for name, n in number.items() if name.startswith("aten::")) / count}
    kernels = [event for event in events if event.self_device_time_total > 0 and event.self_cpu_time_total == 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {
        "launches_per_step": sum(number.get(name, 0) for name in _LAUNCHES) / count,
        # The last one is this function's.
        "waits_per_step": (sum(number.get(name, 0) for name in _WAITS) - 1) / count,
        "copies_per_step": number.get("cudaMemcpyAsync", 0) / count,
        "syncs_per_step": sum(count_syncs(trainer, steps).values()) / count,
        "device_ms_per_step": sum(event.self_device_time_total for event in kernels) / count / 1e3,
        "kernels": [
            {
                "name": event.key[:120],
                "ms_per_step": event.self_device_time_total / count / 1e3,
                "per_step": event.count / count,
            }
            for event in kernels[:10]
        ],
    }


def hugging_face_trainer(
    scene: Scene, tuning: str, batch_size: int, *, precision: str = "bf16", **setup: Any
) -> Figures:
    """The `Trainer` of transformers on the same features; see `qa_dist.benchmarking.hugging_face`."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise Skipped("datasets is not installed") from error
    batch_size = scene.choose(batch_size, 2)
    num_steps = scene.choose(30 if precision == "no" else 60, 2)
    config = _config(scene, tuning, batch_size, dropout=True, mixed_precision=precision)
    job = Job(
        kind="train_hugging_face",
        options={},
        num_features=num_steps * batch_size,
        warmup_steps=scene.choose(5, 1),
        trainer=setup,
    )
    forget_accelerate()
    try:
        result = hugging_face.train(job, config)
    finally:
        forget_accelerate()
    del result["step_seconds"], result["peak_memory_bytes_per_rank"]
    result["median_ms_per_step"] = 1e3 * result.pop("median_step_seconds")
    result["ms_per_step"] = 1e3 * result["seconds"] / num_steps
    return result
