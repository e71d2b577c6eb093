"""The program that stands for `python`, `qa-dist`, `accelerate` and `torchrun`: see tests/support/forked_python.

It has the server fork a process that does what the real program would do, hands on every signal, and ends as that
process ends. What the server cannot do as well, the real interpreter does.
"""

import array
import marshal
import os
import signal
import socket
import sys

FOLDER = os.path.dirname(os.path.abspath(sys.argv[0]))
HANDED_ON = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def inherited() -> list[int]:
    """The file descriptors that this process was started with."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            # The one of the listing itself.
            continue
        found.append(int(name))
    return found


def ask(server: socket.socket) -> bool:
    """Whether the server has forked a process for this command."""
    descriptors = inherited()
    descriptors.remove(server.fileno())
    request = {
        "words": [os.path.join(FOLDER, os.path.basename(sys.argv[0])), *sys.argv[1:]],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "descriptors": descriptors,
        "ignored": [int(number) for number in HANDED_ON if signal.getsignal(number) is signal.SIG_IGN],
        "umask": os.umask(0o22),
    }
    os.umask(request["umask"])
    content = marshal.dumps(request)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    server.sendmsg([len(content).to_bytes(8, "little")], ancillary)
    server.sendall(content)
    return server.recv(1) == b"f"


def main() -> None:
    # None is lost before there is somebody to hand it to.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    try:
        server = socket.socket(socket.AF_UNIX)
        server.connect(os.path.join(os.path.dirname(FOLDER), "server"))
        is_forked = ask(server)
    except OSError:
        is_forked = False
    if not is_forked:
        # The default actions are those of the program that takes this one's place.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        name = os.path.basename(sys.argv[0])
        real = os.path.join(os.path.dirname(sys.executable), name)
        os.execv(real, [real, *sys.argv[1:]])
    # Also what is ignored here: the other process may have come to act on it.
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    answer = server.recv(4)
    # None: the server is gone, and with it the process.
    status = int.from_bytes(answer, "little") if answer else signal.SIGKILL
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


main()
