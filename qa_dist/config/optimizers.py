"""The optimisers that `--optim` names, and everything that differs between them: a row each.

The table is in the room of the options because rooms far apart need it: `distributed` refuses what cannot be sharded,
`training` makes the optimiser, `memory` counts its moments. It imports no library: rows name classes, not hold them.
"""

import math
from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How moments are kept in 8 bits: in blocks with a float32 scale each.

    Attributes:
        block: elements that share a scale.
        least: tensors with fewer elements keep float32 moments.
        scales: names of the scales in the optimiser's state, one for each moment.
        lookups: names of what the 8 bits stand for: the same for every tensor of every run.
    """

    block: int
    least: int
    scales: tuple[str, ...]
    lookups: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """What is known of an optimiser.

    Attributes:
        module: where its class is; the package is the first word.
        class_name: its class, which takes torch's arguments of AdamW.
        moments: names of the moments in its state: tensors of the parameter's shape.
        quantisation: how moments are kept in 8 bits; None: they are float32.
        is_shardable: whether it steps a part of a tensor as it steps the whole; ZeRO and FSDP2 take no other.
        is_fused: whether a step makes no tensors of a parameter's size.
        takes_fused: whether its class can be asked to be so (`fused=True`), and to be told by numbers on the device
            how to scale the gradients and whether to step at all.
        unpaged: where the moments move to the host's memory while the GPU's is full: what to use where there is no GPU.
            None: they stay on the device.
    """

    module: str
    class_name: str
    moments: tuple[str, ...]
    quantisation: Quantisation | None = None
    is_shardable: bool
    is_fused: bool
    takes_fused: bool = False
    unpaged: OptimizerName | None = None

    @property
    def package(self) -> str:
        """The package that it comes from."""
        return self.module.partition(".")[0]

    @property
    def state(self) -> tuple[str, ...]:
        """Names of what a checkpoint holds of its state: all but what is the same in every run."""
        return (*self.moments, *(self.quantisation.scales if self.quantisation else ()), "step")

    def moment_bytes(self, num_elements: int) -> int:
        """Memory of all moments of a tensor, in bytes."""
        of_one = _FLOAT_BYTES * num_elements
        if self.quantisation is not None and num_elements >= self.quantisation.least:
            of_one = num_elements + _FLOAT_BYTES * math.ceil(num_elements / self.quantisation.block)
        return len(self.moments) * of_one


# Dettmers et al. 2022. The blocks are bitsandbytes' own; the least size is its default, and is passed on all the same.
_IN_8_BITS = Quantisation(block=256, least=4096, scales=("absmax1", "absmax2"), lookups=("qmap1", "qmap2"))

OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw": Optimizer(
        module="torch.optim",
        class_name="AdamW",
        moments=("exp_avg", "exp_avg_sq"),
        is_shardable=True,
        is_fused=False,
        takes_fused=True,
    ),
    "adamw_8bit": Optimizer(
        module="bitsandbytes.optim",
        class_name="AdamW8bit",
        moments=("state1", "state2"),
        quantisation=_IN_8_BITS,
        # A block would begin where a rank's share does.
        is_shardable=False,
        is_fused=True,
    ),
    "paged_adamw_8bit": Optimizer(
        module="bitsandbytes.optim",
        class_name="PagedAdamW8bit",
        moments=("state1", "state2"),
        quantisation=_IN_8_BITS,
        is_shardable=False,
        is_fused=True,
        unpaged="adamw_8bit",
    ),
}
