"""Part A: passes replayed as CUDA graphs - against launched ones, and what happens where one cannot be recorded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qa_dist.benchmarking.gpu.items import Failed, Figures, Skipped
from qa_dist.benchmarking.gpu.scene import Scene, alone, furthest, replaced
from qa_dist.benchmarking.gpu.steps import count_syncs
from qa_dist.config.options import RunConfig
from qa_dist.model.span_model import Weights
from qa_dist.training.graph_passes import GraphPasses
from qa_dist.training.trainer import Trainer

_NUM_STEPS = 16

_STEADY = {"learning_rate": 1e-3, "adam_epsilon": 1e-3}
"""As in `steps`: with a smaller epsilon, rounding would turn Adam's steps around."""

_DROPOUT = {"model_dropout": 0.1, "lora_dropout": 0.1}

_LIMITS = {"no": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
"""How far losses may be: replays differ from launched passes as these do from themselves, by what flash attention's
backward pass adds up in another order."""


def _steps(trainer: Trainer) -> list[float]:
    return [trainer.step(step).loss for step in range(_NUM_STEPS)]


def _run(
    scene: Scene, config: RunConfig, prepare: Callable[[Trainer], object] = lambda trainer: None
) -> tuple[list[float], Weights, dict[str, Any]]:
    """Losses of some steps of a new model, its weights after them, and how its passes were computed."""
    with alone(config) as ranks:
        trainer = scene.trainer(config, ranks, num_features=_NUM_STEPS * config.training.global_batch_size)
        prepare(trainer)
        return _steps(trainer), trainer.engine.weights(), trainer.passes.describe()


def _launch_alone(trainer: Trainer) -> None:
    """Let a trainer take the same batches and the same dropout without graphs."""
    if not isinstance(trainer.passes, GraphPasses):
        raise Failed("the run takes no CUDA graphs", {})
    trainer.passes.give_up("this run is what others are compared with")


def _furthest_loss(found: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(ours - theirs) / theirs for ours, theirs in zip(found, wanted, strict=True))


def _require_replays(figures: Figures, name: str, used: dict[str, Any]) -> None:
    figures |= {f"{name}_{key}": value for key, value in used.items()}
    if used.get("problem") or not used.get("replayed"):
        raise Failed(f"{name}: {used.get('problem', 'nothing was replayed')}", figures)


def graphs(scene: Scene) -> Figures:
    """Replayed steps against launched ones: the same dropout, several micro-batches a step, waits of the host."""
    if not scene.is_cuda:
        raise Skipped("a CPU has no CUDA graphs")
    figures: Figures = {}
    for tuning, precision in (("lora", "no"), ("lora", "bf16"), ("lora", "fp16"), ("full", "bf16")):
        name = f"{tuning}_{precision}"
        dropout = _DROPOUT if tuning == "lora" else {"model_dropout": 0.1}
        options = {"tuning": tuning, "mixed_precision": precision, "max_tokens_per_device": 2 * 384}
        config = scene.config(**options, **dropout, **_STEADY, cuda_graphs="auto")
        losses, weights, _ = _run(scene, config, _launch_alone)
        found, replayed_weights, used = _run(scene, config)
        figures[f"{name}_loss_error"] = error = _furthest_loss(found, losses)
        figures[f"{name}_weights_error"] = furthest(replayed_weights, weights)
        _require_replays(figures, name, used)
        if not error <= _LIMITS[precision]:
            raise Failed(f"{name}: losses are {error:.3g} from those of launched passes", figures)
    plain = scene.config(**_STEADY, max_tokens_per_device=2 * 384)
    losses, weights, _ = _run(scene, plain)
    found, replayed_weights, used = _run(scene, replaced(plain, cuda_graphs="auto"))
    figures["plain_loss_error"] = error = _furthest_loss(found, losses)
    figures["plain_weights_error"] = furthest(replayed_weights, weights)
    if not error <= _LIMITS["no"]:
        raise Failed(f"without dropout, losses are {error:.3g} from those without graphs", figures)
    figures["waits_per_step"] = waits = _waits(scene)
    if waits > 1:
        raise Failed(f"the host waits {waits:g} times a step", figures)
    return figures


def _waits(scene: Scene) -> float:
    """Waits of the host in steps whose passes are all replayed."""
    config = scene.config(**_DROPOUT, mixed_precision="bf16", cuda_graphs="auto", max_tokens_per_device=2 * 384)
    with alone(config) as ranks:
        trainer = scene.trainer(config, ranks, num_features=8 * config.training.global_batch_size)
        for _ in range(2):
            for step in range(8):
                trainer.step(step)
        # The last step has no other to prepare.
        return sum(count_syncs(trainer, range(7)).values()) / 7


def graphs_that_fail(scene: Scene) -> Figures:
    """A recording that fails in the middle - torch refuses, memory is short - changes nothing but a notice.

    Afterwards another run records again.
    """
    if not scene.is_cuda:
        raise Skipped("a CPU has no CUDA graphs")

    def refuse(_: Any, inputs: tuple[Any, ...]) -> None:
        if torch.cuda.is_current_stream_capturing():
            float(inputs[0].sum())

    def run_out(_: Any, inputs: tuple[Any, ...]) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory: a simulated one")

    figures: Figures = {}
    config = scene.config(**_DROPOUT, **_STEADY, cuda_graphs="auto", max_tokens_per_device=2 * 384)
    losses, _, _ = _run(scene, config, _launch_alone)
    for name, hook in (("short_of_memory", run_out), ("refused", refuse)):

        def install(trainer: Trainer, hook: Any = hook) -> None:
            trainer.model.blocks()[1].register_forward_pre_hook(hook)

        found, _, used = _run(scene, config, install)
        figures |= {f"{name}_loss_error": _furthest_loss(found, losses), f"{name}_problem": used.get("problem", "")}
        if not used.get("problem") or used["replayed"]:
            raise Failed(f"{name}: nothing failed", figures)
        if not figures[f"{name}_loss_error"] <= _LIMITS["no"]:
            raise Failed(f"{name}: losses are not those of launched passes", figures)
    found, _, used = _run(scene, config)
    figures["after_loss_error"] = _furthest_loss(found, losses)
    _require_replays(figures, "after", used)
    return figures
