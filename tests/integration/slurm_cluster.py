"""A Slurm of two nodes on this machine, in namespaces of its own: nothing of it is seen outside or outlives it."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.launching import ROOT, environment
from tests.support import forked_python

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "setpriv", "unshare", "nsenter", "ip")
NODES = ("n1", "n2")

# The job credentials' life bounds from below how soon a job may be requeued. A node is down after twelve seconds
# without a word from its slurmd.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=2
KillWait=30
SlurmdTimeout=12
ReturnToService=2
GresTypes=gpu
NodeName=n1 CPUs=2 Gres=gpu:1 Port=16818 State=UNKNOWN
NodeName=n2 CPUs=2 Gres=gpu:1 Port=16819 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# The first process of the namespaces: with its end the kernel ends all others.
START = """
set -euo pipefail
cd "$1"
hostname head
ip link set lo up
# Slurm looks for a network beside the loopback one.
ip link add eth1 type veth peer name eth2
for node in 1 2; do
  ip address add "10.0.0.$node/24" dev "eth$node"
  ip link set "eth$node" up
done
mount --bind hosts /etc/hosts
mungekey --create --keyfile munge.key
munged --force --foreground --key-file munge.key --socket munge.socket --pid-file munge.pid --log-file munge.log \\
  --seed-file munge.seed --num-threads 2 &
while [ ! -S munge.socket ]; do sleep 0.1; done
export SLURM_CONF=$PWD/slurm.conf
slurmctld -D >slurmctld.log 2>&1 &
slurmd -D -N n1 >n1.log 2>&1 &
slurmd -D -N n2 >n2.log 2>&1 &
# Also those that are started later.
while true; do sleep 3600; done
"""


def missing_programs() -> list[str]:
    """What of the needed programs this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Cluster:
    """Commands on a running Slurm."""

    def __init__(self, folder: Path, init_pid: int) -> None:
        self.folder = folder
        self._prefix = ["nsenter", "--target", str(init_pid), "--mount", "--pid", "--net", "--uts", "--"]

    def run(self, command: Sequence[str], cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
        """The finished command, whatever its exit code."""
        variables = environment(**forked_python.variables(SLURM_CONF=str(self.folder / "slurm.conf"), **changes))
        inside = [*self._prefix, "env", "--chdir", str(cwd), *command]
        return subprocess.run(inside, capture_output=True, text=True, env=variables, timeout=60, check=False)

    def ask(self, command: Sequence[str], cwd: Path = ROOT, **changes: str) -> str:
        """Standard output of a command that must succeed."""
        done = self.run(command, cwd, **changes)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def kill_slurmd(self, node: str) -> None:
        """End the daemon of a node as a crash does; what it started goes on."""
        self.ask(["sh", "-c", f"kill -KILL $(cat slurmd.{node}.pid)"], self.folder)

    def start_slurmd(self, node: str) -> None:
        """Start the daemon of a node again."""
        self.ask(["sh", "-c", f"slurmd -D -N {node} >{node}.again.log 2>&1 &"], self.folder)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, by its own names: JobState, ExitCode, Restarts ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask(["scontrol", "show", "job", "--oneliner", number])))

    def wait_for(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """What Slurm knows of a job once it is in one of the states."""
        end = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"job {number} is {found} after {seconds} s"
            time.sleep(1)
        return found


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A Slurm with two idle nodes, keeping everything in `folder`; needs root and the PROGRAMS."""
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 head n1\n10.0.0.2 n2\n", encoding="utf-8")
    # A GPU in name only: it can be asked for and given, and is not there.
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n", encoding="utf-8")
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder), encoding="utf-8")
    # With the test's own process all of it ends, however that ends.
    spaces = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--pid",
        "--net",
        "--uts",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ]
    with (folder / "start.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen([*spaces, "bash", "-c", START, "start", str(folder)], stdout=log, stderr=log)
    try:
        yield _when_idle(folder, process)
    finally:
        process.kill()
        process.wait()


def _when_idle(folder: Path, process: "subprocess.Popen[bytes]") -> Cluster:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if (folder / "munge.socket").exists():
            found = Cluster(folder, int(children.read_text().split()[0]))
            if found.run(["sinfo", "--noheader", "--format", "%t %D"]).stdout.split() == ["idle", "2"]:
                return found
        time.sleep(0.2)
    logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.log")))
    raise AssertionError(f"Slurm did not start:\n{logs}")
