"""Whether `srun` started this process without a launcher: then it is a rank, as torchrun would have made it one."""

import os
import re
from collections.abc import Mapping

from qa_dist.common.hosts import expected_hosts

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Steps from here on are batch scripts and interactive shells, as Slurm numbers them: one process each."""

_STEPS_APART = 101
"""How far the ports of a job's steps are from each other: jobs that follow each other have a port each."""


def slurm_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torchrun would have set, for a process that `srun` started directly; nothing for any other.

    The first machine of the step is the meeting point, at a port that follows from the numbers of the job and of the
    step, so that runs do not meet each other's.
    """
    size = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or not size.isdecimal() or int(size) < 2 or "SLURM_PROCID" not in environ:
        return {}
    hosts, step, here = expected_hosts(environ), environ.get("SLURM_STEP_ID", "0"), _tasks_here(environ)
    if not hosts or here == 0 or not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP:
        return {}
    number = int(environ.get("SLURM_JOB_ID", "0")) + _STEPS_APART * int(step)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        **({"LOCAL_WORLD_SIZE": str(here)} if here else {}),
        "MASTER_ADDR": environ.get("MASTER_ADDR", hosts[0]),
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + number % 20000)),
    }


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of the step on this machine; None: unknown; 0 where this is no task of the step that the variables name.

    A batch script that was submitted inside of a step has that step's variables beside numbers of its own.
    """
    # Tasks per machine, as "4" or "4(x2),3".
    per_host = {int(count) for count in re.findall(r"(?:^|,)(\d+)", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))}
    if "SLURM_GTIDS" not in environ:
        return per_host.pop() if len(per_host) == 1 else None
    here = len(environ["SLURM_GTIDS"].split(","))
    return here if not per_host or here in per_host else 0


def own_slurm_environment() -> dict[str, str]:
    """`slurm_environment` of this process, which is no task where it was started at a terminal that `srun` opened.

    `srun -n 4 --pty bash` gives the variables of a task of four to all that is started there, and no other task lives.
    """
    task = os.environ.get("SLURM_TASK_PID", "")
    return {} if task and task != str(os.getpid()) and _has_terminal() else slurm_environment()


def _has_terminal() -> bool:
    """Whether a terminal controls this process, wherever its streams go."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def join_slurm_step() -> None:
    """Set in the environment of this process what torchrun would have set, if `srun` started it directly."""
    os.environ.update(own_slurm_environment())


def is_task_of_srun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether it was `join_slurm_step` that made this process a rank, and no launcher did."""
    pairs = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return "TORCHELASTIC_RUN_ID" not in environ and all(
        ours in environ and environ[ours] == environ.get(theirs) for ours, theirs in pairs
    )
