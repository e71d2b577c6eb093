"""What this process may use, and has used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qa_dist.machine import usage


def test_cores_are_those_of_the_process_and_not_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6}, raising=False)
    assert usage.num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usage.num_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usage.num_cores() == 1


def test_the_peak_on_cuda_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + device.index)
    assert usage.peak_memory_bytes(torch.device("cuda", 1)) == 1001


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (MemoryError("out of memory"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_means_that_the_memory_of_a_gpu_is_used_up(error: Exception, is_it: bool) -> None:
    assert usage.is_out_of_memory(error) == is_it


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is resident")
def test_the_peak_of_memory_lies_between_what_is_resident_and_what_there_is() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    # The kernel adds up its counters of pages late, by less than this.
    late = 64 * page * (os.cpu_count() or 1)
    peak = usage.peak_memory_bytes(torch.device("cpu"))
    assert resident - late <= peak <= os.sysconf("SC_PHYS_PAGES") * page


_PEAKS = """
import json, types
from qa_dist.machine.usage import peak_memory_bytes
device = types.SimpleNamespace(type="cpu")
peaks = [peak_memory_bytes(device)]
held = b"x" * (128 << 20)
peaks.append(peak_memory_bytes(device))
del held
peaks.append(peak_memory_bytes(device))
print(json.dumps(peaks))
"""


def test_the_peak_on_a_cpu_is_what_this_process_held_at_most() -> None:
    # What the process had that starts this one is not its peak.
    held = b"x" * (700 << 20)
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True)
    del held
    before, during, after = json.loads(done.stdout)
    assert 64 << 20 <= during - before < 160 << 20
    # The kernel counts pages in batches.
    assert abs(after - during) < 4 << 20
    if sys.platform == "linux":
        assert after < 700 << 20
