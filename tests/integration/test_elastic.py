"""launch/torchrun.sh with a range of machines: the run goes on when one of them is lost, and when one joins.

Launchers on this machine stand for machines.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, await_held, environment, free_port, held, lines
from tests.support import forked_python
from tests.tiny import tiny_run

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(900)]

Launcher = subprocess.Popen[bytes]


def lose(launcher: Launcher) -> None:
    """End a launcher and its processes as the loss of their machine does."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    launcher.wait()


def test_a_machine_is_lost_and_another_one_joins(tmp_path: Path) -> None:
    small = ["--global_batch_size", "8", "--num_train_epochs", "10", "--checkpointing_steps", "5", "--eval_steps", "5"]
    words = [*tiny_run(tmp_path), *small, "--disable_tqdm", "--output_dir"]
    alone, output, log = (tmp_path / name for name in ("alone", "output", "log"))
    command = [forked_python.program("python"), "-m", "qa_dist.train", *words, str(alone)]
    reference = subprocess.Popen(command, env=environment(**forked_python.variables()), stderr=subprocess.PIPE)
    variables = {
        **held(tmp_path, 12, 16),
        "NNODES": "1:2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
    }
    started: list[Launcher] = []

    def told() -> str:
        return log.read_text(encoding="utf-8")

    def start(address: str, is_host: bool) -> Launcher:
        rendezvous = f"is_host={is_host},read_timeout=60,last_call_timeout=10,keep_alive_interval=1"
        own = {"PET_LOCAL_ADDR": address, "PET_RDZV_CONF": f"{rendezvous},keep_alive_max_attempt=5"}
        with log.open("ab") as file:
            command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *words, str(output)]
            launcher = Launcher(command, env=environment(**variables, **own), stdout=file, stderr=subprocess.STDOUT)
        started.append(launcher)
        return launcher

    # torchrun gives rank 0 to the least address: what one rank 0 has written, another has to take over, twice.
    stays, lost = start("127.0.0.2", True), start("127.0.0.1", False)
    try:
        await_held(tmp_path, 12, [0, 1], told)
        lose(lost)
        (tmp_path / "open-12").touch()
        await_held(tmp_path, 16, [0], told)
        joins = start("127.0.0.1", False)
        # The one that was alone is asked to stop, and loses no step.
        codes = [launcher.wait(240) for launcher in (stays, joins)]
    finally:
        for launcher in started:
            if launcher.poll() is None:
                lose(launcher)
    assert codes == [0, 0], told()
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["world_size"], record["resumed_at_steps"]) == (2, [10, 17])
    said = reference.communicate(timeout=240)[1]
    assert reference.returncode == 0, said
    found, expected = ([line for line in lines(each / "metrics.jsonl") if "loss" in line] for each in (output, alone))
    assert [line["step"] for line in found] == list(range(1, 21))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert (output / "predictions.json").read_bytes() == (alone / "predictions.json").read_bytes()
