"""How the processes of a run meet: at a store, by a roll call, in a process group, within a bounded time."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs

from qa_dist.common.command import EXIT_USER_ERROR, SECONDS_FOR_RANK_0, note_exit
from qa_dist.common.errors import ConfigError
from qa_dist.common.hosts import host_name
from qa_dist.common.libraries import shortened
from qa_dist.common.secrets import masked
from qa_dist.distributed.failures import is_lost_peer, launched_rank
from qa_dist.distributed.launch_variables import require_consistent_launch
from qa_dist.distributed.roll_call import COMMAND, Member, call_the_roll
from qa_dist.distributed.slurm_step import is_task_of_srun

_START_SECONDS = 600
"""Longest wait for ranks that have not started: what torchrun waits for its machines."""

_CONNECTION_SECONDS = 300
"""Longest wait for the first exchange between ranks that have all started."""


def backend_for(device: torch.device) -> str:
    """Name of the communication between ranks that compute on such devices.

    Beside NCCL, gloo carries what is in the host's memory: torch (2.11 and 2.13) takes the CPU's for objects where a
    group has one, which would otherwise be copied through the memory of every GPU. A checkpoint is such an object.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def choose_device() -> torch.device:
    """The device of this process, made the current one: before the group, so that nothing lands on another's GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # As accelerate chooses it. With one visible GPU for each process it is 0, whatever the local rank.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def launcher_name() -> str | None:
    """What tells the torchrun above this process from every other, however often it starts its ranks; None without one.

    It counts how often they failed, but not how often they started again because a machine came or went. For as long as
    it lives it keeps a folder with a random name, though, in which it tells each rank a place for an error.
    """
    folder, _, _ = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")
    return folder or None


def group_options(timeout_seconds: int) -> InitProcessGroupKwargs:
    """How accelerate makes the process group, where it still has to."""
    # Accelerate drops a value that equals its own default, 600 s, and torch may have another: hence the microsecond.
    return InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds, microseconds=1))


@contextmanager
def meeting(timeout_seconds: int) -> Iterator[None]:
    """Let the process group be made inside: once all ranks have started, and within a bounded time.

    Raises:
        ConfigError: On every rank alike: ranks are missing, or cannot run together. On each rank that notices: it
            cannot exchange data with the others.
    """
    require_consistent_launch()
    rank, world_size = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or dist.is_initialized():
        yield
        return
    start_seconds = min(timeout_seconds, _START_SECONDS)
    store = _store(rank, start_seconds)
    call = call_the_roll(
        store,
        Member(rank, host_name(), _facts()),
        world_size,
        seconds=start_seconds,
        notice=lambda text: sys.stderr.write(f"[rank 0] {text}\n"),
    )
    with _connecting(rank, world_size, seconds=min(timeout_seconds, _CONNECTION_SECONDS)):
        # Under a name of its own: the launcher's store keeps the addresses that an earlier group left there.
        own = dist.PrefixStore(call, store)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=timeout_seconds)
        own.set_timeout(timeout)
        device = choose_device()
        dist.init_process_group(
            backend_for(device),
            store=own,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            # With it NCCL connects here, where what goes wrong is explained, and not in the first exchange.
            device_id=device if device.type == "cuda" else None,
        )
        yield


@contextmanager
def _connecting(rank: int, world_size: int, *, seconds: int) -> Iterator[None]:
    """Bound the time in which a library connects the ranks inside, and make one sentence of what it raises.

    The process ends when the time is over.

    Raises:
        ConfigError: The ranks cannot be connected.
    """
    host = host_name()

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

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if is_lost_peer(error) or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            raise
        if "Duplicate GPU" in text:
            raise ConfigError([f"{host} has fewer GPUs than processes; start one process per GPU"]) from error
        raise ConfigError([unreachable(_first_words(error))]) from error
    finally:
        timer.cancel()


def _facts() -> dict[str, Any]:
    """What two processes must have in common to form a group at all."""
    cuda = torch.cuda.is_available()
    return {
        "the kind of device": "a GPU" if cuda else "the CPU",
        "the version of Python": ".".join(str(part) for part in sys.version_info[:2]),
        "the version of torch": torch.__version__.partition("+")[0],
        **({"the version of NCCL": nccl_version()} if cuda else {}),
        # Tasks of srun may be runs of their own, each with files of its own.
        **({COMMAND: [masked(word) for word in sys.argv[1:]]} if is_task_of_srun() else {}),
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
    return shortened(re.sub(r"^\[[^\]]*\]\s*", "", text.partition("\n")[0]))
