"""launch/slurm.sh on a real Slurm with two nodes, both on this machine."""

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.sweep import SweepConfig
from qa_dist.sweeping.jobs import SlurmJobs
from qa_dist.sweeping.plan import read_plan
from qa_dist.sweeping.record import read_record
from qa_dist.sweeping.running import run_sweep
from tests.distributed.launching import ROOT, await_held, held, stand_in, succeed
from tests.integration.slurm_cluster import NODES, Cluster, cluster, missing_programs
from tests.integration.test_readme import COMMANDS
from tests.support import forked_python
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


def run_seconds(slurm: Cluster, job: str) -> int:
    """How long a job has been running since its last start."""
    hours, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def set_time_limit(slurm: Cluster, job: str, minutes: int) -> None:
    slurm.ask(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"])


def wait_until(condition: Callable[[], bool], workplace: Path, job: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s:\n{output(workplace, job)}"
        # Minutes pass, and a question to Slurm takes a tenth of a second of a processor.
        time.sleep(1)


class Jobs:
    """Jobs of the command that the README shows, on two nodes, and the run of one process that they must equal."""

    def __init__(self, slurm: Cluster, workplace: Path) -> None:
        self._slurm = slurm
        self._workplace = workplace
        words = [*tiny_run(workplace), "--num_train_epochs", "10", "--global_batch_size", "8"]
        (command,) = [shlex.split(command) for command in COMMANDS if command.startswith("sbatch ")]
        script = command.index("launch/slurm.sh")
        assert command[1:script] == ["--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "64"]
        # The nodes here have no GPUs, and fewer cores.
        self._command = ["sbatch", "--nodes", "2", *command[script:], *words]
        recipe = command[command.index("--config") : command.index("--config") + 2]
        self.words = [*recipe, *words]
        alone = [*self.words, "--output_dir", str(workplace / "outputs" / "alone")]
        succeed([forked_python.program("python"), "-m", "qa_dist.train", *alone], **forked_python.variables())

    def submit(self, folder: Path, options: Sequence[str] = (), *, held_before: Sequence[int]) -> str:
        """Number of a job that writes to outputs/<folder's name>, and that its ranks hold before these steps."""
        words = [*options, *self._command[1:], "--output_dir", f"outputs/{folder.name}"]
        variables = held(folder, *held_before)
        return submit(self._slurm, self._workplace, *words, NPROC_PER_NODE="1", **variables)

    def await_held(self, job: str, folder: Path, step: int) -> None:
        """Come back when both ranks are held before a step."""
        await_held(folder, step, range(2), lambda: output(self._workplace, job))

    def assert_ends_as_alone(self, job: str, folder: Path) -> list[int]:
        """The steps that a job went on from until it ended with the result of the uninterrupted run."""
        ended = self._slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        shown = output(self._workplace, job)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), shown
        resumed_at_steps: list[int] = self.assert_equals_alone(folder.name)["resumed_at_steps"]
        # A start that was stopped before its first step has left no trace there.
        assert 1 <= len(resumed_at_steps) <= int(ended["Restarts"]), shown
        return resumed_at_steps

    def assert_equals_alone(self, name: str) -> dict[str, Any]:
        """run.json of a run of two ranks that ended with the result of the uninterrupted run."""
        outputs = self._workplace / "outputs"
        for file in ("metrics.json", "predictions.json"):
            assert (outputs / name / file).read_bytes() == (outputs / "alone" / file).read_bytes()
        record: dict[str, Any] = json.loads((outputs / name / "run.json").read_text(encoding="utf-8"))
        assert record["world_size"] == 2
        return record


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, workplace: Path) -> Jobs:
    return Jobs(slurm, workplace)


def test_a_job_on_two_nodes_goes_on_after_its_time_limit_a_requeue_and_a_lost_node_as_one_process_would(
    jobs: Jobs, slurm: Cluster, workplace: Path, tmp_path: Path
) -> None:
    job = jobs.submit(tmp_path, ["--time", "30"], held_before=[8, 12, 16])
    jobs.await_held(job, tmp_path, 8)
    # 90 to 150 seconds from now, which are less than the two minutes before which Slurm, looking twice a minute, sends
    # the signal. The limit is set only now, and back again later, so that a slow start does not take the time.
    set_time_limit(slurm, job, (run_seconds(slurm, job) + 90) // 60 + 1)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", workplace, job)
    set_time_limit(slurm, job, 30)
    jobs.await_held(job, tmp_path, 12)
    slurm.ask(["scontrol", "requeue", job])
    jobs.await_held(job, tmp_path, 16)
    slurm.kill_slurmd("n2")
    slurm.wait_for(job, "PENDING", seconds=240)
    (tmp_path / "open-16").touch()
    slurm.start_slurmd("n2")
    assert jobs.assert_ends_as_alone(job, tmp_path) == [9, 13, 16]
    shown = output(workplace, job)
    assert "[rank 0] stopped by SIGUSR1 after step 9" in shown
    assert "a checkpoint is written; the job is in the queue again" in shown
    assert "stopped by SIGTERM after step 13" in shown
    for node in NODES:
        starts = (workplace / f"slurm-{job}" / node).glob("*/attempt_0/0/stderr.log")
        assert len({path.parts[-4] for path in starts}) >= 4, "a log per process of each start"


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


def test_a_trial_of_a_sweep_is_a_job_of_two_ranks(
    slurm: Cluster, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", forked_python.program("python"))
    file = tmp_path / "rates.yaml"
    file.write_text("grid: {learning_rate: [1e-3]}", encoding="utf-8")
    plan = read_plan(file, [*tiny_run(tmp_path), "--output_dir", str(tmp_path / "rates")], SweepConfig)

    def call(words: Sequence[str], variables: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        return slurm.run(words, workplace, **variables, NPROC_PER_NODE="1")

    said: list[str] = []
    jobs = SlurmJobs(4, ["--nodes", "2"], call=call, poll_seconds=0.5)
    assert run_sweep(plan, jobs, tmp_path / "sweep.json", notice=said.append), said
    log = (plan.trials[0].folder / "log.txt").read_text(encoding="utf-8")
    record: Any = read_record(plan.trials[0])
    assert (record["status"], record["starts"], record["world_size"]) == ("done", 1, 2), log
    metrics = json.loads((plan.trials[0].folder / "metrics.json").read_text(encoding="utf-8"))
    assert record["final"]["f1"] == metrics["f1"]
    assert "start 1: n1 n2" in log


def test_srun_without_a_launcher_is_one_run(slurm: Cluster, workplace: Path, jobs: Jobs) -> None:
    python = forked_python.program("python")
    wrapped = shlex.join(["srun", python, "-m", "qa_dist.train", *jobs.words, "--output_dir", "outputs/srun"])
    job = submit(
        slurm, workplace, "--nodes", "2", "--ntasks-per-node", "1", "--wrap", wrapped, **forked_python.variables()
    )
    ended = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(workplace, job)
    jobs.assert_equals_alone("srun")


# What launchers see of a training run that takes a while to write its checkpoint.
STAND_IN = """
import os, pathlib, signal, sys, time
from qa_dist.common.command import note_exit
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
    words = ["--nodes", "2", "launch/slurm.sh", "--output_dir", "outputs/stopped"]
    job = submit(slurm, workplace, *words, NPROC_PER_NODE="1", **stand_in(tmp_path, STAND_IN))
    wait_until(lambda: all((tmp_path / f"started-{rank}").exists() for rank in range(2)), workplace, job)
    slurm.ask(["scancel", job])
    wait_until(lambda: "unless it starts again by itself" in output(workplace, job), workplace, job)
    assert [set((tmp_path / f"saved-{rank}").read_text().split()) for rank in range(2)] == [{"SIGTERM"}] * 2
    ended = slurm.wait_for(job, "CANCELLED", seconds=10)
    assert ended["Restarts"] == "0"
    assert "in the queue again" not in output(workplace, job)
