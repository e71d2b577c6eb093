"""The server behind tests/support/forked_python: it imports libraries once, and forks a process for each command."""

import array
import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import marshal
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

# What is not installed is passed over. Nothing of this repository: each process imports that itself.
LIBRARIES = (
    "torch.distributed.run accelerate.commands.accelerate_cli accelerate.commands.launch transformers.trainer "
    "transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert peft datasets safetensors.torch "
    "deepspeed bitsandbytes evaluate fastapi uvicorn"
).split()

BY_THE_SYSTEM = tuple("GLIBC_ GOMP_ KMP_ LANG LC_ LD_ MALLOC_ MKL_ OMP_ OPENBLAS_ PYTHON TQDM_".split())
"""How the names of variables begin that are read when a process starts or a library is loaded, but not one by one."""
HONOURED = set(
    "OMP_NUM_THREADS PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONSAFEPATH PYTHONUNBUFFERED PYTHONWARNINGS".split()
)
"""What a forked process does as these say."""
AS_THEY_COME = set(
    "COLUMNS LINES OLDPWD PATH PWD PYTHON PYTHON_EXEC SHLVL TERM TMPDIR TOKENIZERS_PARALLELISM TORCHINDUCTOR_CACHE_DIR "
    "TQDM_MININTERVAL _".split()
)
"""Of scripts, or what a library asks for when it needs it, or copies with all others; so it is with these:"""
OF_OTHERS = ("MAKE", "MFLAGS", "PYTEST_", "QA_DIST_")
FLAGS = {"-B", "-u"}
"""Options of the interpreter that a forked process honours."""


def is_there(name: str) -> bool:
    """Whether a package is installed, and has this module in this version."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def preload() -> set[str]:
    """Import the libraries; the names of the variables that they read meanwhile."""
    read = set()
    kind = type(os.environ)
    real = kind.__getitem__

    def noted(self: Any, name: str) -> str:
        # Bytes, where a library asks `os.environb`.
        read.add(os.fsdecode(name))
        return real(self, name)

    kind.__getitem__ = noted  # type: ignore[method-assign]
    for name in LIBRARIES:
        if is_there(name):
            importlib.import_module(name)
    kind.__getitem__ = real  # type: ignore[method-assign]
    return read


class Server:
    """Takes commands until the last process that keeps it has ended."""

    def __init__(self, folder: Path) -> None:
        # This script's own folder is none to look for modules in.
        sys.path[:] = self.path = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
        self.environment = dict(os.environ)
        self.read = preload()
        # What libraries set when they are imported.
        self.changes = {name: value for name, value in os.environ.items() if self.environment.get(name) != value}
        self.folder = folder
        self.keepers = 0
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "server"))
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.running: dict[socket.socket, int] = {}
        # Pages of what is never freed stay shared.
        gc.collect()
        gc.freeze()

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self.selector.select():
                key.data(key.fileobj)

    def accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        header, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(4 * 253))
        if not header:
            # A process that only looked whether somebody is here.
            connection.close()
            return
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        content = connection.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
        request = marshal.loads(content)
        if request == "keep":
            self.keepers += 1
            self.selector.register(connection, selectors.EVENT_READ, self.let_go)
            connection.send(b"k")
            return
        received = list(descriptors)
        program = self.program(request)
        if program is None:
            connection.send(b"r")
            connection.close()
        else:
            pid = os.fork()
            if not pid:
                self.become(request, received, program, connection)
            connection.send(b"f")
            self.running[connection] = pid
            self.selector.register(connection, selectors.EVENT_READ, self.hand_on)
            ended = os.pidfd_open(pid)
            self.selector.register(ended, selectors.EVENT_READ, lambda fd: self.reap(fd, pid, connection))
        for number in received:
            os.close(number)

    def program(self, request: dict[str, Any]) -> tuple[str, str, list[str]] | None:
        """What kind of program a command is, its name or text, and its arguments; None where it takes a real start."""
        wanted = request["environment"]
        names = self.read | {name for name in {*wanted, *self.environment} if name.startswith(BY_THE_SYSTEM)}
        names = {name for name in names - HONOURED - AS_THEY_COME if not name.startswith(OF_OTHERS)}
        # What is empty does nothing, as what is not set.
        before = {**dict.fromkeys(names, ""), **self.environment}
        different = sorted(
            name for name in names if wanted.get(name, "") not in (before[name], self.changes.get(name, before[name]))
        )
        name, *words = request["words"]
        if Path(name).name not in ("python", "python3"):
            found = None if different else ("script", Path(name).name, words)
        else:
            while words and words[0] in FLAGS:
                words = words[1:]
            found = None if different or words[:1] not in (["-m"], ["-c"]) else (words[0], words[1], words[2:])
        with (self.folder / "log").open("a", encoding="utf-8") as log:
            print("forked" if found else f"real, for {different}", [name, *words][:8], file=log)
        return found

    def hand_on(self, connection: socket.socket) -> None:
        """A signal for a process; where the one that asked is gone, so is this one, with all that it has started."""
        with suppress(ConnectionError, ProcessLookupError):
            numbers = connection.recv(64)
            for number in numbers:
                os.kill(self.running[connection], number)
            if numbers:
                return
        self.selector.unregister(connection)
        self.kill(self.running[connection])

    def reap(self, ended: int, pid: int, connection: socket.socket) -> None:
        """Tell how a process has ended."""
        _, status = os.waitpid(pid, 0)
        self.selector.unregister(ended)
        os.close(ended)
        with suppress(KeyError):
            self.selector.unregister(connection)
        del self.running[connection]
        with suppress(OSError):
            connection.send(status.to_bytes(4, "little"))
        connection.close()

    def let_go(self, connection: socket.socket) -> None:
        """A process that kept this one has ended."""
        self.selector.unregister(connection)
        connection.close()
        self.keepers -= 1
        if self.keepers:
            return
        for pid in self.running.values():
            self.kill(pid)
        with self.folder.with_suffix(".lock").open("w") as lock, suppress(BlockingIOError):
            # Who holds it is about to ask.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)
            os._exit(0)

    @staticmethod
    def kill(pid: int) -> None:
        """Kill a process and those that it has started; it may not have made its group yet."""
        for kill in (os.kill, os.killpg):
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)

    def become(
        self, request: dict[str, Any], received: list[int], program: tuple[str, str, list[str]], asker: socket.socket
    ) -> NoReturn:
        """Be the process that was asked for."""
        os.setsid()
        enter_namespaces(asker)
        # What this one listens to.
        for key in list(self.selector.get_map().values()):
            os.close(key.fileobj) if isinstance(key.fileobj, int) else key.fileobj.close()
        self.selector.close()
        asker.close()
        take(received, request["descriptors"])
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        os.umask(request["umask"])
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.environ.update(self.changes)
        execute(program, request["words"], self.path, self.folder)


def enter_namespaces(asker: socket.socket) -> None:
    """Go where the process that asked is: its network, host name and mounts may be others, as those of a container."""
    credentials = asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    other = int.from_bytes(credentials[:4], sys.byteorder)
    names = ("net", "uts", "pid", "mnt")
    folders = [f"/proc/{process}/ns" for process in (other, "self")]
    different = [name for name in names if len({os.readlink(f"{folder}/{name}") for folder in folders}) == 2]
    for name, descriptor in [(name, os.open(f"{folders[0]}/{name}", os.O_RDONLY)) for name in different]:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {name} of process {other}")
        os.close(descriptor)
    # That of processes holds for those that are started from now on.
    if "pid" in different and (inner := os.fork()):
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: os.kill(inner, number))
        end_as(os.waitpid(inner, 0)[1])


def take(received: list[int], numbers: list[int]) -> None:
    """Give descriptors these numbers."""
    above = max([*received, *numbers]) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in received]
    for number in received:
        os.close(number)
    for now, number in zip(moved, numbers, strict=True):
        os.dup2(now, number)
        os.close(now)


def execute(program: tuple[str, str, list[str]], words: list[str], path: list[str], folder: Path) -> NoReturn:
    """Do what the interpreter does with these words, and end."""
    import numpy as np
    import torch

    kind, what, arguments = program
    is_unbuffered = "-u" in words[: -len(arguments) or None] or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)  # noqa: SIM115
    for stream, is_by_line in ((sys.stdout, os.isatty(1)), (sys.stderr, True)):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=is_by_line or is_unbuffered, write_through=is_unbuffered)
    own = os.environ.get("PYTHONPATH", "")
    first = {"-m": os.getcwd(), "-c": "", "script": str(Path(words[0]).parent)}[kind]
    is_safe = bool(os.environ.get("PYTHONSAFEPATH"))
    sys.path[:] = [*([] if is_safe else [first]), *filter(None, own.split(os.pathsep)), *path]
    importlib.invalidate_caches()
    # TMPDIR says it anew.
    tempfile.tempdir = None
    sys.executable = str(Path(words[0]).parent / "python")
    sys.orig_argv = [sys.executable, *words[1:]] if kind != "script" else [sys.executable, *words]
    sys.argv = [words[0] if kind == "script" else kind, *arguments]
    # A module is compiled once for all, also where nothing may be written beside it.
    if sys.dont_write_bytecode or os.environ.get("PYTHONDONTWRITEBYTECODE"):
        sys.pycache_prefix, sys.dont_write_bytecode = str(folder / "compiled"), False
    sys.warnoptions[:] = filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))
    warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    np.random.seed()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = sys.modules["builtins"]  # type: ignore[attr-defined]
    status = 0
    try:
        if kind == "-m":
            runpy._run_module_as_main(what)  # type: ignore[attr-defined]
        elif kind == "-c":
            exec(compile(what, "<string>", "exec"), main.__dict__)
        else:
            (script,) = entry_points(group="console_scripts", name=what)
            sys.exit(script.load()())
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = (end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)) << 8
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1 << 8
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    end_as(status)


def end_as(status: int) -> NoReturn:
    """End as a process has that `waitpid` gave this status for."""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def main() -> None:
    server = Server(Path(sys.argv[1]))
    # Who started it goes on when this one has ended: then the server answers.
    if os.fork():
        os._exit(0)
    os.setsid()
    server.serve()


if __name__ == "__main__":
    main()
