"""A stand-in for `python` whose processes are forked from a server that has imported the libraries.

Starting a command takes 8 s of a processor for the imports of torch and transformers alone; a fork of a process that
has done that takes a tenth of one. So a test that looks at what a command does, not at how an interpreter starts, runs

    run([forked_python.program("python"), "-m", "qa_dist.train", ...], **forked_python.variables())

It is a process of its own with its arguments, folder, environment, file descriptors, network and exit code; signals
reach it, and it dies with the one that asked. What it starts with `sys.executable`, such as the ranks of a launcher, is
forked as well. `qa-dist`, `accelerate` and `torchrun` have stand-ins too. Everything of this repository is imported
by each process.

A real interpreter is started instead for whatever is not `-m` or `-c`, and where a variable that the libraries read
while they are imported, or that acts on the start of a process, is not as it was for the server: `MALLOC_ARENA_MAX`,
say. Which, is in the file `log` of `folder()`. What differs from real starts: all processes have the server's seed of
string hashes and its resource limits, their memory begins with what is imported, and SIGSTOP stops only the stand-in.

One server serves all processes of a pytest run, and ends with the last of them.
"""

import atexit
import fcntl
import marshal
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

PROGRAMS = ("python", "python3", "qa-dist", "accelerate", "torchrun")


@cache
def folder() -> Path:
    """A folder as that of a virtual environment, whose server runs from now on; the stand-ins are in its `bin`."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or f"{os.getpid()}"
    found = Path(tempfile.gettempdir()) / f"qa-dist-{os.getuid()}-{run[-12:]}"
    with found.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found.mkdir(mode=0o700, exist_ok=True)
        keeper = _keep(found)
        if keeper is None:
            _start(found)
            keeper = _keep(found)
            assert keeper is not None, f"the server does not answer: {(found / 'log').read_text()}"
    # The server sees when this process ends.
    atexit.register(keeper.close)
    return found


def program(name: str) -> str:
    """The stand-in of `python`, `qa-dist`, `accelerate` or `torchrun`."""
    return str(folder() / "bin" / name)


def variables(**changes: str) -> dict[str, str]:
    """Variables with which shell scripts and document commands find the stand-ins.

    What runs long does not start itself a second time for the sake of its allocator: LD_PRELOAD is set, to nothing.
    """
    path = os.pathsep.join((str(folder() / "bin"), changes.get("PATH") or os.environ["PATH"]))
    return {"LD_PRELOAD": "", "PYTHON": program("python"), **changes, "PATH": path}


def _keep(found: Path) -> socket.socket | None:
    """A connection that keeps the server alive; None where there is none."""
    connection = socket.socket(socket.AF_UNIX)
    message = marshal.dumps("keep")
    try:
        connection.connect(str(found / "server"))
        connection.sendall(len(message).to_bytes(8, "little") + message)
        if connection.recv(1) == b"k":
            return connection
    except OSError:
        pass
    connection.close()
    return None


def _start(found: Path) -> None:
    here = Path(__file__).parent
    (found / "server").unlink(missing_ok=True)
    client = (here / "client.py").read_text(encoding="utf-8")
    (found / "bin").mkdir(exist_ok=True)
    for name in PROGRAMS:
        # Isolated, and without site-packages: it starts in hundredths of a second.
        (found / "bin" / name).write_text(f"#!{sys.executable} -IS\n{client}", encoding="utf-8")
        (found / "bin" / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (found / "log").open("a") as log:
        command = [sys.executable, str(here / "server.py"), str(found)]
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
