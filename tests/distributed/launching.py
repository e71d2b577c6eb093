"""Starting whole commands on several gloo processes, as a user would."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
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


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


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


def together(
    commands: Sequence[Sequence[str]], changes: Sequence[Mapping[str, str]], *, timeout: float = 240
) -> list[str]:
    """Output of commands that run at the same time, each with changes of its environment; all must succeed."""
    started = [
        subprocess.Popen(
            list(command),
            env=environment(**changed),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, changed in zip(commands, changes, strict=True)
    ]
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)[-4000:]
    return outputs


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
