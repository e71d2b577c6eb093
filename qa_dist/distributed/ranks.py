"""The processes of a run: what talks to other ranks, and the only importer of accelerate.

`Ranks` holds what a loop may ask of them. Everything that can differ between one process, several CPU processes (gloo)
and several GPUs (nccl) is decided here, so that loops read the same for all. How the ranks hold the model is the matter
of `qa_dist.distributed.strategies.choice`.
"""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.common.signals import Stopped
from qa_dist.distributed.launch_config import USE_VARIABLES, Request, asks_for
from qa_dist.distributed.rendezvous import group_options, meeting
from qa_dist.distributed.strategies.base import MakeOptimizer, Strategy, Trained
from qa_dist.distributed.strategies.choice import make_strategy
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.model.span_model import Weights

T = TypeVar("T")


class Ranks:
    """This process among the processes of a run.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        device: where this process computes.
        request: how the launcher wants the model held.
    """

    def __init__(
        self,
        *,
        mixed_precision: Literal["no", "bf16", "fp16"] = "no",
        trackers: Sequence[str] = (),
        project_dir: Path | None = None,
        asked_to_stop: Callable[[], signal.Signals | None] = lambda: None,
        hang_timeout: float | None = None,
        timeout_seconds: int = 1800,
        request: Request | None = None,
    ) -> None:
        """Join the process group that the launcher describes in the environment, or be alone without one.

        Args:
            mixed_precision: Precision of the matrix products.
            trackers: Names of accelerate's trackers.
            project_dir: Where trackers write.
            asked_to_stop: The signal by which this process was asked to stop, None before.
            hang_timeout: Seconds without progress after which the process ends; None: it is not watched.
            timeout_seconds: How long a rank waits for the others in a collective operation.
            request: How the launcher wants the model held; None where nothing is trained, and every rank holds all.

        Raises:
            ConfigError: The launcher asked for what qa_dist does not do, or ranks are missing, cannot run together or
                cannot reach each other.
        """
        self._asked_to_stop = asked_to_stop
        self.watchdog = Watchdog(hang_timeout or math.inf)
        _take_over(request)
        _refuse_trackers(trackers)
        self.request = request or Request()
        self._precision = mixed_precision
        self._strategy: Strategy | None = None
        with meeting(timeout_seconds):
            self._accelerator = Accelerator(
                # With no GPU this makes the same launch command start gloo ranks; with one it must stay unset.
                cpu=True if not torch.cuda.is_available() else None,
                # Whatever the launcher says: `autocast` is where the precision is, `read_request` compares the two.
                mixed_precision="no",
                log_with=list(trackers) or None,
                project_dir=str(project_dir) if project_dir else None,
                kwargs_handlers=[group_options(timeout_seconds)],
            )
            self.rank: int = self._accelerator.process_index
            self.world_size: int = self._accelerator.num_processes
            self.device: torch.device = self._accelerator.device
            self._refuse_dropped()
            self._scaler = torch.amp.GradScaler(self.device.type) if mixed_precision == "fp16" else None
            # nccl connects only now. The figure is looked at, so that this has happened when the block ends.
            float(Ranks.sum(self, torch.ones(1, device=self.device)))

    def _refuse_dropped(self) -> None:
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world_size:
            raise ConfigError([f"the launcher started {asked} processes but {self.world_size} joined; use torchrun"])

    def use_tf32(self) -> None:
        """Let CUDA round the inputs of float32 matrix products to TF32.

        Raises:
            ConfigError: This is no CUDA device.
        """
        if self.device.type != "cuda":
            raise ConfigError([f"--tf32 is for CUDA devices and this one is {self.device.type}; drop it"])
        torch.set_float32_matmul_precision("high")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decodes, scores and writes."""
        return self.rank == 0

    @property
    def is_collective(self) -> bool:
        """Whether a forward pass needs all ranks at once, evaluation included."""
        return self._strategy is not None and self._strategy.is_collective

    @property
    def is_shared(self) -> bool:
        """Whether ranks hold the model or its optimiser in shares, so that none can do a step or save it alone."""
        return self._held.is_shared

    @property
    def _held(self) -> Strategy:
        if self._strategy is None:
            raise ValueError("no model has been prepared")
        return self._strategy

    def prepare(
        self, model: nn.Module, trained: Trained, make_optimizer: MakeOptimizer, *, max_grad_norm: float | None
    ) -> nn.Module:
        """What a forward pass calls, inside `autocast`: the model, held as the launcher asks.

        Args:
            model: The model.
            trained: The same, as a strategy sees it.
            make_optimizer: Makes the optimiser of the trainable parameters that the ranks end up with.
            max_grad_norm: Gradients are clipped to this global norm; None: they are not.
        """
        # Sharding moves the model itself, layer by layer.
        whole = self.request.strategy == "ddp"
        placed = self._accelerator.prepare_model(model, device_placement=whole, evaluation_mode=True)
        self._strategy = make_strategy(
            self.request,
            placed,
            trained,
            make_optimizer,
            max_grad_norm=max_grad_norm,
            device=self.device,
            scaler=self._scaler,
        )
        return self._strategy.module

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch to this rank's; `last` is that of the step."""
        with self._together():
            self._held.backward(loss, last=last)

    def rehearse_backward(self, loss: torch.Tensor) -> None:
        """A backward pass that takes the memory of one and leaves no gradients."""
        with self._together():
            self._held.rehearse(loss)

    def discard_gradients(self) -> None:
        """Drop this rank's gradients of a step that is given up; only where nothing is shared."""
        self._held.module.zero_grad(set_to_none=True)

    def exchange_gradients(self) -> None:
        """After the last backward pass of a step: every gradient is the mean over the ranks from here on."""
        with self.watchdog.waiting():
            self._held.exchange()

    def has_gradient(self, name: str) -> bool:
        """Whether the exchanged gradient of a trainable parameter is not zero; all ranks must ask together."""
        with self._together():
            return self._held.has_gradient(name)

    def update(self, learning_rate: float) -> float:
        """Clip, take the optimiser's step and drop the gradients; the global L2 norm of the gradients before clipping.

        Nothing is updated if the norm is not finite.
        """
        with self._together():
            return self._held.update(learning_rate)

    def weights(self) -> Weights:
        """A copy of the trainable tensors by name, whole, on the CPU of every rank; all ranks must ask together."""
        with self._together():
            return self._held.weights()

    def restore(self, weights: Weights) -> None:
        """Put the tensors of `weights` back; all ranks must do it together."""
        with self._together():
            self._held.restore(weights)

    def optimizer_tensors(self) -> Weights:
        """A copy of the optimiser's state, whole, on the CPU, as `kind/parameter`: `exp_avg/...`, `step/...`."""
        with self._together():
            return self._held.optimizer_tensors()

    def load_optimizer_tensors(self, tensors: Weights) -> None:
        """Put a state that `optimizer_tensors` returned back, whatever strategy it is from."""
        with self._together():
            self._held.load_optimizer_tensors(tensors)

    def _together(self) -> AbstractContextManager[None]:
        """Context of what a rank does alone where nothing is shared, and with all others where something is."""
        return self.watchdog.waiting() if self.is_shared else nullcontext()

    def autocast(self) -> Any:
        """Context in which matrix products run in the run's precision."""
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self._precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied with before their backward pass; None where they are not."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    def scaler_state(self) -> dict[str, float] | None:
        """Scale and growth of the loss scaling, as plain numbers; None without it."""
        return None if self._scaler is None else dict(self._scaler.state_dict())

    def load_scaler_state(self, state: Mapping[str, float] | None) -> None:
        """Put back what `scaler_state` returned."""
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(dict(state))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the ranks, on every rank."""
        if self.world_size > 1:
            with self.watchdog.waiting():
                dist.all_reduce(values)
        return values

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this process was asked to stop; other ranks may not have been."""
        return self._asked_to_stop() is not None

    def stop_if_asked(self) -> None:
        """Agree with all ranks on whether the run goes on.

        Raises:
            Stopped: On every rank, if any of them was asked to stop.
        """
        number = torch.tensor(int(self._asked_to_stop() or 0), device=self.device)
        if self.world_size > 1:
            with self.watchdog.waiting():
                dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number:
            raise Stopped(signal.Signals(int(number)))

    def minimum(self, value: int) -> int:
        """The smallest `value` of any rank, on every rank."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box)

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank in order of ranks, on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        with self.watchdog.waiting():
            dist.gather_object(value, gathered, dst=0)
        return gathered or []

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        with self.watchdog.waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let one rank of each machine do the block before the others do."""
        with self._accelerator.local_main_process_first():
            yield

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.watchdog.waiting():
            self._accelerator.wait_for_everyone()

    def start_trackers(self, project: str, config: Mapping[str, Any]) -> None:
        """Open the trackers with the run's configuration."""
        plain = {
            name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in config.items()
        }
        self._accelerator.init_trackers(project, config=plain)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send figures to the trackers."""
        self._accelerator.log(dict(values), step=step)

    def peak_memory_bytes(self) -> list[int]:
        """Most memory each rank has used so far, on rank 0: of the device on CUDA, resident in RAM elsewhere."""
        if self.device.type == "cuda":
            return self.gather(torch.cuda.max_memory_allocated(self.device))
        import resource

        # ru_maxrss counts KiB on Linux and bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return self.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def close(self) -> None:
        """Leave the process group; ranks must close together."""
        self.watchdog.stop()
        self._accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def _refuse_trackers(names: Sequence[str]) -> None:
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError([f"--report_to {name} is no tracker; use some of {', '.join(known)}"])
        if name not in available:
            raise ConfigError([f"--report_to {name} needs the package {name}, which is not installed; install it"])


def _take_over(request: Request | None) -> None:
    """Keep accelerate and transformers from acting on what `request` describes, or refuse what nothing carries out.

    Left to accelerate, DeepSpeed and FSDP are dropped on a CPU without a word; transformers loads no weights on ranks
    other than the first.
    """
    wanted = asks_for(os.environ)
    if wanted and request is None:
        raise ConfigError(
            [f"the launcher asks for {wanted}, which holds models to train; use accelerate_configs/ddp.yaml here"]
        )
    for variable in USE_VARIABLES:
        os.environ.pop(variable, None)
