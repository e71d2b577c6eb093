"""What a rank holds while it trains, by part and by strategy: arithmetic on the sizes of tensors.

A step has two moments at which memory may peak. In a *pass*, activations are there. In the *update*, they are gone and
the exchange of gradients and the optimiser need room of their own. Gradients and moments are there in both, as from the
second step of a run on, and so are gradients of an earlier micro-batch.

Legend: P bytes of the trained tensors, W ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qa_dist.config.optimizers import OPTIMIZERS, OptimizerName
from qa_dist.distributed.launch_config import GRADIENT_BUCKET, Strategy
from qa_dist.training.optimizer import is_fused

PARTS = (
    "base weights",
    "adapters and head",
    "gradients",
    "optimiser",
    "sharing",
    "activations",
    "logits",
    "workspace",
    "graphs",
    "checkpoint copies",
    "checkpoint file",
    "process",
)
"""Where memory goes; `sharing` is what a strategy needs to share: gathered layers and its buffers.

`graphs` is what CUDA graphs keep: the memory of the largest pass, beside which another pass may be launched.
"""

FLOAT = 4
"""Bytes of a float32 number: weights that train, gradients and moments are of no other kind."""

REDUCE_BUCKET = GRADIENT_BUCKET * FLOAT
"""Bytes of gradients that are reduced at once: what plain data parallelism holds twice, and DeepSpeed's buffer.

The latter is made whole; the files of ds_configs/ set it as `reduce_bucket_size`, and where all gradients together are
smaller it has their size.
"""

GATHERED = 500_000_000 * FLOAT
"""Most that ZeRO-3 keeps gathered at the end of the forward pass.

DeepSpeed frees a tensor that is not used again within `stage3_max_reuse_distance`, 10^9 elements. At the turn from
forward to backward pass each element between its two uses counts twice.
"""

PREFETCHED = 50_000_000 * FLOAT
"""Most that ZeRO-3 fetches ahead at once, DeepSpeed's `stage3_prefetch_bucket_size`.

The buffer that it comes through is kept, beside the tensors, until the last of them is used.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a model's tensors.

    Attributes:
        frozen: bytes of each frozen tensor.
        trained: elements of each trained tensor, all float32.
        new: elements of adapters and head, which are among the trained.
        largest_block: bytes of the encoder's largest layer.
        outside: bytes of what is in none of the layers.
        quantised: elements that the checkpoint has in float32 and the model in 8 or 4 bits.
    """

    frozen: tuple[int, ...]
    trained: tuple[int, ...]
    new: int
    largest_block: int
    outside: int
    quantised: int = 0

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained tensors."""
        return sum(self.trained) * FLOAT

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.frozen) + self.trained_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How and where the model is held.

    Attributes:
        strategy: how the ranks hold it.
        num_processes: W.
        device: kind of device that computes.
        cpu_offload: whether ZeRO keeps the optimiser (and with ZeRO-3 the weights) in the host's memory.
        keeps_checkpoints: whether copies of the weights and moments are taken while training goes on.
        optim: which AdamW.
        has_graphs: whether passes are replayed as CUDA graphs.
        exchanges_halves: whether plain data parallelism sends gradients in bf16, for which it keeps a copy.
    """

    strategy: Strategy
    num_processes: int
    device: Literal["cpu", "cuda"]
    cpu_offload: bool = False
    keeps_checkpoints: bool = False
    optim: OptimizerName = "adamw"
    has_graphs: bool = False
    exchanges_halves: bool = False


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes by part at one moment: on the device, and beside it in the memory of the host."""

    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def device_bytes(self) -> int:
        """Bytes of all parts on the device."""
        return sum(self.device.values())


@dataclass(frozen=True, slots=True)
class TracedPass:
    """What a pass makes at its peak, beside weights and gradients: bytes by part."""

    num_tokens: int
    made: Mapping[str, int]


def in_pass(sizes: Sizes, setup: Setup, made: Mapping[str, int]) -> MemoryUse:
    """What a rank holds when a pass peaks; `made` is what the pass itself makes."""
    use = _throughout(sizes, setup)
    return replace(use, device={**use.device, **made, **_graphs(setup, made)})


def in_update(sizes: Sizes, setup: Setup) -> MemoryUse:
    """What a rank holds when gradients are exchanged and the optimiser steps."""
    use = _throughout(sizes, setup)
    # Layers are given back after the backward pass, and FSDP2 has shared the gradients out.
    device = dict(use.device)
    if setup.strategy == "fsdp2":
        device["sharing"] = 0
        device["gradients"] = math.ceil(sizes.trained_bytes / setup.num_processes)
    elif setup.strategy == "zero3":
        device["sharing"] -= _gathered(sizes)
    device["workspace"] = _update_bytes(sizes, setup)
    return replace(use, device=device)


def at_peak(sizes: Sizes, setup: Setup, made: Mapping[str, int]) -> MemoryUse:
    """The greater of both moments."""
    update = in_update(sizes, setup)
    update = replace(update, device={**update.device, **_graphs(setup, made)})
    return max(in_pass(sizes, setup, made), update, key=lambda use: use.device_bytes)


def _graphs(setup: Setup, made: Mapping[str, int]) -> dict[str, int]:
    return {"graphs": sum(made.values())} if setup.has_graphs else {}


def made_by(passes: Sequence[TracedPass], num_tokens: int) -> dict[str, int]:
    """What a pass over so many tokens makes, by the straight lines between traced passes.

    Every tensor grows linearly with the tokens, so the peak is the largest of some lines: between two traced passes it
    lies below the line through both.
    """
    few, many = _around(passes, num_tokens)
    share = (num_tokens - few.num_tokens) / (many.num_tokens - few.num_tokens)
    return {
        part: max(0, round(few.made.get(part, 0) + share * (many.made.get(part, 0) - few.made.get(part, 0))))
        for part in {**few.made, **many.made}
    }


def largest_budget(sizes: Sizes, setup: Setup, passes: Sequence[TracedPass], available_bytes: int) -> int:
    """Tokens of the largest pass that a rank with so much memory can make; 0 if there is room for none."""
    # It imports torch, which an entry that prints its help does without.
    from qa_dist.features.token_budget import tokens_that_fit

    if in_update(sizes, setup).device_bytes > available_bytes:
        return 0
    peaks = [(traced.num_tokens, in_pass(sizes, setup, traced.made).device_bytes) for traced in passes]
    number = next((place for place, (_, peak) in enumerate(peaks) if peak > available_bytes), len(peaks) - 1)
    number = max(1, number)
    return tokens_that_fit(peaks[number - 1 : number + 1], available_bytes)


def _around(passes: Sequence[TracedPass], num_tokens: int) -> tuple[TracedPass, TracedPass]:
    """The two neighbours of a number of tokens among passes of ascending size, or the two nearest to it."""
    number = next((place for place, traced in enumerate(passes) if traced.num_tokens > num_tokens), len(passes) - 1)
    number = max(1, number)
    return passes[number - 1], passes[number]


def _throughout(sizes: Sizes, setup: Setup) -> MemoryUse:
    """What is there all the time."""
    ranks, strategy = setup.num_processes, setup.strategy
    trained = sizes.trained_bytes
    share = math.ceil(trained / ranks)
    moments = sum(OPTIMIZERS[setup.optim].moment_bytes(elements) for elements in sizes.trained)
    new = sizes.new * FLOAT
    weights = {"base weights": sizes.total_bytes - new, "adapters and head": new}
    if strategy in ("zero3", "fsdp2"):
        weights = {part: math.ceil(size / ranks) for part, size in weights.items()}
    # ZeRO's optimiser steps a copy of this rank's share of the weights.
    is_zero = strategy.startswith("zero")
    optimiser = math.ceil(moments / ranks) + share if is_zero else moments
    if strategy == "fsdp2":
        optimiser = math.ceil(moments / ranks)
    gradients = trained
    if strategy in ("zero2", "zero3"):
        # The whole gradients go from the backward pass into a bucket, and from there to the rank that owns them.
        gradients = share
    device = {**weights, "gradients": gradients, "optimiser": optimiser, "sharing": _sharing_bytes(sizes, setup)}
    host: dict[str, int] = {}
    if setup.cpu_offload:
        moved = ["optimiser"]
        if strategy in ("zero2", "zero3"):
            moved.append("gradients")
        if strategy == "zero3":
            moved += weights
        host = {part: device.pop(part) for part in moved}
    if setup.keeps_checkpoints:
        host["checkpoint copies"] = trained + moments
    if setup.device == "cpu":
        if sizes.quantised:
            # What is not quantised lies in the mapped file still, and so stay the pages that have been read.
            device["checkpoint file"] = sizes.quantised * FLOAT
        # One memory for both.
        device, host = {part: device.get(part, 0) + host.get(part, 0) for part in {**device, **host}}, {}
    return MemoryUse(device, host)


def _gathered(sizes: Sizes) -> int:
    """What ZeRO-3 has gathered when the forward pass ends, with the buffer that the last of it came through."""
    total = sizes.total_bytes
    return min(total, max(GATHERED, sizes.largest_block)) + min(total, PREFETCHED)


def _sharing_bytes(sizes: Sizes, setup: Setup) -> int:
    """Gathered layers and buffers during a pass; those of plain data parallelism are there all the time."""
    if setup.strategy == "fsdp2":
        # What is in no layer stays gathered until its gradients are there. It comes through a buffer of the same size
        # when the backward pass begins; later there are a layer at work and the buffer of the next one.
        return sizes.outside + max(sizes.outside, 2 * sizes.largest_block)
    if setup.strategy == "zero3":
        return _gathered(sizes) + _bucket(sizes)
    if setup.strategy == "zero2" or (setup.strategy == "zero1" and setup.device == "cuda"):
        # It is there until the next backward pass. ZeRO-1 fills it with gradients that it drops elsewhere.
        return _bucket(sizes)
    if setup.strategy == "ddp" and setup.exchanges_halves and setup.num_processes > 1:
        return sizes.trained_bytes // 2
    return 0


def _bucket(sizes: Sizes) -> int:
    """DeepSpeed's buffer for gradients."""
    return min(REDUCE_BUCKET, sizes.trained_bytes)


def _update_bytes(sizes: Sizes, setup: Setup) -> int:
    """What exchange and optimiser take, beside what is there all the time."""
    trained = sizes.trained_bytes
    ranks, largest = setup.num_processes, max(sizes.trained, default=0) * FLOAT
    # A tensor that is larger than a bucket goes by itself.
    reduced = min(trained, max(REDUCE_BUCKET, largest))
    if setup.strategy == "ddp":
        return max(reduced if ranks > 1 else 0, _stepping(trained, largest, setup))
    share = math.ceil(trained / ranks)
    if setup.strategy == "fsdp2":
        return _stepping(share, math.ceil(largest / ranks), setup)
    # ZeRO steps its share as one tensor, with the gradients copied beside it.
    step = share + _stepping(share, share, setup)
    if setup.strategy == "zero3":
        # It sends a copy of what is in the bucket.
        return max(step, reduced)
    return step


def _stepping(all_bytes: int, largest: int, setup: Setup) -> int:
    """What torch's AdamW makes while it steps: on CUDA the roots of all second moments at once, where it is not fused.

    On a CPU it goes tensor by tensor, with the root and the root over its correction. bitsandbytes' makes nothing.
    """
    if is_fused(setup.optim, setup.strategy, setup.device):
        return 0
    return all_bytes if setup.device == "cuda" else 2 * largest
