"""Which engine holds the model: plain data parallelism, DeepSpeed's ZeRO or torch's FSDP2."""

import os

import torch
import torch.distributed as dist

from qa_dist.common.errors import ConfigError
from qa_dist.distributed.engine import Engine, MakeOptimizer, TrainableModel
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.rendezvous import backend_for
from qa_dist.distributed.strategies.data_parallel import DataParallel
from qa_dist.distributed.strategies.fsdp import FullyShard
from qa_dist.distributed.strategies.zero import Zero


def make_engine(
    ranks: Ranks,
    model: TrainableModel,
    make_optimizer: MakeOptimizer,
    *,
    max_grad_norm: float | None,
    exchange_dtype: torch.dtype = torch.float32,
) -> Engine:
    """The model, held by the ranks as their launcher asks; all ranks must call this.

    Args:
        ranks: The ranks, and how their launcher wants the model held.
        model: The model, on any device; this moves or shards it.
        make_optimizer: Makes the optimiser of the trainable parameters that the engine ends up with.
        max_grad_norm: Gradients are clipped to this global norm; None: they are not.
        exchange_dtype: In which plain data parallelism exchanges gradients; of others it must be float32.

    Raises:
        ConfigError: It cannot be done, or a library dropped something on the way.
    """
    launch, device, watchdog = ranks.launch_config, ranks.device, ranks.watchdog
    if launch.strategy == "ddp":
        scaler = torch.amp.GradScaler(device.type) if ranks.mixed_precision == "fp16" else None
        return DataParallel(
            ranks.place(model),
            make_optimizer,
            max_grad_norm,
            watchdog=watchdog,
            scaler=scaler,
            exchange_dtype=exchange_dtype,
        )
    _require_group(launch.strategy, device)
    if launch.strategy == "fsdp2":
        return FullyShard(
            model,
            make_optimizer,
            max_grad_norm,
            watchdog=watchdog,
            device=device,
            reshard_after_forward=launch.reshard_after_forward,
        )
    return Zero(model, make_optimizer, max_grad_norm, watchdog=watchdog, config=launch.deepspeed, device=device)


def _require_group(strategy: str, device: torch.device) -> None:
    """A process group, even of one process: sharding goes through it."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            [f"{strategy} needs a launcher; start with accelerate launch or torchrun, with one process or more"]
        )
    dist.init_process_group(backend_for(device), device_id=device if device.type == "cuda" else None)
