"""torch's FSDP2: every tensor is sharded along its first dimension."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from qa_dist.common.errors import ConfigError
from qa_dist.distributed.engine import MakeOptimizer, TrainableModel, collective
from qa_dist.distributed.strategies.torch_engine import TorchEngine
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.model.span_model import Weights


class FullyShard(TorchEngine):
    """FSDP2: every tensor is cut along its first dimension, and gathered layer by layer when it is needed."""

    holds_shards = True
    forward_needs_all_ranks = True

    def __init__(
        self,
        model: TrainableModel,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        *,
        watchdog: Watchdog,
        device: torch.device,
        reshard_after_forward: bool,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        module: Any = model
        for part in (*model.blocks(), module):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
        self._require_sharded(module)
        # Only now: the shards are new parameters.
        super().__init__(model, make_optimizer, max_grad_norm, watchdog=watchdog)
        self._shift_invariant = list(model.shift_invariant_biases())

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
    def _shard(parameter: Any, whole: torch.Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)

    @override
    @collective
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)
        super().backward(loss, last=last)

    @override
    @collective
    def restore(self, weights: Weights) -> None:
        from torch.distributed.fsdp import FSDPModule

        # Without `reshard_after_forward`, a forward pass that no backward pass follows leaves whole tensors gathered:
        # the next one would compute with these in the place of the new shards.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        super().restore(weights)

    @override
    def sync_gradients(self) -> None:
        # The backward pass has done it; but hooks of the whole tensors did not run on the shards.
        for name in self._shift_invariant:
            self._parameters[name].grad.zero_()
