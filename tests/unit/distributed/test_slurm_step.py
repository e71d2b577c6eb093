"""Which processes that Slurm started are ranks of a run, and which are not."""

import os
import subprocess
import sys
from typing import Any

import pytest

from qa_dist.distributed.slurm_step import is_task_of_srun, slurm_environment


def test_tasks_of_srun_become_ranks() -> None:
    task = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[5-6]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "41234",
    }
    assert slurm_environment(task) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n5",
        "MASTER_PORT": "21234",
    }
    assert slurm_environment({**task, "MASTER_ADDR": "x", "MASTER_PORT": "7"})["MASTER_ADDR"] == "x"
    assert slurm_environment({**task, "RANK": "0"}) == {}, "torchrun inside of srun"
    assert slurm_environment({**task, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}, "a batch script"
    assert slurm_environment({**task, "SLURM_STEP_ID": "2"})["MASTER_PORT"] == "21436", "two steps of a job meet apart"
    interactive, batch = str(0xFFFFFFFA), str(0xFFFFFFFB)
    assert slurm_environment({**task, "SLURM_STEP_ID": interactive}) == {}, "the shell of salloc"
    assert slurm_environment({**task, "SLURM_STEP_ID": batch}) == {}


@pytest.mark.parametrize(
    ("per_node", "here", "size"),
    [
        ("2,3", "2,3,4", "3"),
        ("2,3", "0,1", "2"),
        ("2,3", None, None),
        ("2(x2)", None, "2"),
        # What a batch script that was submitted inside of a step inherits, beside its own single task.
        ("8", "0", ...),
        ("4(x2),3", "0", ...),
    ],
)
def test_a_machine_has_the_tasks_that_slurm_names_there(per_node: str, here: str | None, size: Any) -> None:
    task = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NODELIST": "n[5-6]",
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        **({"SLURM_GTIDS": here} if here else {}),
    }
    found = slurm_environment(task)
    assert (found.get("LOCAL_WORLD_SIZE") == size) if size is not ... else (found == {})
    assert ("RANK" in found) is (size is not ...)


SHOW = "from qa_dist.distributed import slurm_step; print(sorted(slurm_step.own_slurm_environment()))"
IN_A_TERMINAL = """
import os, pty, sys
if pty.fork()[0] == 0:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(3, 1)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
os.wait()
"""


def test_what_is_started_at_a_terminal_of_srun_is_no_task() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n5", "SLURM_PROCID": "0", "SLURM_TASK_PID": "1"}
    of_task = str(sorted(slurm_environment(step)))
    environment = {**os.environ, **step}
    environment.pop("RANK", None)

    def shown(words: list[str]) -> str:
        reading, writing = os.pipe()
        at_three = f"import os, sys; os.dup2({writing}, 3); os.execv(sys.argv[1], sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-c", at_three, sys.executable, *words],
            env=environment,
            pass_fds=[writing],
            start_new_session=True,
            check=True,
        )
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            return pipe.read().strip()

    assert shown(["-c", IN_A_TERMINAL, SHOW]) == "[]"
    assert shown(["-c", f"import os; os.dup2(3, 1); {SHOW}"]) == of_task, "a script that srun started has no terminal"
    environment["SLURM_TASK_PID"] = ""
    assert shown(["-c", IN_A_TERMINAL, SHOW]) == of_task


def test_a_process_that_a_launcher_started_is_no_task_of_srun() -> None:
    joined = {"RANK": "1", "SLURM_PROCID": "1", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert is_task_of_srun(joined)
    assert not is_task_of_srun({**joined, "TORCHELASTIC_RUN_ID": "7"})
    assert not is_task_of_srun({**joined, "WORLD_SIZE": "16"})
    assert not is_task_of_srun({"RANK": "0", "WORLD_SIZE": "2"})
