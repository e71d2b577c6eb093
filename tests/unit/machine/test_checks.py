"""Every verdict of the doctor, both ways."""

import http.server
import os
import resource
import threading
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from qa_dist.distributed.rendezvous import try_backend
from qa_dist.machine import checks, environment
from qa_dist.machine.checks import GIB, MIB, Check, Device
from qa_dist.machine.requirements import Requirement

TORCH = Requirement("torch", "2.10", "2.13.0", None)
QUANT = Requirement("bitsandbytes", "0.48", "0.50.2", "quant")
INDIRECT = Requirement("tokenizers", None, "0.23.3", None)


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def fails(error: Exception) -> Callable[..., str]:
    def attempt(*_: object) -> str:
        raise error

    return attempt


def test_what_is_not_ok_says_what_to_do() -> None:
    """The checks that take plain values, each in its bad form."""
    bad = [
        checks.python((3, 10, 0)),
        *checks.packages([TORCH], {"torch": "2.9"}),
        *checks.devices([], cuda=None, driver="570", visible=None, num_cores=2),
        checks.threads(2, "64"),
        *checks.heap(None, None, has_gpu=False),
        checks.backend("gloo", fails(RuntimeError("no"))),
        checks.address("node7", lambda host: "127.0.1.1"),
        *checks.interfaces(["lo"], {"GLOO_SOCKET_IFNAME": "eth0"}),
        checks.shared_memory(64 * MIB),
        checks.open_files(256),
        checks.locked_memory(64 * 1024, infiniband=True),
        checks.hub("https://hub", {"HF_HUB_OFFLINE": "1"}, lambda url: None),
    ]
    assert len(bad) == 12
    assert all(check.status != "ok" and check.remedy for check in bad)


def test_the_allocator_matters_on_cpus_alone() -> None:
    library = Path("/usr/lib/libjemalloc.so.2")
    assert checks.heap(None, None, has_gpu=True) == []
    for preloaded, status in ((None, "ok"), ("/usr/lib/libtcmalloc.so", "ok"), ("", "warning")):
        (check,) = checks.heap(library, preloaded, has_gpu=False)
        assert check.status == status
    (check,) = checks.heap(None, None, has_gpu=False)
    assert (check.status, check.found) == ("warning", "jemalloc is not installed")
    assert "libjemalloc2" in check.remedy


def test_python() -> None:
    assert checks.python((3, 11, 0)).status == "ok"
    assert checks.python((3, 10, 14)) == Check("python", "failure", "3.10.14", "install Python 3.11 or newer")
    assert checks.python().status == "ok"


def test_packages_as_tested_share_a_line() -> None:
    (check,) = checks.packages([TORCH, QUANT], {"torch": "2.13.0+cu126", "bitsandbytes": None})
    assert check == Check("packages", "ok", "as tested: torch 2.13.0+cu126")


def test_packages_that_are_not_as_tested() -> None:
    installed = {"torch": "2.9.1", "tokenizers": "0.24", "bitsandbytes": "0.50.10"}
    old, other, newer = checks.packages([TORCH, INDIRECT, QUANT], installed)
    mend = "pip install -c constraints.txt 'qa-dist'"
    assert old == Check("torch", "failure", "2.9.1 is older than 2.10", mend), "2.9 is less than 2.10"
    assert other == Check("tokenizers", "warning", "0.24, tested with 0.23.3", mend)
    assert newer.status == "warning"
    assert "qa-dist[quant]" in newer.remedy
    (missing,) = checks.packages([TORCH], {"torch": None})
    assert (missing.status, missing.found) == ("failure", "not installed")


def test_installed_packages_are_found() -> None:
    found = environment.installed(["torch", "no-such-package"])
    assert found["torch"]
    assert found["no-such-package"] is None


def test_an_optional_package() -> None:
    def check(version: str | None, attempt: Callable[[], str]) -> Check:
        return checks.optional("deepspeed", "ZeRO", "deepspeed", version, attempt)

    assert check("0.19", lambda: "works") == Check("deepspeed", "ok", "0.19, works")
    missing = check(None, lambda: "works")
    assert (missing.status, missing.remedy) == ("warning", "pip install 'qa-dist[deepspeed]'")
    broken = check("0.19", fails(RuntimeError("libaio is missing")))
    assert broken.status == "failure"
    assert "libaio is missing" in broken.found
    assert "reinstall" in broken.remedy


def test_trying_python() -> None:
    assert checks.try_python("print('noise'); print('cpu')") == "cpu"
    with pytest.raises(RuntimeError, match=r"^ImportError: no libaio$"):
        checks.try_python("raise ImportError('no libaio')")
    with pytest.raises(RuntimeError, match="exit code -9"):
        checks.try_python("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match="no answer within 0 seconds"):
        checks.try_python("import time; time.sleep(60)", seconds=0.2)


def devices(found: list[Device], **changes: object) -> list[Check]:
    facts = {"cuda": "13.0", "driver": "580.65", "visible": None, "num_cores": 8, **changes}
    return checks.devices(found, **facts)  # type: ignore[arg-type]


def test_gpus() -> None:
    good = Device("H100", 80 * GIB, 79 * GIB)
    busy = Device("H100", 80 * GIB, 10 * GIB)
    broken = Device("H100", 80 * GIB, 79 * GIB, "no kernel image is available")
    driver, *checks = devices([good, busy, broken])
    assert driver == Check("driver", "ok", "NVIDIA 580.65; torch is built for CUDA 13.0")
    assert statuses(checks) == {"GPU 0": "ok", "GPU 1": "warning", "GPU 2": "failure"}
    assert checks[0].found == "H100, 79.0 of 80.0 GiB free"
    assert "nvidia-smi" in checks[1].remedy
    assert "no kernel image" in checks[2].found


def test_no_gpu() -> None:
    (check,) = devices([], driver=None)
    assert (check.status, check.found) == ("ok", "no GPU; 8 CPU cores, processes talk over gloo")


@pytest.mark.parametrize(
    ("changes", "status", "remedy"),
    [
        ({"visible": ""}, "warning", "unset CUDA_VISIBLE_DEVICES"),
        ({"visible": "-1", "cuda": None}, "warning", "unset CUDA_VISIBLE_DEVICES"),
        ({"cuda": None}, "failure", "install a torch that is built for CUDA"),
        ({}, "failure", "update the driver"),
    ],
)
def test_gpus_that_torch_does_not_see(changes: dict[str, object], status: str, remedy: str) -> None:
    check = devices([], **changes)[-1]
    assert (check.name, check.status) == ("devices", status)
    assert check.remedy.startswith(remedy)


def test_threads() -> None:
    assert checks.threads(8, None).status == "ok"
    assert checks.threads(8, "8").status == "ok"
    for bad in ("9", "0", "many", ""):
        assert checks.threads(8, bad).status == "warning"


def test_backends() -> None:
    assert checks.backend("gloo", lambda: "starts") == Check("gloo", "ok", "starts")
    gloo = checks.backend("gloo", fails(RuntimeError("no address")))
    assert (gloo.status, gloo.found) == ("failure", "cannot be used: no address")
    assert "GLOO_SOCKET_IFNAME" in gloo.remedy
    assert "NCCL_DEBUG" in checks.backend("nccl", fails(RuntimeError("unhandled"))).remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has NCCL")
def test_nccl_does_not_start_without_a_gpu() -> None:
    assert checks.backend("nccl", lambda: try_backend("nccl")).status == "failure"


def test_address() -> None:
    assert checks.address("node7", lambda host: "10.0.0.7") == Check("address", "ok", "node7 is 10.0.0.7")
    assert checks.address("node7", lambda host: "127.0.1.1").status == "warning"
    unknown = checks.address("node7", fails(OSError("Name or service not known")))
    assert unknown.status == "warning"
    assert "/etc/hosts" in unknown.remedy


@pytest.mark.parametrize(
    ("variable", "asked", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "failure"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib,eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "failure"),
        ("NCCL_SOCKET_IFNAME", "=eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib", "failure"),
    ],
)
def test_interfaces(variable: str, asked: str, status: str) -> None:
    assert statuses(checks.interfaces(["lo", "eth0"], {variable: asked})) == {variable: status}
    assert checks.interfaces(["lo", "eth0"], {}) == []
    assert checks.find_interfaces()


@pytest.mark.parametrize(
    ("free_bytes", "writable", "status"),
    [(6 * GIB, True, "ok"), (4 * GIB, True, "warning"), (MIB, True, "failure"), (6 * GIB, False, "failure")],
)
def test_disks(free_bytes: int, writable: bool, status: str) -> None:
    check = checks.disk("output", Path("/out"), free_bytes=free_bytes, writable=writable, remedy="choose another")
    assert check.status == status
    assert ("choose another" in check.remedy) == (status != "ok")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose disks were asked about; all have 9 GiB, 6 of them free."""
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(total=9 * GIB, used=3 * GIB, free=6 * GIB)

    monkeypatch.setattr(checks.shutil, "disk_usage", disk_usage)
    return asked


def test_a_folder_is_judged_by_its_own_disk(tmp_path: Path, measured: list[Path]) -> None:
    assert checks.find_disk("output", tmp_path, "choose another") == Check("output", "ok", f"{tmp_path}, 6.0 GiB free")
    assert measured == [tmp_path]


def test_a_folder_that_is_not_there_is_judged_by_the_one_it_would_be_in(tmp_path: Path, measured: list[Path]) -> None:
    for missing in (tmp_path / "a" / "b", tmp_path / ("long" * 100)):
        check = checks.find_disk("output", missing, "choose another")
        assert check == Check("output", "ok", f"{missing}, 6.0 GiB free")
    assert measured == [tmp_path, tmp_path]
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


def test_a_folder_cannot_be_made_inside_a_file(tmp_path: Path, measured: list[Path]) -> None:
    # One that may be executed, as a folder that may be entered.
    (tmp_path / "file").touch(0o755)
    check = checks.find_disk("output", tmp_path / "file" / "b", "choose another")
    assert check == Check("output", "failure", f"{tmp_path}/file/b cannot be written to", "choose another")
    assert measured == [tmp_path / "file"]


@pytest.mark.usefixtures("measured")
def test_a_folder_that_may_not_be_written_to_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so that the modes of real folders decide nothing: the system's answer is given here.
    asked: list[tuple[Path, int]] = []

    def access(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(checks.os, "access", access)
    assert checks.find_disk("output", tmp_path / "a", "choose another").status == "failure"
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_folders_are_named_from_home_and_from_where_the_program_runs(
    tmp_path: Path, measured: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = [checks.find_disk("output", Path(name), "choose another").found for name in ("~/out", "out")]
    assert found == [f"{tmp_path}/home/out, 6.0 GiB free", f"{tmp_path}/out, 6.0 GiB free"]
    assert measured == [tmp_path, tmp_path]


def test_shared_memory(tmp_path: Path, measured: list[Path]) -> None:
    assert checks.shared_memory(8 * GIB).status == "ok"
    small = checks.shared_memory(64 * MIB)
    assert (small.status, small.found) == ("warning", "/dev/shm has 64 MiB")
    assert "--shm-size" in small.remedy
    assert checks.shared_memory(None).status == "warning"
    assert checks.find_shared_memory(tmp_path / "missing") is None
    assert measured == []
    assert checks.find_shared_memory(tmp_path) == 9 * GIB, "all of it counts, and not what is free"
    assert measured == [tmp_path]


def test_limits(tmp_path: Path) -> None:
    assert checks.open_files(None).status == "ok"
    assert checks.open_files(65536).status == "ok"
    assert "ulimit -n" in checks.open_files(256).remedy
    assert checks.locked_memory(64 * 1024, infiniband=False).status == "ok"
    assert checks.locked_memory(None, infiniband=True).status == "ok"
    assert "ulimit -l" in checks.locked_memory(64 * 1024, infiniband=True).remedy
    assert not checks.has_infiniband(tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    assert checks.has_infiniband(tmp_path)


@pytest.mark.parametrize("name", ["NOFILE", "MEMLOCK"])
def test_the_limits_are_those_that_hold_and_not_those_that_could_be_set(
    name: Literal["NOFILE", "MEMLOCK"], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    soft, _ = resource.getrlimit(kind)
    assert checks.find_limit(name) == (None if soft == resource.RLIM_INFINITY else soft)
    # What any machine may have, whatever this one has.
    for held, limit in (((4321, 98765), 4321), ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None)):
        monkeypatch.setattr(resource, "getrlimit", {kind: held}.__getitem__)
        assert checks.find_limit(name) == limit


def test_hub() -> None:
    asked: list[str] = []
    assert checks.hub("https://hub", {}, asked.append).status == "ok"
    assert asked == ["https://hub"]
    silent = checks.hub("https://hub", {}, fails(urllib.error.URLError("Name or service not known")))
    assert silent.status == "warning", "being offline is no failure"
    assert "Name or service not known" in silent.found
    assert "local files" in silent.remedy


@pytest.mark.parametrize("flag", checks.OFFLINE_FLAGS)
def test_offline_flags_are_respected(flag: str) -> None:
    asked: list[str] = []
    check = checks.hub("https://hub", {flag: "1"}, asked.append)
    assert check.status == "warning"
    assert f"unset {flag}" in check.remedy
    assert asked == [], "nobody may ask"
    assert checks.hub("https://hub", {flag: "0"}, asked.append).status == "ok"
    assert asked == ["https://hub"]


@pytest.fixture
def server() -> Iterator[str]:
    """A server on this machine that answers with the status that the path names."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_reaching(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    checks.reach(f"{server}/200")
    checks.reach(f"{server}/403")
    with pytest.raises(OSError, match="status 503"):
        checks.reach(f"{server}/503")
    with pytest.raises(OSError, match="refused"):
        checks.reach("http://127.0.0.1:9/200")
    with pytest.raises(OSError, match="unknown url type"):
        checks.reach("hub.example")


def test_a_name_server_that_is_silent_does_not_hold_the_doctor_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def wait(*_: object, **__: object) -> None:
        never.wait()
        raise OSError("too late")

    monkeypatch.setattr(checks.urllib.request, "urlopen", wait)
    before = set(threading.enumerate())
    with pytest.raises(TimeoutError, match="no answer within"):
        checks.reach("http://hub", seconds=0.05)
    never.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()


def test_the_last_line_that_says_something() -> None:
    assert checks.last_line("one\n two \n\n") == "two"
    assert checks.last_line("") == ""
