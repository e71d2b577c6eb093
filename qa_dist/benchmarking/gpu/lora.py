"""Part A: LoRA layers that are computed in groups, against peft's on the same device."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qa_dist.benchmarking.gpu.items import Failed, Figures
from qa_dist.benchmarking.gpu.scene import Scene, alone, new_model, relative_error
from qa_dist.benchmarking.measuring import synchronize
from qa_dist.model.equality import rounding
from qa_dist.model.precision import DTYPES, Precision

PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
TARGETS = ("attention", "all-linear")

STEP_LIMITS = {"no": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Greatest difference of a step's loss and of its gradient's norm, as a share: two layers, each of which rounds."""


def grouped_layers(scene: Scene) -> Figures:
    """Outputs and gradients of each layer as a group gives them and as peft does, and three steps of training."""
    figures: Figures = {}
    wrong: list[str] = []
    kinds = itertools.product(PRECISIONS, TARGETS)
    for precision, targets in scene.choose(kinds, [("bf16", "all-linear")]):
        name = f"{precision}_{targets.replace('-', '_')}"
        difference, limit = _difference(scene, precision, targets)
        steps = _difference_of_steps(scene, precision, targets)
        figures |= {f"{name}_layers": difference, f"{name}_steps": steps}
        if not (difference <= limit and steps <= STEP_LIMITS[precision]):
            wrong.append(f"{name}: layers differ by {difference:.3g}, steps by {steps:.3g}")
    if wrong:
        raise Failed("; ".join(wrong), figures)
    return figures | _products(scene)


def _products(scene: Scene) -> Figures:
    """Microseconds of the gradients of three adapters' B in BERT base: as one batched product, and one by one.

    It is the product with the longest sums, over all tokens, and the smallest results.
    """
    num_tokens, width, rank = scene.choose((5460, 768, 16), (64, 32, 8))
    dtype = torch.bfloat16
    dy_TN = torch.randn(num_tokens, 3 * width, device=scene.device).to(dtype)
    z_TS = torch.randn(num_tokens, 3 * rank, device=scene.device).to(dtype)
    dy_nTO, z_nTR = (each.view(num_tokens, 3, -1).transpose(0, 1) for each in (dy_TN, z_TS))

    def one_by_one() -> None:
        for dy_TO, z_TR in zip(dy_nTO, z_nTR, strict=True):
            torch.mm(dy_TO.t(), z_TR)

    return {
        "gradients_together_us": _device_us(scene, lambda: torch.bmm(dy_nTO.transpose(1, 2), z_nTR)),
        "gradients_one_by_one_us": _device_us(scene, one_by_one),
    }


def _device_us(scene: Scene, work: Callable[[], object]) -> float:
    """Microseconds that the device works; the host may need longer to ask for it. 0 on a CPU."""
    times = 10
    work()
    with profile(activities=[ProfilerActivity.CUDA if scene.is_cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            work()
        synchronize(scene.device)
    return float(sum(event.self_device_time_total for event in profiler.key_averages())) / times


def _config(scene: Scene, precision: str, targets: str, **options: Any) -> Any:
    return scene.config(lora_target_modules=[targets], mixed_precision=precision, **options)


def _difference(scene: Scene, precision: Precision, targets: str) -> tuple[float, float]:
    """The largest difference of a layer's outputs and gradients, and what rounding explains."""
    from qa_dist.model.casts import remove_redundant_casts
    from qa_dist.model.lora_check import difference_from_peft
    from qa_dist.model.lora_layers import GroupedAdapters, group_layers

    config = _config(scene, precision, targets)
    with alone(config) as ranks:
        model = new_model(config, ranks)
        remove_redundant_casts(model, config.model, precision, ranks.device, shards_one_type=False)
        model.to(scene.device)
        groups = group_layers(model, DTYPES.get(precision, torch.float32))
        if not groups:
            raise Failed(f"no layer can be grouped in {precision}")
        adapters = GroupedAdapters(model, groups)
        return difference_from_peft(adapters, ranks.autocast()), rounding(precision, scene.device)


def _difference_of_steps(scene: Scene, precision: str, targets: str) -> float:
    """The largest difference of a loss or of a gradient's norm over three steps, as a share."""
    found: list[torch.Tensor] = []
    for implementation in ("peft", "grouped"):
        config = _config(scene, precision, targets, lora_implementation=implementation, learning_rate=1e-3)
        # Adam would make whole steps of rounding.
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, adam_epsilon=1e-3))
        with alone(config) as ranks:
            trainer = scene.trainer(config, ranks, num_features=3 * config.training.global_batch_size)
            results = [trainer.step(step) for step in range(3)]
        found.append(torch.tensor([number for each in results for number in (each.loss, each.grad_norm)]))
    return max(relative_error(ours, theirs) for theirs, ours in zip(*found, strict=True))
