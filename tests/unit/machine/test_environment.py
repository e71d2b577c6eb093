"""What a run's record says of its process."""

import os
from pathlib import Path

import pytest
import torch

from qa_dist.machine.environment import peak_memory_bytes


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is resident")
def test_the_peak_of_memory_lies_between_what_is_resident_and_what_there_is() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    # The kernel adds up its counters of pages late, by less than this.
    late = 64 * page * (os.cpu_count() or 1)
    assert resident - late <= peak_memory_bytes(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * page
