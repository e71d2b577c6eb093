"""DeepSpeed's ZeRO: sharded optimiser state, gradients and weights."""

import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from qa_dist.common.errors import ConfigError, TrainingError
from qa_dist.common.libraries import logs_held_back, reason
from qa_dist.config.optimizers import OPTIMIZERS
from qa_dist.distributed.engine import Engine, MakeOptimizer, TrainableModel, collective
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.model.span_model import Weights

_MOMENTS = OPTIMIZERS["adamw"].moments
"""DeepSpeed finds moments by these names; every optimiser that is shardable must have them."""


_DEFAULT_BUCKET = 500_000_000


class Zero(Engine):
    """DeepSpeed's ZeRO: optimiser state (stage 1), gradients too (2) and weights too (3) are sharded.

    DeepSpeed's engine is driven directly. Accelerate would take the optimiser's step inside the backward pass.
    """

    holds_shards = True

    def __init__(
        self,
        model: TrainableModel,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        *,
        watchdog: Watchdog,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        config = _with_fitting_bucket(config, sum(weight.numel() for _, weight in model.trainable()))
        deepspeed = _import_deepspeed(device)
        self._deepspeed = deepspeed
        optimizer = make_optimizer(model.trainable())
        try:
            _tell_gpu(device, os.environ)
            with logs_held_back("DeepSpeed"):
                held: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))[0]
        except ValueError as error:
            # DeepSpeed checks its sections when it starts; its messages name the key.
            raise ConfigError(
                [f"DeepSpeed refuses its configuration ({reason(error)}); mend ds_configs/*.json"]
            ) from error
        super().__init__(held, watchdog)
        self._stage = int(config["zero_optimization"]["stage"])
        self.forward_needs_all_ranks = self._stage == 3
        self._parameters: dict[str, Any] = dict(model.trainable())
        self._require_honoured(config, max_grad_norm)
        self._require_autocast_kept(model, device)

    def _require_honoured(self, config: Mapping[str, Any], max_grad_norm: float | None) -> None:
        """Compare the engine with what was asked for.

        Raises:
            ConfigError: Something was dropped on the way.
        """
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        engine = self.module
        zero = config["zero_optimization"]
        kept = {
            "ZeRO": isinstance(engine.optimizer, ZeROOptimizer),
            f"stage {self._stage}": int(engine.zero_optimization_stage()) == self._stage,
            "gradient clipping": engine.gradient_clipping() == (max_grad_norm or 0.0),
            "float32 weights": not (engine.fp16_enabled() or engine.bfloat16_enabled()),
            "all ranks": engine.dp_world_size == (dist.get_world_size() if dist.is_initialized() else 1),
            "partitioned weights": self._stage < 3 or all(hasattr(p, "ds_id") for p in engine.module.parameters()),
            "offload of the optimiser": not _is_on_cpu(zero, "offload_optimizer") or engine.zero_use_cpu_optimizer(),
            "offload of the weights": not _is_on_cpu(zero, "offload_param") or bool(engine.zero_offload_param()),
        }
        dropped = [name for name, is_kept in kept.items() if not is_kept]
        if dropped:
            raise ConfigError(
                [f"DeepSpeed did not take over {', '.join(dropped)}; use another of ds_configs/ or ddp.yaml"]
            )

    def _require_autocast_kept(self, model: Any, device: torch.device) -> None:
        """Let the first forward pass of training fail if the engine calls the model in another autocast than its."""
        outside: list[bool] = []

        def compare(*_: object) -> None:
            # An evaluation calls the model itself.
            if outside:
                for handle in handles:
                    handle.remove()
                if torch.is_autocast_enabled(device.type) != outside[-1]:
                    raise TrainingError("DeepSpeed switches autocast off; use the tested version of DeepSpeed")

        def note(*_: object) -> None:
            outside.append(torch.is_autocast_enabled(device.type))

        handles = [self.module.register_forward_pre_hook(note), model.register_forward_pre_hook(compare)]

    @override
    @collective
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss)

    @override
    @collective
    def dry_backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed keeps gradients in buffers of its own, and drops them all in one case: a norm that is not finite.
        self.backward(loss * math.inf, last=True)
        with _silenced(logging.ERROR):
            self.module.step()
        if self.module.was_step_applied():
            raise RuntimeError("DeepSpeed applied a gradient that is not finite; use the tested version of DeepSpeed")

    @override
    def sync_gradients(self) -> None:
        # The last backward pass has done it.
        pass

    @override
    @collective
    def have_gradients(self, names: Sequence[str]) -> list[bool]:
        from deepspeed.utils import safe_get_full_grad

        gradients = [safe_get_full_grad(self._parameters[name]) for name in names]
        return [gradient is not None and bool(gradient.count_nonzero()) for gradient in gradients]

    @override
    @collective
    def optimizer_step(self, learning_rate: float, check: torch.Tensor | None = None) -> torch.Tensor:
        if check is not None and not math.isfinite(check):
            return torch.tensor(math.nan)
        for group in self.module.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm() if self.module.was_step_applied() else math.inf)

    @override
    @collective
    def weights(self) -> Weights:
        found = {}
        for name, parameter in self._parameters.items():
            with self._whole([parameter]):
                found[name] = parameter.detach().to("cpu", copy=True)
        return found

    @override
    @collective
    def restore(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                with self._whole([parameter], modifier_rank=0):
                    parameter.copy_(weights[name])
        # The optimiser steps copies of its own.
        self.module.optimizer.refresh_fp32_params()

    @override
    @collective
    def optimizer_tensors(self) -> Weights:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = list(self._base_state.values())
        if not states:
            return {}
        self._link_moments()
        found = {}
        for name, parameter in self._parameters.items():
            for kind in _MOMENTS:
                found[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).to("cpu", copy=True)
            found[f"step/{name}"] = states[0]["step"].to("cpu", copy=True)
        return found

    @override
    @collective
    def load_optimizer_tensors(self, tensors: Weights) -> None:
        if not tensors:
            return
        optimizer = self.module.optimizer
        step = next(value for key, value in tensors.items() if key.startswith("step/"))
        flats = (
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        for flat in flats:
            state = self._base_state[flat]
            if not state:
                # What AdamW makes in its first step; DeepSpeed keeps views of it from then on.
                state.update({kind: torch.zeros_like(flat) for kind in _MOMENTS})
            state["step"] = step.clone()
        self._link_moments()
        for name, parameter in self._parameters.items():
            for kind in _MOMENTS:
                self._put_moment(parameter, tensors[f"{kind}/{name}"], kind)

    def _link_moments(self) -> None:
        """Let DeepSpeed find each parameter's moments; by itself (0.19) it does so before the second group has any."""
        if self._stage < 3:
            self.module.optimizer._hp_optimizer_states_linked = False
            self.module.optimizer._lazy_init_hp_params_optimizer_state()

    def _put_moment(self, parameter: Any, whole: torch.Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, whole, kind)
            return
        # The function for whole tensors fails where they do not divide by the number of ranks.
        share = parameter.ds_tensor.numel()
        ranks = self.module.dp_world_size
        padded = nn.functional.pad(whole.reshape(-1), (0, share * ranks - whole.numel()))
        safe_set_local_optimizer_state(parameter, padded[share * dist.get_rank() :][:share], kind)

    @property
    def _base_state(self) -> Any:
        """State of torch's optimiser, by this rank's flat partitions."""
        return self.module.optimizer.optimizer.state

    def _whole(self, parameters: Sequence[nn.Parameter], modifier_rank: int | None = None) -> Any:
        """Context in which these parameters are whole on every rank; changes by the modifier are kept."""
        return self._deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=modifier_rank, enabled=self._stage == 3
        )


def _with_fitting_bucket(config: Mapping[str, Any], num_trained: int) -> dict[str, Any]:
    """The same with a bucket of at most `num_trained` elements: DeepSpeed makes it whole, however little it will hold.

    Its default is `zero_optimization.reduce_bucket_size` of 500 million (deepspeed/runtime/zero/config.py).
    """
    zero = config["zero_optimization"]
    size = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    if not isinstance(size, int | float) or size <= num_trained:
        # What is no size DeepSpeed refuses.
        return dict(config)
    return {**config, "zero_optimization": {**zero, "reduce_bucket_size": max(1, num_trained)}}


def _is_on_cpu(zero: Mapping[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device") == "cpu"


def _import_deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            [
                f"the launcher asks for DeepSpeed, which cannot be imported ({reason(error)}); pip install "
                "'qa-dist[deepspeed]'"
            ]
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On GPUs its engine (0.19) would switch off the autocast in which training calls it: with --mixed_precision bf16,
    # forward passes would compute in float32.
    deepspeed.runtime.engine.autocast_if_enabled = nullcontext
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 would rather not hear.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if device.type == "cpu":
        # DeepSpeed would compile an operator for shared memory when it starts, with whatever compiler it finds. None of
        # its operators is used: the ranks talk through gloo, and the optimiser is torch's.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


def _tell_gpu(device: torch.device, environment: MutableMapping[str, str]) -> None:
    """Let the local rank be the number of this process's GPU: DeepSpeed takes it for that, whenever it makes a tensor.

    It is another number where a process sees one GPU alone, as with `srun --gpus-per-task 1`.
    """
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if device.index is not None and name in environment:
            environment[name] = str(device.index)


@contextmanager
def _silenced(level: int) -> Iterator[None]:
    """Let DeepSpeed say nothing below this level."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
