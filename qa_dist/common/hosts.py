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


def slurm_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torchrun would have set, for a process that `srun` started directly; nothing for any other.

    The first machine of the step is the meeting point, at a port that follows from the job's number, so that jobs do
    not meet each other's.
    """
    size = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or not size.isdecimal() or int(size) < 2 or "SLURM_PROCID" not in environ:
        return {}
    hosts = expected_hosts(environ)
    if not hosts:
        return {}
    # Tasks per machine, as "4" or "4(x2),3"; without it the number of ranks of a machine stays unknown.
    local = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        **({"LOCAL_WORLD_SIZE": local[0]} if local else {}),
        "MASTER_ADDR": environ.get("MASTER_ADDR", hosts[0]),
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def join_slurm_step() -> None:
    """Set in the environment of this process what torchrun would have set, if `srun` started it directly."""
    os.environ.update(slurm_environment())


def _expand_range(text: str) -> list[str]:
    """The numbers of "01-03,7", with their leading zeros."""
    numbers = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        last = int(high or low)
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), last + 1)]
    return numbers
