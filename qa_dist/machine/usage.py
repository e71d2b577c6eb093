"""What this process may use of the machine, and has used."""

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_SIGNS_OF_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    # The driver's words, which NCCL repeats: "Cuda failure 2 'out of memory'".
    "CUDA error: out of memory",
    "'out of memory'",
)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because a GPU's memory was used up: torch's, or that of a library below it.

    cuBLAS and NCCL allocate by themselves, and torch passes on what they say as a plain RuntimeError.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_OUT_OF_MEMORY)


def peak_memory_bytes(device: "torch.device") -> int:
    """Most memory this process has used so far: of the device on CUDA, resident in RAM elsewhere."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def forget_peak_memory() -> None:
    """Let the peaks of this process begin anew: of every GPU that it uses, and of its RAM where Linux can do that."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        # See proc(5). A system that has no such file, or does not let it be written, keeps the older peak.
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def peak_resident_bytes() -> int:
    """The greatest resident set that this process has had."""
    if sys.platform == "linux":
        # ru_maxrss begins with what the process had that started this one.
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    import resource

    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
