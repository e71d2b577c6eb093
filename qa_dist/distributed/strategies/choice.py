"""How the ranks hold a model: all of it each, or in shares - and how its gradients are exchanged and applied.

A strategy does what differs between plain data parallelism, DeepSpeed's ZeRO and torch's FSDP2; nothing else in the
package knows them. What it takes and gives is the same for all: micro-batches with one loss each, a gradient norm from
before clipping, whole tensors by name. The mathematics is the same too - float32 weights and moments, the mean of the
ranks' gradients, torch's AdamW - so that a run may change its strategy without changing its result.
"""

import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.distributed.launch_config import Request
from qa_dist.training.optimizer import load_optimizer_tensors, optimizer_tensors

Weights = dict[str, torch.Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")

NamedParameters = Iterable[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[NamedParameters], torch.optim.Optimizer]


class Trained(Protocol):
    """A model as a strategy sees it, beside being a module."""

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of every trainable parameter, in one order on all ranks."""

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers: what is gathered and freed at once."""

    def unmoved(self) -> list[str]:
        """Names of trainable parameters whose gradient is zero but for rounding, and must be zero."""


class Strategy(Protocol):
    """A model and its optimiser, held by all ranks together.

    Attributes:
        module: what a forward pass of training calls.
        is_collective: whether a pass through the model needs all ranks, evaluation included.
        is_shared: whether ranks hold the model or its optimiser in shares: then a step cannot be given up and repeated
            when one rank fails in the middle of it.
    """

    module: nn.Module
    is_collective: bool
    is_shared: bool

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` is that of the step."""

    def rehearse(self, loss: torch.Tensor) -> None:
        """A backward pass that takes the memory of one and leaves no gradients."""

    def exchange(self) -> None:
        """After the last backward pass: make the gradients the mean over the ranks, if they are not yet."""

    def has_gradient(self, name: str) -> bool:
        """Whether the exchanged gradient of a trainable parameter is not zero; all ranks must ask together."""

    def update(self, learning_rate: float) -> float:
        """Clip, take the optimiser's step and drop the gradients; the global L2 norm before clipping.

        Nothing is updated if the norm is not finite.
        """

    def weights(self) -> Weights:
        """A copy of the trainable tensors by name, whole, on the CPU of every rank; all ranks must ask together."""

    def restore(self, weights: Weights) -> None:
        """Put whole tensors back; all ranks must do it together."""

    def optimizer_tensors(self) -> Weights:
        """A copy of the optimiser's state, whole, on the CPU, as `kind/parameter`; all ranks must ask together."""

    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """Put such a state back, whatever strategy it is from; all ranks must do it together."""


class _TorchOptimizer:
    """What strategies share whose optimiser is torch's own, stepped here.

    They differ in how a tensor is held: `_whole` and `_share` go from a rank's share to the whole tensor and back.
    """

    def __init__(
        self, model: nn.Module, trained: Trained, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        self.module: Any = model
        self.optimizer = make_optimizer(trained.trainable())
        self._parameters: dict[str, Any] = dict(trained.trainable())
        # clip_grad_norm_ multiplies by max_norm / (norm + 1e-6), which for an infinite max_norm is clamped to 1.
        self._limit = math.inf if max_grad_norm is None else max_grad_norm

    @staticmethod
    def _whole(tensor: Any) -> torch.Tensor:
        whole: torch.Tensor = tensor
        return whole

    @staticmethod
    def _share(parameter: Any, whole: torch.Tensor) -> Any:
        return whole

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def rehearse(self, loss: torch.Tensor) -> None:
        """See `Strategy`."""
        self.backward(loss, last=True)
        self.optimizer.zero_grad(set_to_none=True)

    def has_gradient(self, name: str) -> bool:
        """See `Strategy`."""
        gradient = self._parameters[name].grad
        return gradient is not None and bool(self._whole(gradient).count_nonzero())

    def update(self, learning_rate: float) -> float:
        """See `Strategy`."""
        norm = float(self._whole(nn.utils.clip_grad_norm_(list(self._parameters.values()), self._limit)))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Weights:
        """See `Strategy`."""
        return {
            name: self._whole(parameter.detach()).to("cpu", copy=True) for name, parameter in self._parameters.items()
        }

    def restore(self, weights: Weights) -> None:
        """See `Strategy`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._share(parameter, weights[name]))

    def optimizer_tensors(self) -> Weights:
        """See `Strategy`."""
        return optimizer_tensors(self.optimizer, self._parameters.items(), whole=self._whole)

    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """See `Strategy`."""
        shares = {}
        for key, whole in tensors.items():
            parameter = self._parameters[key.partition("/")[2]]
            shares[key] = self._share(parameter, whole) if whole.shape == parameter.shape else whole
        load_optimizer_tensors(self.optimizer, self._parameters.items(), shares)


class DataParallel(_TorchOptimizer):
    """Every rank holds the whole model, and gradients are exchanged once per step.

    The model is not wrapped in DistributedDataParallel: that would exchange gradients inside the last backward pass,
    where a rank that runs out of memory leaves the others waiting. Here all ranks first agree that the step is whole.
    """

    is_collective = False
    is_shared = False

    def __init__(
        self,
        model: nn.Module,
        trained: Trained,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(model, trained, make_optimizer, max_grad_norm)
        self._scaler = scaler

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        super().backward(loss if self._scaler is None else self._scaler.scale(loss), last=last)

    def exchange(self) -> None:
        """See `Strategy`."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def update(self, learning_rate: float) -> float:
        """See `Strategy`."""
        if self._scaler is None:
            return super().update(learning_rate)
        self._scaler.unscale_(self.optimizer)
        norm = super().update(learning_rate)
        # It lowers the scale if `unscale_` has seen a gradient overflow.
        self._scaler.update()
        return norm


class FullyShard(_TorchOptimizer):
    """FSDP2: every tensor is cut along its first dimension, and gathered layer by layer when it is needed."""

    is_collective = True
    is_shared = True

    def __init__(
        self,
        model: nn.Module,
        trained: Trained,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        *,
        device: torch.device,
        reshard_after_forward: bool,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*trained.blocks(), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
        self._require_sharded(model)
        # Only now: the shards are new parameters.
        super().__init__(model, trained, make_optimizer, max_grad_norm)
        self._unmoved = trained.unmoved()

    @staticmethod
    def _require_sharded(model: nn.Module) -> None:
        from torch.distributed.tensor import DTensor

        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise ConfigError(
                [
                    f"the launcher asks for FSDP, but {len(whole)} tensors are not sharded, as {whole[0]}; use "
                    "accelerate_configs/ddp.yaml or another version of torch"
                ]
            )

    @staticmethod
    def _whole(tensor: Any) -> torch.Tensor:
        # The optimiser's step counts are plain tensors.
        whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return whole

    @staticmethod
    def _share(parameter: Any, whole: torch.Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        self.module.set_requires_gradient_sync(last)
        super().backward(loss, last=last)

    def exchange(self) -> None:
        """The backward pass has exchanged them; hooks of the whole tensors did not run on the shards."""
        for name in self._unmoved:
            self._parameters[name].grad.zero_()


class Zero:
    """DeepSpeed's ZeRO: the ranks share the optimiser's state (1), the gradients too (2), the weights too (3).

    The engine is driven directly. Accelerate would take the optimiser's step inside the backward pass.
    """

    is_shared = True

    def __init__(
        self,
        model: nn.Module,
        trained: Trained,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        *,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        self._deepspeed = deepspeed
        optimizer = make_optimizer(trained.trainable())
        try:
            self.module: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))[0]
        except ValueError as error:
            # DeepSpeed checks its sections when it starts; its messages name the key.
            first = " ".join(str(error).split())
            raise ConfigError([f"DeepSpeed refuses its configuration ({first}); mend ds_configs/*.json"]) from error
        self._stage = int(config["zero_optimization"]["stage"])
        self.is_collective = self._stage == 3
        self._parameters: dict[str, Any] = dict(trained.trainable())
        self._require_honoured(config, max_grad_norm)

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

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss)

    def rehearse(self, loss: torch.Tensor) -> None:
        """See `Strategy`.

        DeepSpeed keeps gradients in buffers of its own, and drops them all in one case: a norm that is not finite.
        """
        self.backward(loss * math.inf, last=True)
        with _silenced(logging.ERROR):
            self.module.step()
        if self.module.was_step_applied():
            raise RuntimeError("DeepSpeed applied a gradient that is not finite; use the tested version of DeepSpeed")

    def exchange(self) -> None:
        """The last backward pass has done it."""

    def has_gradient(self, name: str) -> bool:
        """See `Strategy`."""
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(self._parameters[name])
        return gradient is not None and bool(gradient.count_nonzero())

    def update(self, learning_rate: float) -> float:
        """See `Strategy`."""
        for group in self.module.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        return float(self.module.get_global_grad_norm()) if self.module.was_step_applied() else math.inf

    def weights(self) -> Weights:
        """See `Strategy`."""
        found = {}
        for name, parameter in self._parameters.items():
            with self._whole([parameter]):
                found[name] = parameter.detach().to("cpu", copy=True)
        return found

    def restore(self, weights: Weights) -> None:
        """See `Strategy`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                with self._whole([parameter], modifier_rank=0):
                    parameter.copy_(weights[name])
        # The optimiser steps copies of its own.
        self.module.optimizer.refresh_fp32_params()

    def optimizer_tensors(self) -> Weights:
        """See `Strategy`."""
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

    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """See `Strategy`."""
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


def make_strategy(
    request: Request,
    model: nn.Module,
    trained: Trained,
    make_optimizer: MakeOptimizer,
    *,
    max_grad_norm: float | None,
    device: torch.device,
    scaler: torch.amp.GradScaler | None = None,
) -> Strategy:
    """The model as the request wants it held; all ranks must call this.

    Args:
        request: What the launcher asks for.
        model: The model: on `device` for plain data parallelism, anywhere for the others.
        trained: The same model, as a strategy sees it.
        make_optimizer: Makes the optimiser of the trainable parameters that the strategy ends up with.
        max_grad_norm: Gradients are clipped to this global norm; None: they are not.
        device: Where this rank computes.
        scaler: Scales the loss for float16 gradients; only plain data parallelism takes one.

    Raises:
        ConfigError: It cannot be done, or a library dropped something on the way.
    """
    if request.strategy == "ddp":
        return DataParallel(model, trained, make_optimizer, max_grad_norm, scaler)
    _require_group(request, device)
    if request.strategy == "fsdp2":
        return FullyShard(
            model,
            trained,
            make_optimizer,
            max_grad_norm,
            device=device,
            reshard_after_forward=request.reshard_after_forward,
        )
    return Zero(model, trained, make_optimizer, max_grad_norm, config=request.deepspeed, device=device)


def _is_on_cpu(zero: Mapping[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device") == "cpu"


def _require_group(request: Request, device: torch.device) -> None:
    """A process group, even of one process: sharding goes through it."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            [f"{request.strategy} needs a launcher; start with accelerate launch or torchrun, with one process or more"]
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _import_deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            [f"the launcher asks for DeepSpeed, which cannot be imported ({error}); pip install 'qa-dist[deepspeed]'"]
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 would rather not hear.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if device.type == "cpu":
        # DeepSpeed would compile an operator for shared memory when it starts, with whatever compiler it finds. None of
        # its operators is used: the ranks talk through gloo, and the optimiser is torch's.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


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


def _buckets(tensors: Sequence[torch.Tensor], most_elements: int = 1 << 24) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype together, at most `most_elements` of them (64 MiB of float32), in the order given."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size + tensor.numel() > most_elements or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
