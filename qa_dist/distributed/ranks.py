"""The processes of a run: what talks to other ranks, and the only importer of accelerate.

`Ranks` holds what a loop may ask of them. Everything that can differ between one process, several CPU processes (gloo)
and several GPUs (nccl) is decided here, so that loops read the same for all. How the ranks hold the model is the matter
of `qa_dist.distributed.strategies.choice`.
"""

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType
from torch import nn

from qa_dist.common.command import EXIT_USER_ERROR, SECONDS_FOR_RANK_0, note_exit
from qa_dist.common.errors import ConfigError, LocalTrainingError, TrainingError, UserError
from qa_dist.common.secrets import masked
from qa_dist.common.signals import Stopped
from qa_dist.distributed.launch_config import USE_VARIABLES, Request, asks_for
from qa_dist.distributed.roll_call import Member, call_the_roll, host_name
from qa_dist.distributed.strategies.choice import MakeOptimizer, Strategy, Trained, Weights, make_strategy
from qa_dist.distributed.watchdog import Watchdog

T = TypeVar("T")

_START_SECONDS = 600
"""Longest wait for ranks that have not started: what torchrun waits for its machines."""
_CONNECTION_SECONDS = 300
"""Longest wait for the first exchange between ranks that have all started."""


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
        with _meeting(timeout_seconds):
            self._accelerator = Accelerator(
                # With no GPU this makes the same launch command start gloo ranks; with one it must stay unset.
                cpu=True if not torch.cuda.is_available() else None,
                # Whatever the launcher says: `autocast` is where the precision is, `read_request` compares the two.
                mixed_precision="no",
                log_with=list(trackers) or None,
                project_dir=str(project_dir) if project_dir else None,
                kwargs_handlers=[_group_options(timeout_seconds)],
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


def launcher_name() -> str | None:
    """What tells the torchrun above this process from every other, however often it starts its ranks; None without one.

    It counts how often they failed, but not how often they started again because a machine came or went. For as long as
    it lives it keeps a folder with a random name, though, in which it tells each rank a place for an error.
    """
    folder, _, _ = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")
    return folder or None


def _group_options(timeout_seconds: int) -> InitProcessGroupKwargs:
    # Accelerate drops a value that equals its own default, 600 s, and torch may have another: hence the microsecond.
    return InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds, microseconds=1))


@contextmanager
def _meeting(timeout_seconds: int) -> Iterator[None]:
    """Let the process group be made inside: once all ranks have started, and within a bounded time.

    Raises:
        ConfigError: On every rank alike: ranks are missing, or cannot run together. On each rank that notices: it
            cannot exchange data with the others.
    """
    rank, world_size = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    described = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if world_size == 1 or not described or dist.is_initialized():
        yield
        return
    host = host_name()
    store = _store(rank, min(timeout_seconds, _START_SECONDS))
    call = call_the_roll(
        store,
        Member(rank, host, _facts()),
        world_size,
        seconds=min(timeout_seconds, _START_SECONDS),
        notice=lambda text: sys.stderr.write(f"[rank 0] {text}\n"),
    )
    seconds = min(timeout_seconds, _CONNECTION_SECONDS)

    def unreachable(reason: str) -> str:
        return (
            f"rank {rank} on {host} cannot exchange data with the other {world_size - 1} ranks ({reason}); all of them "
            "have started, so look at the network between the machines: open its ports, and name the interface in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (`qa-dist doctor` shows the address that a machine gives to "
            "others)"
        )

    def give_up() -> None:
        # The main thread is inside a library and cannot be made to raise.
        if rank:
            time.sleep(SECONDS_FOR_RANK_0)
        sys.stderr.write(f"error: {unreachable(f'nothing came back within {seconds} seconds')}\n")
        sys.stderr.flush()
        os._exit(note_exit(EXIT_USER_ERROR))

    watchdog = threading.Timer(seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        # Under a name of its own: the launcher's store keeps the addresses that an earlier group left there.
        own = dist.PrefixStore(call, store)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=timeout_seconds)
        own.set_timeout(timeout)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
        yield
    except RuntimeError as error:
        text = str(error)
        if _lost_peer(error) or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            raise
        if "Duplicate GPU" in text:
            raise ConfigError([f"{host} has fewer GPUs than processes; start one process per GPU"]) from error
        raise ConfigError([unreachable(_first_words(error))]) from error
    finally:
        watchdog.cancel()


def _facts() -> dict[str, str | None]:
    """What two processes must have in common to form a group at all."""
    cuda = torch.cuda.is_available()
    return {
        "the kind of device": "a GPU" if cuda else "the CPU",
        "the version of Python": ".".join(str(part) for part in sys.version_info[:2]),
        "the version of torch": torch.__version__.partition("+")[0],
        **({"the version of NCCL": nccl_version()} if cuda else {}),
    }


def nccl_version() -> str | None:
    """Version of NCCL that torch was built with; None without NCCL."""
    if not dist.is_nccl_available():
        return None
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(part) for part in version)


def try_backend(name: Literal["gloo", "nccl"]) -> str:
    """Start a communication library in a group of this process alone, add up a number, and say what was used.

    Raises:
        RuntimeError: It cannot be used here; the message is the library's.
    """
    if name == "nccl" and not dist.is_nccl_available():
        raise RuntimeError("this torch is built without NCCL")
    device = torch.device("cuda", 0) if name == "nccl" else torch.device("cpu")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(name, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        value = torch.ones(1, device=device)
        dist.all_reduce(value)
        if float(value) != 1:
            raise RuntimeError(f"one process added up 1 and got {float(value)}")
    finally:
        dist.destroy_process_group()
    return f"{nccl_version()} starts on {device}" if name == "nccl" else "starts"


def _store(rank: int, seconds: int) -> Any:
    """The store that ranks meet at before there is a group: the launcher's, else one that rank 0 starts.

    Raises:
        ConfigError: Nobody answers at the address that the launcher gave.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _await_port(address, port, rank, seconds)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            # A later group of this process may meet at the same port.
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise ConfigError(
            [
                f"rank {rank} on {host_name()} cannot use {address}:{port}, where ranks meet ({_first_words(error)}); "
                "take another port with the launcher's --master_port or --main_process_port"
            ]
        ) from error
    return dist.PrefixStore("qa_dist", store)  # type: ignore[attr-defined]


def _await_port(address: str, port: int, rank: int, seconds: int) -> None:
    """Come back when somebody listens there; torch's own attempt ends in pages of C++ frames."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    [
                        f"rank {rank} on {host_name()} cannot reach {address}:{port}, where ranks meet, for {seconds} "
                        f"seconds ({error}); check that the first machine runs and has that address, and that its "
                        "port is open to this one"
                    ]
                ) from error
            time.sleep(0.5)


def _first_words(error: Exception) -> str:
    """What a library's long error says first, without the place in its source; of nccl, what it calls the cause."""
    text = str(error)
    text = text.partition("Last error:")[2].strip() or text
    return re.sub(r"^\[[^\]]*\]\s*", "", text.partition("\n")[0])[:200]


def _lost_peer(error: Exception) -> bool:
    """Whether this is only the consequence of another rank's end."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("closed by peer", "reset by peer", "Broken pipe")
    )


def launched_rank() -> int:
    """Rank of this process as the launcher set it, before any process group exists; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def failures_named() -> Iterator[None]:
    """Say which rank failed, and let it fail: the launcher then ends the others.

    A rank that merely lost its peers says so in a line, so that the one traceback in the log is the culprit's. A
    `TrainingError` explains itself: all ranks raise it alike, and rank 0 prints it without a traceback, or the one rank
    that knows of it does.
    """
    rank, world_size = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        yield
    except (UserError, Stopped):
        raise
    except TrainingError as error:
        if rank == 0 or isinstance(error, LocalTrainingError):
            sys.stderr.write(f"[rank {rank} of {world_size}] the run stops: {error}\n")
        _leave(world_size)
    except Exception as error:
        if world_size == 1:
            raise
        text = str(error)
        if _lost_peer(error):
            where = "; ".join(getattr(error, "__notes__", ()))
            sys.stderr.write(f"[rank {rank}] stops: another rank has gone; {where}\n")
            _leave(world_size)
        import traceback

        text = f"[rank {rank}] failed: {type(error).__name__}: {text}\n{traceback.format_exc()}"
        sys.stderr.write(masked(text))
        _leave(world_size)


def _leave(world_size: int) -> NoReturn:
    """Exit with code 1, now if there are other ranks: destructors of the process group would wait for them."""
    note_exit(1)
    if world_size == 1:
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


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
