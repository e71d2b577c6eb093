"""Names of machines: this one's, and those that a list of Slurm's stands for."""

import itertools
import os
import re
import socket
from collections.abc import Mapping


def host_name(environ: Mapping[str, str] = os.environ) -> str:
    """Name of this machine: the one that Slurm knows it by, else its own."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def expand_hosts(node_list: str) -> list[str]:
    """Host names of a list in Slurm's short form: "node[01-03],gpu7" is node01, node02, node03 and gpu7."""
    hosts = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        parts = [
            _expand_range(part[1:-1]) if part.startswith("[") else [part]
            for part in re.findall(r"\[[^\]]*\]|[^\[]+", entry.strip())
        ]
        hosts += ["".join(words) for words in itertools.product(*parts)]
    return hosts


def expected_hosts(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Machines that the scheduler gave to this job; none where no scheduler says."""
    return expand_hosts(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "")


def _expand_range(text: str) -> list[str]:
    """The numbers of "01-03,7", with their leading zeros."""
    numbers = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        last = int(high or low)
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), last + 1)]
    return numbers
