"""What `qa-dist doctor` looks at: devices, packages, communication, disks, limits and the hub, a line each.

Functions take what was found as arguments, so that every verdict can be shown without the machine it is about; the
ones called `find_...` and `try_...` look at this machine.
"""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qa_dist.machine.requirements import Requirement

GIB = 1 << 30
MIB = 1 << 20

_MIN_DISK_BYTES = 200 * MIB
"""Less cannot hold an adapter, a store of a small data set and logs."""
_ENOUGH_DISK_BYTES = 5 * GIB
"""Holds the store of SQuAD, a base-size model and a few checkpoints of its full fine-tuning."""
_ENOUGH_SHARED_BYTES = GIB
"""A container has 64 MiB unless told otherwise, which nccl exhausts with a few GPUs."""
_ENOUGH_FILES = 1024
_HUB_SECONDS = 5.0
_IMPORT_SECONDS = 180.0
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

TRY_BITSANDBYTES = """
import torch, bitsandbytes
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to(device)
assert layer.weight.dtype == torch.int8, layer.weight.dtype
values = torch.nn.Parameter(torch.ones(64, 64, device=device))
layer(values).sum().backward()
bitsandbytes.optim.AdamW8bit([values]).step()
assert values.isfinite().all() and (values != 1).any()
print("an 8-bit layer and an 8-bit optimiser compute on", device)
"""
TRY_DEEPSPEED = """
import deepspeed
print("can be imported, and takes this device:", deepspeed.accelerator.get_accelerator().device_name())
"""
TRY_BACKEND = """
from qa_dist.distributed.rendezvous import try_backend
print(try_backend({name!r}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the doctor's table: what was found, whether that will do, and what to do if not."""

    name: str
    status: Literal["ok", "warning", "failure"]
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as torch sees it; `error` is what it answered to a small sum, None if that was right."""

    name: str
    total_bytes: int
    free_bytes: int
    error: str | None = None


# ------------------------------------------------------------------------------------------------ programs and packages


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Whether this Python runs qa_dist."""
    text = ".".join(str(part) for part in version)
    if version < (3, 11):
        return Check("python", "failure", text, "install Python 3.11 or newer")
    return Check("python", "ok", text)


def packages(required: Sequence[Requirement], installed: Mapping[str, str | None]) -> list[Check]:
    """One line for all packages that are as tested, and one for each that is not.

    Optional packages that are missing are left to the checks that try them.
    """
    from packaging.version import Version

    as_tested, checks = [], []
    for item in required:
        version = installed.get(item.name)
        wanted = f"qa-dist[{item.extra}]" if item.extra else "qa-dist"
        mend = f"pip install -c constraints.txt '{wanted}'"
        if version is None:
            if item.extra is None:
                checks.append(Check(item.name, "failure", "not installed", mend))
        elif item.at_least is not None and Version(version) < Version(item.at_least):
            checks.append(Check(item.name, "failure", f"{version} is older than {item.at_least}", mend))
        elif item.tested is None or Version(Version(version).public) != Version(item.tested):
            checks.append(Check(item.name, "warning", f"{version}, tested with {item.tested}", mend))
        else:
            as_tested.append(f"{item.name} {version}")
    if as_tested:
        checks.insert(0, Check("packages", "ok", f"as tested: {', '.join(as_tested)}"))
    return checks


def optional(name: str, purpose: str, extra: str, version: str | None, attempt: Callable[[], str]) -> Check:
    """An optional package: installed, and used for something small.

    Args:
        name: The package.
        purpose: What it is for.
        extra: The part of qa_dist that installs it.
        version: Its version; None if it is not installed.
        attempt: Uses it and says how. Raises RuntimeError with the reason if it cannot be used.
    """
    if version is None:
        return Check(name, "warning", f"not installed; it is for {purpose}", f"pip install 'qa-dist[{extra}]'")
    try:
        return Check(name, "ok", f"{version}, {attempt()}")
    except RuntimeError as error:
        mend = f"reinstall it (pip install --force-reinstall --no-deps {name}) or uninstall it"
        return Check(name, "failure", f"{version} cannot be used: {error}", mend)


def try_python(code: str, *, seconds: float = _IMPORT_SECONDS) -> str:
    """The last line that a piece of Python prints, run in a process of its own: libraries may be noisy, or crash.

    Raises:
        RuntimeError: It failed; the message is the last line of its error output.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {seconds:.0f} seconds") from None
    if done.returncode:
        raise RuntimeError(last_line(done.stderr) or f"exit code {done.returncode}")
    return last_line(done.stdout)


# -------------------------------------------------------------------------------------------------------------- devices


def devices(
    gpus: Sequence[Device], *, cuda: str | None, driver: str | None, visible: str | None, num_cores: int
) -> list[Check]:
    """A line per GPU; without one, whether that is as it should be.

    Args:
        gpus: The GPUs that torch sees.
        cuda: The CUDA version that torch was built for; None: it was built without.
        driver: The version of NVIDIA's driver; None: there is none.
        visible: $CUDA_VISIBLE_DEVICES; None if unset.
        num_cores: CPU cores that this process may use.
    """
    checks = [] if driver is None else [Check("driver", "ok", f"NVIDIA {driver}; torch is built for CUDA {cuda}")]
    for index, device in enumerate(gpus):
        text = f"{device.name}, {device.free_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB free"
        if device.error is not None:
            mend = "update the driver, or install the torch that is built for this GPU and driver"
            checks.append(Check(f"GPU {index}", "failure", f"{text}; it does not compute: {device.error}", mend))
        elif device.free_bytes < device.total_bytes / 2:
            checks.append(Check(f"GPU {index}", "warning", text, "see with nvidia-smi what else uses it"))
        else:
            checks.append(Check(f"GPU {index}", "ok", text))
    if gpus:
        return checks
    if driver is None:
        return [Check("devices", "ok", f"no GPU; {num_cores} CPU cores, processes talk over gloo")]
    if visible is not None and visible.strip() in ("", "-1"):
        hidden = f"GPUs are hidden by CUDA_VISIBLE_DEVICES={visible!r}"
        return [*checks, Check("devices", "warning", hidden, "unset CUDA_VISIBLE_DEVICES")]
    if cuda is None:
        mend = "install a torch that is built for CUDA; constraints.txt pins its version"
        return [Check("devices", "failure", f"there is a driver ({driver}) but torch is built without CUDA", mend)]
    mend = "update the driver, or give the container access to the GPUs (docker run --gpus all)"
    return [*checks, Check("devices", "failure", f"torch for CUDA {cuda} sees no GPU with driver {driver}", mend)]


def find_devices() -> list[Device]:
    """Every GPU that torch sees, after a small sum on it."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        name, total, free, error = f"device {index}", 0, 0, None
        try:
            name = torch.cuda.get_device_name(index)
            free, total = torch.cuda.mem_get_info(index)
            total_of_ones = float(torch.ones(1024, device=f"cuda:{index}").sum())
            if total_of_ones != 1024:
                error = f"1024 ones add up to {total_of_ones}"
        except RuntimeError as failure:
            error = str(failure).partition("\n")[0]
        gpus.append(Device(name, total, free, error))
    return gpus


def find_driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def threads(num_cores: int, asked: str | None) -> Check:
    """Whether $OMP_NUM_THREADS fits the cores."""
    if asked is None:
        return Check("CPU threads", "ok", f"{num_cores} cores; OMP_NUM_THREADS is not set, launchers set it")
    if not asked.isdecimal() or not 1 <= int(asked) <= num_cores:
        mend = f"set OMP_NUM_THREADS to {num_cores} divided by the processes of this machine"
        return Check("CPU threads", "warning", f"OMP_NUM_THREADS={asked} with {num_cores} cores", mend)
    return Check("CPU threads", "ok", f"{num_cores} cores, OMP_NUM_THREADS={asked}")


def heap(library: Path | None, preloaded: str | None, *, has_gpu: bool) -> list[Check]:
    """Whether training on CPUs gets an allocator whose heap stays flat: none of it with a GPU, or without glibc.

    Args:
        library: jemalloc on this machine.
        preloaded: $LD_PRELOAD.
        has_gpu: Whether a run would compute on a GPU.
    """
    if has_gpu:
        return []
    if preloaded:
        return [Check("memory allocator", "ok", f"LD_PRELOAD={preloaded}")]
    grows = "glibc's heap grows for as long as a run on CPUs lasts"
    if library is None:
        mend = f"{grows}; apt install libjemalloc2, or dnf install jemalloc"
        return [Check("memory allocator", "warning", "jemalloc is not installed", mend)]
    if preloaded is not None:
        return [Check("memory allocator", "warning", "LD_PRELOAD is set to nothing", f"unset LD_PRELOAD, or {grows}")]
    return [Check("memory allocator", "ok", f"training starts with {library}")]


# -------------------------------------------------------------------------------------------------------- communication


def backend(name: str, attempt: Callable[[], str]) -> Check:
    """Whether a communication library starts here; `attempt` uses it and says how, or raises RuntimeError."""
    try:
        return Check(name, "ok", attempt())
    except RuntimeError as error:
        mend = (
            "name a network interface of this machine in GLOO_SOCKET_IFNAME, or give the machine's name an address in "
            "/etc/hosts"
            if name == "gloo"
            else "run again with NCCL_DEBUG=INFO; the driver may be too old for this NCCL"
        )
        return Check(name, "failure", f"cannot be used: {error}", mend)


def address(host: str, resolve: Callable[[str], str]) -> Check:
    """Whether other machines can reach this one under its name."""
    mend = (
        "matters for runs over several machines only: give the name an address that the others can reach (DNS, "
        "/etc/hosts), or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )
    try:
        resolved = resolve(host)
    except OSError as error:
        return Check("address", "warning", f"{host} has no address ({error})", mend)
    if resolved.startswith("127."):
        return Check("address", "warning", f"{host} is {resolved}, an address that no other machine can reach", mend)
    return Check("address", "ok", f"{host} is {resolved}")


def interfaces(names: Sequence[str], environ: Mapping[str, str]) -> list[Check]:
    """Whether the network interfaces that the environment asks for exist; no line if it asks for none."""
    checks = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if asked := environ.get(variable):
            fits = _is_there(asked, names, prefixes=variable.startswith("NCCL"))
            text = f"{asked}; this machine has {', '.join(names)}"
            mend = f"set {variable} to one of them, or unset it"
            checks.append(Check(variable, "ok", text) if fits else Check(variable, "failure", text, mend))
    return checks


def _is_there(asked: str, names: Sequence[str], *, prefixes: bool) -> bool:
    """Whether a list of interfaces names one that exists; nccl takes prefixes, =exact names and ^exclusions."""
    if prefixes and asked.startswith("^"):
        return True
    exact = not prefixes or asked.startswith("=")
    wanted = asked.removeprefix("=").split(",") if prefixes else asked.split(",")
    return any(name == word if exact else name.startswith(word) for word in wanted for name in names)


# --------------------------------------------------------------------------------------------------- disks and limits


def disk(name: str, path: Path, *, free_bytes: int, writable: bool, remedy: str) -> Check:
    """Whether a folder, or the one that it would be made in, takes what is written there."""
    text = f"{path}, {free_bytes / GIB:.1f} GiB free"
    if not writable:
        return Check(name, "failure", f"{path} cannot be written to", remedy)
    if free_bytes < _MIN_DISK_BYTES:
        return Check(name, "failure", text, f"make room, or {remedy}")
    if free_bytes < _ENOUGH_DISK_BYTES:
        return Check(name, "warning", text, f"{_ENOUGH_DISK_BYTES // GIB} GiB are enough: make room, or {remedy}")
    return Check(name, "ok", text)


def find_disk(name: str, path: Path, remedy: str) -> Check:
    """`disk` of a folder of this machine."""
    path = path.expanduser().absolute()
    # Folders of others, and names that are too long, are not there as far as this user is concerned.
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return disk(name, path, free_bytes=shutil.disk_usage(existing).free, writable=writable, remedy=remedy)


def shared_memory(total_bytes: int | None) -> Check:
    """Whether /dev/shm, through which processes of one machine exchange data, is large enough; None: there is none."""
    mend = "docker run --shm-size 8g (or --ipc host); on a machine of your own: mount -o remount,size=8g /dev/shm"
    if total_bytes is None:
        return Check("shared memory", "warning", "there is no /dev/shm", mend)
    if total_bytes < _ENOUGH_SHARED_BYTES:
        return Check("shared memory", "warning", f"/dev/shm has {total_bytes / MIB:.0f} MiB", mend)
    return Check("shared memory", "ok", f"/dev/shm has {total_bytes / GIB:.1f} GiB")


def find_shared_memory(path: Path = Path("/dev/shm")) -> int | None:
    """Size of the shared memory; None without any."""
    return shutil.disk_usage(path).total if path.is_dir() else None


def open_files(limit: int | None) -> Check:
    """Whether a process may open enough files and connections; None: without limit."""
    if limit is not None and limit < _ENOUGH_FILES:
        mend = "ulimit -n 65536, or LimitNOFILE / nofile in the limits of the service"
        return Check("open files", "warning", f"at most {limit} in a process", mend)
    return Check("open files", "ok", "no limit" if limit is None else f"at most {limit} in a process")


def locked_memory(limit_bytes: int | None, *, infiniband: bool) -> Check:
    """Whether InfiniBand may lock the memory it needs; None: without limit."""
    text = "no limit" if limit_bytes is None else f"at most {limit_bytes / MIB:.0f} MiB"
    if infiniband and limit_bytes is not None:
        mend = "ulimit -l unlimited (LimitMEMLOCK of the service, PropagateResourceLimits of Slurm)"
        return Check("locked memory", "warning", f"{text}, and there is InfiniBand", mend)
    return Check("locked memory", "ok", f"{text}; {'InfiniBand' if infiniband else 'no InfiniBand that needs it'}")


def find_limit(name: Literal["NOFILE", "MEMLOCK"]) -> int | None:
    """A limit of this process; None if there is none."""
    import resource

    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return None if soft == resource.RLIM_INFINITY else soft


def has_infiniband(folder: Path = Path("/sys/class/infiniband")) -> bool:
    """Whether this machine has an InfiniBand device."""
    return folder.is_dir() and any(folder.iterdir())


# -------------------------------------------------------------------------------------------------------------- the hub


def hub(endpoint: str, environ: Mapping[str, str], reach: Callable[[str], None]) -> Check:
    """Whether hub ids can be loaded. Being offline is no failure: everything works from local files.

    Args:
        endpoint: The hub's address.
        environ: Where the offline flags are.
        reach: Asks the address for a sign of life; raises OSError without one.
    """
    mend = "use local files and folders, or fill the cache where there is a network; then hub ids work from it"
    for flag in OFFLINE_FLAGS:
        if environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE"):
            return Check("hub", "warning", f"offline, as {flag}={environ[flag]} asks for", f"{mend}; or unset {flag}")
    try:
        reach(endpoint)
    except OSError as error:
        reason = getattr(error, "reason", error)
        return Check("hub", "warning", f"offline: {endpoint} does not answer ({reason})", mend)
    return Check("hub", "ok", f"{endpoint} answers")


def reach(url: str, *, seconds: float = _HUB_SECONDS) -> None:
    """Ask for the head of a page.

    Raises:
        OSError: No answer in time, or one that says that the server is in trouble.
    """
    outcome: list[OSError | None] = []
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "qa-dist"})
    except ValueError as error:
        raise OSError(f"{error}") from error

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            # "Forbidden" or "not found" is an answer.
            outcome.append(OSError(f"status {error.code}") if error.code >= 500 else None)
            error.close()
        except (OSError, http.client.HTTPException) as error:
            outcome.append(OSError(f"{getattr(error, 'reason', error)}"))
        else:
            outcome.append(None)

    # A thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {2 * seconds:.0f} seconds")
    if outcome[0] is not None:
        raise outcome[0]


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def temporary() -> Path:
    """Where programs put temporary files."""
    return Path(tempfile.gettempdir())


def find_interfaces() -> list[str]:
    """Names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def host_address(host: str) -> str:
    """Address of a machine's name."""
    return socket.gethostbyname(host)
