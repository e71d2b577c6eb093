"""launch/torchrun.sh and launch/deepspeed.sh on two hosts.

The hosts are network namespaces with a cable between them, which have only files in common.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.launching import ROOT, environment, run, succeed
from tests.integration.test_readme import COMMANDS
from tests.support import forked_python
from tests.tiny import tiny_run

pytestmark = [pytest.mark.integration, pytest.mark.distributed]

(COMMAND,) = [shlex.split(command) for command in COMMANDS if command.startswith("NNODES=2 ")]

# A host waits for the cable, takes an address, and runs the rest of its words.
HOST = """
set -euo pipefail
ip link set lo up
for _ in $(seq 300); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.1; done
ip address add "$1/24" dev eth0
ip link set eth0 up
shift
exec "$@"
"""


def start_host(address: str, command: list[str], cwd: Path, **changes: str) -> "subprocess.Popen[str]":
    """A command in a network namespace of its own, once that exists; its process is the first one there."""
    host = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", HOST, "host", address, *command],
        cwd=cwd,
        env=environment(**forked_python.variables(**changes)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 30
    while os.readlink(f"/proc/{host.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        assert host.poll() is None, host.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    return host


def on_two_hosts(command: list[str], cwd: Path, **variables: str) -> None:
    """Run a command on two hosts that see each other; both must succeed."""
    hosts = [start_host(f"10.0.0.{number}", command, cwd, **variables) for number in (1, 2)]
    try:
        ends = [word for host in hosts for word in ("eth0", "netns", str(host.pid))]
        subprocess.run(["ip", "link", "add", *ends[:3], "type", "veth", "peer", "name", *ends[3:]], check=True)
        outputs = [host.communicate(timeout=300)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)[-6000:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder like a checkout, with the results of one process in outputs/alone, and the options of a small run."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("no unshare or ip: install Debian's util-linux and iproute2")
    if subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        pytest.skip("network namespaces cannot be made here; that takes root")
    folder = tmp_path_factory.mktemp("hosts")
    for name in ("launch", "qa_dist", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    words = tiny_run(folder)
    recipe = COMMAND[COMMAND.index("--config") :][:2]
    alone = [*recipe, *words, "--output_dir", str(folder / "outputs" / "alone")]
    succeed([forked_python.program("python"), "-m", "qa_dist.train", *alone], **forked_python.variables())
    return folder, words


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("script", "strategy"), [("torchrun.sh", "ddp"), ("deepspeed.sh", "zero2")])
def test_two_hosts_meet_and_train(
    script: str, strategy: str, workplace: tuple[Path, list[str]], tmp_path: Path
) -> None:
    if strategy != "ddp":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    folder, words = workplace
    alone, output = folder / "outputs" / "alone", folder / "outputs" / strategy
    split = COMMAND.index("bash")
    variables = dict(word.replace("host1", "10.0.0.1").split("=") for word in COMMAND[:split])
    variables["LOG_DIR"] = str(tmp_path / "logs")
    command = [word.replace("torchrun.sh", script) for word in COMMAND[split:]]
    on_two_hosts([*command, *words, "--output_dir", str(output)], folder, **variables)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["strategy"], record["world_size"]) == (strategy, 2)
    assert len(list((tmp_path / "logs").glob("*/attempt_0/0/stderr.log"))) == 2
    for name in ("metrics.json", "predictions.json"):
        assert (output / name).read_bytes() == (alone / name).read_bytes()
    found, expected = (load_file(place / "adapter_model.safetensors") for place in (output, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-4, err_msg=name)


def test_several_machines_need_an_address_that_others_can_reach() -> None:
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--output_dir", "outputs/none"]
    variables = {"PYTHON": sys.executable, "NNODES": "2", "NPROC_PER_NODE": "1"}
    done = run(command, **variables)
    assert done.returncode == 2, done.stderr
    assert "NNODES is 2 but RDZV_ENDPOINT is not set" in done.stderr
    done = run(command, RDZV_ENDPOINT="no-such-host.invalid:29500", **variables)
    assert done.returncode == 2, done.stderr
    assert "the host of RDZV_ENDPOINT=no-such-host.invalid:29500 has no address" in done.stderr
    if shutil.which("ip") is None:
        pytest.skip("no ip: install Debian's iproute2")
    done = run(command, RDZV_ENDPOINT="localhost:29500", **variables)
    assert done.returncode == 2, done.stderr
    assert "is the loopback interface" in done.stderr
