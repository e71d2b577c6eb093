"""How the ranks hold a model: all of it each, or in shares - and how its gradients are exchanged and applied.

A strategy does what differs between plain data parallelism, DeepSpeed's ZeRO and torch's FSDP2; nothing else in the
package knows them. What it takes and gives is the same for all: micro-batches with one loss each, a gradient norm from
before clipping, whole tensors by name. The mathematics is the same too - float32 weights and moments, the mean of the
ranks' gradients, torch's AdamW - so that a run may change its strategy without changing its result.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.distributed.launch_config import Request
from qa_dist.distributed.strategies.base import MakeOptimizer, Strategy, Trained
from qa_dist.distributed.strategies.data_parallel import DataParallel
from qa_dist.distributed.strategies.fsdp import FullyShard
from qa_dist.distributed.strategies.zero import Zero


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


def _require_group(request: Request, device: torch.device) -> None:
    """A process group, even of one process: sharding goes through it."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            [f"{request.strategy} needs a launcher; start with accelerate launch or torchrun, with one process or more"]
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
