"""Starting whole commands on several gloo processes, as a user would."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a launched command: offline, one thread per process, this checkout first."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "TOKENIZERS_PARALLELISM": "false",
        **changes,
    }


def torchrun(num_processes: int, module: str, arguments: Sequence[str]) -> list[str]:
    """A command that runs a module on that many processes; one process runs without a launcher."""
    if num_processes == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return [sys.executable, *launcher, "-m", module, *arguments]


def run(
    command: Sequence[str], *, timeout: float = 240, cwd: Path = ROOT, **changes: str
) -> subprocess.CompletedProcess[str]:
    """The finished command, whatever its exit code."""
    return subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**changes),
        cwd=cwd,
        check=False,
    )


def succeed(
    command: Sequence[str], *, timeout: float = 240, cwd: Path = ROOT, **changes: str
) -> subprocess.CompletedProcess[str]:
    """The finished command; its output is shown if it failed."""
    done = run(command, timeout=timeout, cwd=cwd, **changes)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
