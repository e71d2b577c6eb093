"""What stands for `python` in other tests does what a real interpreter does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import ROOT, environment, run
from tests.support import forked_python

pytestmark = pytest.mark.integration

SAYS = """
import json, os, sys
from pathlib import Path
import beside
print(json.dumps({
    "argv": sys.argv, "path": sys.path[:3], "cwd": os.getcwd(), "name": __name__, "OWN": os.environ.get("OWN"),
    "read": sys.stdin.read(), "of": sys.modules["__main__"].__dict__ is globals(),
    "umask": os.umask(0), "passed": os.read(int(os.environ["PASSED"]), 9).decode(), "is_tty": sys.stdout.isatty(),
    "others": sorted(fd for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()
                     and "socket" in os.readlink(f"/proc/self/fd/{fd}")),
    "qa_dist": "qa_dist" in sys.modules,
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def said(python: str, words: list[str], folder: Path) -> tuple[int, Any, str]:
    """Exit code, JSON and standard error of a program in a folder that gets a descriptor and standard input."""
    reading, writing = os.pipe()
    os.write(writing, b"handed on")
    variables = environment(OWN="a value", PASSED=str(reading), OMP_NUM_THREADS="2", LD_PRELOAD="")
    variables["PYTHONPATH"] = str(folder / "more")
    done = subprocess.run(
        [python, *words],
        **{"input": "some text", "capture_output": True, "text": True, "check": False},
        **{"cwd": folder, "env": variables, "pass_fds": [reading], "umask": 0o27},
    )
    os.close(reading)
    os.close(writing)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_it_is_what_a_real_process_is(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "beside.py").touch()
    (tmp_path / "says.py").write_text(SAYS, encoding="utf-8")
    for words in (["-m", "says", "-x", "a b"], ["-u", "-c", SAYS, "y"]):
        real, forked = (said(python, words, tmp_path) for python in (sys.executable, forked_python.program("python")))
        assert forked == real
        assert forked[1]["qa_dist"] is False
    # It was not real.
    log = (forked_python.folder() / "log").read_text(encoding="utf-8")
    assert f"forked {[forked_python.program('python'), '-m', 'says', '-x', 'a b']}" in log


def test_how_it_ends() -> None:
    python = forked_python.program("python")
    for code, expected in (
        ("import os; os.abort()", -signal.SIGABRT),
        ("raise SystemExit('why')", 1),
        ("import sys; sys.exit(300)", 300 & 0xFF),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("1 / 0", 1),
        ("", 0),
    ):
        done = run([python, "-c", f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {code}"])
        assert done.returncode == expected, (code, done.stderr)
        assert ("ZeroDivisionError" in done.stderr) == (code == "1 / 0")
        assert ("why" in done.stderr) == ("why" in code)
    missing = run([python, "-m", "no_such_module"])
    assert (missing.returncode, "No module named no_such_module" in missing.stderr) == (1, True)


def started(code: str) -> subprocess.Popen[str]:
    command = [forked_python.program("python"), "-u", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(LD_PRELOAD=""))


def test_signals_reach_it_and_it_dies_with_the_one_that_asked() -> None:
    # The signal may come while the number is still being printed, in which `print` cannot be called again.
    handled = "import os, signal, time\nsignal.signal(10, lambda *_: os.write(1, b'got it\\n'))\nprint(os.getpid())\n"
    handled += "while True: time.sleep(0.05)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = started(handled)
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert pid != process.pid
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got it\n"
        process.send_signal(number)
        assert process.wait(30) == -number
        until = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < until, "it lives on"
            time.sleep(0.01)
        process.stdout.close()


def test_what_it_cannot_do_is_done_by_a_real_interpreter(tmp_path: Path) -> None:
    python = forked_python.program("python")
    code = "import sys; print(sys.executable, 'torch' in sys.modules)"
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    real = f"{sys.executable} False\n"
    assert run([python, "-c", code], LD_PRELOAD="").stdout == f"{python} True\n"
    # Read by huggingface_hub when it is imported; and by the C library when a process starts.
    assert run([python, "-c", code], LD_PRELOAD="", HF_HUB_OFFLINE="0").stdout == real
    assert run([python, "-c", code], LD_PRELOAD="", MALLOC_ARENA_MAX="1").stdout == real
    assert run([python, str(script)], LD_PRELOAD="").stdout == real
    assert run([python, "-I", "-c", code], LD_PRELOAD="").stdout == real


def test_threads_are_as_many_as_asked_for_and_programs_of_packages_have_stand_ins_too() -> None:
    done = run(
        [forked_python.program("python"), "-c", "import torch; print(torch.get_num_threads())"], OMP_NUM_THREADS="3"
    )
    assert done.stdout == "3\n"
    done = run(["qa-dist", "recipes", "show", "quickstart"], **forked_python.variables())
    assert f"forked ['{forked_python.program('qa-dist')}'" in (forked_python.folder() / "log").read_text()
    assert done.stdout == (ROOT / "qa_dist" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")


def test_it_is_where_the_one_that_asked_is() -> None:
    unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or run([*unshare, "true"]).returncode:
        pytest.skip("namespaces cannot be made here; that takes root")
    code = (
        "import os, socket; print(socket.gethostname(), len(socket.if_nameindex()), len(os.listdir('/proc/self/fd')))"
    )
    inside = ["sh", "-c", 'hostname elsewhere; "$@"; echo ended with $?', "sh"]
    words = ["-c", f"{code}; raise SystemExit(5)"]
    real, forked = (
        run([*unshare, *inside, python, *words], LD_PRELOAD="").stdout
        for python in (sys.executable, forked_python.program("python"))
    )
    assert forked == real
    assert real.startswith("elsewhere ")
    assert real.endswith("ended with 5\n")
