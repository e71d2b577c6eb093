"""launch/slurm.sh on a real Slurm with two nodes, both on this machine."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import ROOT, succeed
from tests.integration.slurm_cluster import NODES, Cluster, cluster, missing_programs
from tests.integration.test_readme import COMMANDS
from tests.tiny import tiny_run

pytestmark = [pytest.mark.integration, pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: install Debian's slurm-wlm, munge and iproute2")
    if subprocess.run(["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("namespaces cannot be made here; that takes root")
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, to submit from."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("launch", "qa_dist"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def submit(slurm: Cluster, workplace: Path, *words: str, **changes: str) -> str:
    """Number of a job of launch/slurm.sh."""
    return slurm.ask(["sbatch", "--parsable", *words], workplace, **changes)


def output(workplace: Path, job: str) -> str:
    return (workplace / f"slurm-{job}.out").read_text(encoding="utf-8")


def wait_until(condition: Callable[[], bool], workplace: Path, job: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s:\n{output(workplace, job)}"
        time.sleep(0.3)


def test_a_job_on_two_nodes_that_is_stopped_and_queued_again_gives_what_one_process_gives(
    slurm: Cluster, workplace: Path
) -> None:
    words = [*tiny_run(workplace), "--num_train_epochs", "10"]
    (command,) = [shlex.split(command) for command in COMMANDS if command.startswith("sbatch ")]
    job = submit(slurm, workplace, *command[1:], *words, "--output_dir", "outputs/job", NPROC_PER_NODE="1")
    wait_until((workplace / "store").exists, workplace, job)
    # As Slurm does by itself two minutes before the time limit (--signal): every process of the job's steps gets it.
    slurm.ask(["scancel", "--signal", "USR1", job])
    ended = slurm.wait_for(job, "COMPLETED", "FAILED")
    shown = output(workplace, job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), shown
    assert "[rank 0] stopped by SIGUSR1 after step" in shown
    assert "[rank 0] resumed after step" in shown
    recipe = command[command.index("--config") : command.index("--config") + 2]
    alone = [sys.executable, "-m", "qa_dist.train", *recipe, *words, "--output_dir", "outputs/alone"]
    succeed(alone, cwd=workplace)
    outputs = workplace / "outputs"
    assert json.loads((outputs / "job" / "run.json").read_text(encoding="utf-8"))["world_size"] == 2
    for name in ("metrics.json", "predictions.json"):
        assert (outputs / "job" / name).read_bytes() == (outputs / "alone" / name).read_bytes()
    for node in NODES:
        starts = (workplace / f"slurm-{job}" / node).glob("*/attempt_0/0/stderr.log")
        assert len({path.parts[-4] for path in starts}) == 2, "a log per process of each start"


def test_the_job_ends_with_the_exit_code_of_the_run(slurm: Cluster, workplace: Path) -> None:
    words = ["launch/slurm.sh", "--num_train_epochs", "many", "--output_dir", "outputs/failed"]
    job = submit(slurm, workplace, *words, NPROC_PER_NODE="1")
    ended = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), output(workplace, job)
    assert "--num_train_epochs" in output(workplace, job)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which Slurm here does not know")
def test_gpus_that_torch_does_not_see_are_not_replaced_by_the_cpu(slurm: Cluster, workplace: Path) -> None:
    words = ["--gpus-per-node", "1", "launch/slurm.sh", "--output_dir", "outputs/gpu"]
    job = submit(slurm, workplace, *words)
    ended = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), output(workplace, job)
    assert "torch sees 0 of 1 GPUs that Slurm gave" in output(workplace, job)


# What launchers see of a training run that takes a while to write its checkpoint.
STAND_IN = """
import os, pathlib, signal, sys, time
from qa_dist.entry import note_exit
received = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
rank, folder = os.environ["RANK"], pathlib.Path(__file__).parent
(folder / f"started-{rank}").touch()
while not received:
    time.sleep(0.1)
time.sleep(3)
(folder / f"saved-{rank}").write_text(" ".join(received))
sys.exit(note_exit(85))
"""


def test_a_cancelled_run_has_time_for_its_checkpoint_and_is_not_queued_again(
    slurm: Cluster, workplace: Path, tmp_path: Path
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "${{@/#qa_dist.train/stand_in}}"\n', encoding="utf-8")
    python.chmod(0o755)
    paths = os.pathsep.join((str(ROOT), str(tmp_path)))
    words = ["--nodes", "2", "launch/slurm.sh", "--output_dir", "outputs/stopped"]
    job = submit(slurm, workplace, *words, PYTHON=str(python), PYTHONPATH=paths, NPROC_PER_NODE="1")
    wait_until(lambda: all((tmp_path / f"started-{rank}").exists() for rank in range(2)), workplace, job)
    slurm.ask(["scancel", job])
    wait_until(lambda: "cancelled or out of time" in output(workplace, job), workplace, job)
    assert [set((tmp_path / f"saved-{rank}").read_text().split()) for rank in range(2)] == [{"SIGTERM"}] * 2
    ended = slurm.wait_for(job, "CANCELLED", seconds=10)
    assert ended["Restarts"] == "0"
    assert "in the queue again" not in output(workplace, job)
