"""The processes of a run: what talks to other ranks, and all that is asked of accelerate while a run lasts.

`Ranks` holds what a loop may ask of them. Everything that can differ between one process, several CPU processes (gloo)
and several GPUs (nccl) is decided here, so that loops read the same for all. How the ranks hold the model is the matter
of `qa_dist.distributed.engine`.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from qa_dist.common.errors import ConfigError
from qa_dist.common.signals import Stopped
from qa_dist.distributed.launch_config import USE_VARIABLES, LaunchConfig, asks_for
from qa_dist.distributed.rendezvous import group_options, meeting
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.machine.usage import peak_memory_bytes
from qa_dist.model.precision import Precision, autocast, computing, products

M = TypeVar("M")
T = TypeVar("T")


class Ranks:
    """This process among the processes of a run.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        device: where this process computes.
        mixed_precision: of the matrix products inside `autocast`.
        watchdog: ends this process if it makes no progress, once it is started.
        launch_config: how the launcher wants the model held.
    """

    def __init__(
        self,
        *,
        mixed_precision: Precision = "no",
        compiles: bool = False,
        trackers: Sequence[str] = (),
        project_dir: Path | None = None,
        asked_to_stop: Callable[[], signal.Signals | None] = lambda: None,
        hang_timeout: float | None = None,
        timeout_seconds: int = 1800,
        launch_config: LaunchConfig | None = None,
    ) -> None:
        """Join the process group that the launcher describes in the environment, or be alone without one.

        Args:
            mixed_precision: Precision of the matrix products.
            compiles: Whether forward passes may be compiled.
            trackers: Names of accelerate's trackers.
            project_dir: Where trackers write.
            asked_to_stop: The signal by which this process was asked to stop, None before.
            hang_timeout: Seconds without progress after which the process ends; None: it is not watched.
            timeout_seconds: How long a rank waits for the others in a collective operation.
            launch_config: How the launcher wants the model held; None where nothing is trained: every rank holds all.

        Raises:
            ConfigError: The launcher asked for what qa_dist does not do, or ranks are missing, cannot run together or
                cannot reach each other.
        """
        self._asked_to_stop = asked_to_stop
        self.watchdog = Watchdog(hang_timeout or math.inf)
        _take_over(launch_config)
        _refuse_trackers(trackers)
        self.launch_config = launch_config or LaunchConfig()
        self.mixed_precision = mixed_precision
        self._compiles = compiles
        with meeting(timeout_seconds):
            self._accelerator = Accelerator(
                # With no GPU this makes the same launch command start gloo ranks; with one it must stay unset.
                cpu=True if not torch.cuda.is_available() else None,
                # Whatever the launcher says, which `read_launch_config` compares: `autocast` is where the precision is.
                mixed_precision="no",
                log_with=list(trackers) or None,
                project_dir=str(project_dir) if project_dir else None,
                kwargs_handlers=[group_options(timeout_seconds)],
            )
            self.rank: int = self._accelerator.process_index
            self.world_size: int = self._accelerator.num_processes
            self.device: torch.device = self._accelerator.device
            self._refuse_dropped()
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

    def place(self, model: M) -> M:
        """The model, moved to this rank's device and left as it is otherwise."""
        # In training mode it would be wrapped, and its gradients averaged inside the last backward pass.
        placed: M = self._accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        return placed

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a forward pass, in which matrix products run in the run's precision."""
        context = autocast if self._compiles else computing
        return context(self.device.type, self.mixed_precision)

    def products(self) -> AbstractContextManager[object]:
        """Context of a backward pass, outside of which processors may be slow in the run's precision."""
        return nullcontext() if self._compiles else products(self.device.type, self.mixed_precision)

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

    def scatter(self, values: Sequence[T] | None) -> T:
        """The value for this rank of those that rank 0 has, one for each rank; None elsewhere."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        with self.watchdog.waiting():
            dist.scatter_object_list(box, None if values is None else list(values), src=0)
        own: T = box[0]
        return own

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
        is_first = self._accelerator.is_local_main_process
        if not is_first:
            self._wait_for_all()
        yield
        if is_first:
            self._wait_for_all()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.watchdog.waiting():
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        if self.world_size > 1:
            # Accelerate would name the local rank, which is no device where each process sees one GPU of its own.
            dist.barrier(device_ids=None if self.device.index is None else [self.device.index])

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
        return self.gather(peak_memory_bytes(self.device))

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


def _take_over(launch_config: LaunchConfig | None) -> None:
    """Keep accelerate and transformers from acting on what the launcher wants, or refuse what nothing carries out.

    Left to accelerate, DeepSpeed and FSDP are dropped on a CPU without a word; transformers loads no weights on ranks
    other than the first.
    """
    wanted = asks_for(os.environ)
    if wanted and launch_config is None:
        raise ConfigError(
            [f"the launcher asks for {wanted}, which holds models to train; use accelerate_configs/ddp.yaml here"]
        )
    for variable in USE_VARIABLES:
        os.environ.pop(variable, None)
