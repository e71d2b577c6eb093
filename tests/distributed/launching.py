"""Starting whole commands on several gloo processes, as a user would."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.support import forked_python

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
    """A port that nobody listens at.

    It lies below those that the system gives to connections (from 32768 on, on Linux): one of them could be taken by a
    connection of another test before the caller listens at it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def of_accelerate(config: str, *options: str) -> tuple[int, dict[str, str]]:
    """What `accelerate launch --config_file accelerate_configs/<config>.yaml` starts on this machine.

    Accelerate reads the configuration and comes to the point where it would start processes.

    Returns:
        How many processes, and the variables that it sets for them.
    """
    from accelerate.commands import launch
    from torch.distributed import run as torchrun

    before, found = dict(os.environ), []

    def note(num_processes: int, variables: Mapping[str, str]) -> None:
        found.append((num_processes, {k: value for k, value in variables.items() if before.get(k) != value}))

    def start_one(command: list[str], env: Mapping[str, str]) -> SimpleNamespace:
        note(1, env)
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    file = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    words = ["--config_file", file, *options, "-m", "qa_dist.train"]
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr(torchrun, "run", lambda arguments: note(int(arguments.nproc_per_node), os.environ))
        patch.setattr(launch, "subprocess", SimpleNamespace(Popen=start_one))
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    ((num_processes, variables),) = found
    return num_processes, variables


def torchrun(num_processes: int, module: str, arguments: Sequence[str]) -> list[str]:
    """A command that runs a module on that many processes; one process runs without a launcher."""
    if num_processes == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return [sys.executable, *launcher, "-m", module, *arguments]


def stand_in(folder: Path, text: str) -> dict[str, str]:
    """Variables with which the scripts of launch/ run a module of this text in the place of qa_dist.train.

    The launchers are real processes, which have their ranks for children, and these are forked
    (`tests.support.forked_python`): what signals a whole tree of processes reaches the ranks.
    """
    (folder / "stand_in.py").write_text(text, encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "${{@/#qa_dist.train/stand_in}}"\n', encoding="utf-8")
    python.chmod(0o755)
    paths = os.pathsep.join((str(ROOT), str(folder)))
    # torchrun starts ranks with PYTHON_EXEC.
    forked = forked_python.variables(PYTHONPATH=paths)
    return {**forked, "PYTHON_EXEC": forked["PYTHON"], "PYTHON": str(python)}


# A training that each rank holds before some steps, until somebody opens them or asks it to stop.
_HELD = """
import pathlib, sys, time
from qa_dist.common.signals import StopSignals
from qa_dist.train import main
folder, enter = pathlib.Path(__file__).parent, StopSignals.__enter__
def entered(self):
    found = enter(self)
    # Only now: these imports take seconds, in which no signal must be lost.
    from qa_dist.training.trainer import Trainer
    real = Trainer.step
    def step(self, number):
        if number in HELD:
            (folder / f"held-{number}-{self.ranks.rank}").touch()
            while not (folder / f"open-{number}").exists() and not self.ranks.is_asked_to_stop:
                time.sleep(0.05)
        return real(self, number)
    Trainer.step = step
    return found
StopSignals.__enter__ = entered
sys.exit(main())
"""


def held(folder: Path, *steps: int) -> dict[str, str]:
    """Variables with which the scripts of launch/ run a training that is held before these steps, counted from 0.

    A rank makes the file `held-<step>-<rank>` in the folder, and goes on when there is `open-<step>`, or when it is
    asked to stop.
    """
    return stand_in(folder, _HELD.replace("HELD", repr(steps)))


def await_held(folder: Path, step: int, ranks: Sequence[int], told: Callable[[], str], seconds: float = 240) -> None:
    """Come back when all these ranks are held before a step; `told` gives what the run says, should they not come."""
    end = time.monotonic() + seconds
    while not all((folder / f"held-{step}-{rank}").exists() for rank in ranks):
        assert time.monotonic() < end, told()
        time.sleep(0.1)


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
