"""The check of a GPU in miniature, on the CPU: every item does what it does on a GPU, as far as a CPU can."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qa_dist import bench
from qa_dist.benchmarking.gpu import command, numerics, processes
from tests.distributed.forking import call_main, start_ranks
from tests.distributed.launching import free_port, of_accelerate

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(900)]

SKIPPED = {
    "syncs": "a CPU has nothing to wait for",
    "budget": "on a CPU the budget is a constant",
    "CUDA graphs": "a CPU has no CUDA graphs",
    "CUDA graphs that fail": "a CPU has no CUDA graphs",
}
"""What a CPU cannot do, or nothing can yet, and the reason that is given."""

NEEDED = {"quantised": "bitsandbytes", "moments in 8 bits": "bitsandbytes"}


class Forked(processes.Process):
    """The same commands in processes forked from one that has imported everything."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        _, _, module, *words = command
        # Nor do they start anew with another allocator.
        num_processes, variables = 1, {"LD_PRELOAD": "", **(environment or {})}
        if module == "torch.distributed.run":
            num_processes, module, words = int(words[2]), words[4], words[5:]
        elif module == "accelerate.commands.launch":
            num_processes, found = of_accelerate(Path(words[1]).stem, *words[2:4])
            variables |= found
            variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            module, words = words[5], words[6:]
        self._log = log
        body = partial(call_main, module, list(words))
        self._group = start_ranks(body, log, num_processes=num_processes, environment=variables)

    def __exit__(self, *_: object) -> None:
        for rank in self._group.ranks:
            rank.kill()

    @property
    def is_running(self) -> bool:
        return any(rank.is_alive() for rank in self._group.ranks)

    def terminate(self) -> None:
        for rank in self._group.ranks:
            rank.terminate()

    def wait(self) -> int:
        return max(abs(code or 0) for code in self._group.wait(240))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets in the environment is gone afterwards."""
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


# Of transformers, about what its own `Trainer` does.
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("no_gpu")
def test_every_item_passes_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "Process", Forked)
    code = bench.main(["gpu", "--rehearse", "--output_dir", str(tmp_path)])
    origin, *outcomes = lines(tmp_path)
    assert origin["rehearsal"] is True
    assert origin["versions"]["torch"]
    said = {outcome["item"]: outcome for outcome in outcomes}
    expected = dict.fromkeys(said, "") | SKIPPED
    expected |= {item: f"{name} is not installed" for item, name in NEEDED.items() if find_spec(name) is None}
    assert {item: outcome.get("reason", "") for item, outcome in said.items()} == expected
    assert {item: outcome["status"] for item, outcome in said.items()} == {
        item: "skipped" if reason else "passed" for item, reason in expected.items()
    }
    assert code == 0
    assert len(said) == len(outcomes) > 25
    # Figures of what the items promise, and not of nothing.
    assert said["resume"]["figures"]["same_bytes"] is True
    assert said["train q, v, batch 32"]["figures"]["tokens_per_second"] > 0
    assert said["evaluation with graphs"]["figures"]["launched_ms_256"] > 0
    assert said["epoch"]["figures"]["features_per_second"] > 0
    assert said["SQuAD lora, seed 1"]["figures"]["num_examples"] == 12
    assert said["out of memory"]["figures"]["budget_after"] < said["out of memory"]["figures"]["budget"]
    assert said["attention"]["figures"]["fp32_output_error"] > 0
    printed = capsys.readouterr().out
    assert all(item in printed for item in said)
    assert f"{len(said) - len([r for r in expected.values() if r])} passed, 0 failed" in printed


@pytest.mark.usefixtures("no_gpu")
def test_an_item_that_fails_is_a_line_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(scene: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(numerics, "loss", broken)
    words = ["gpu", "--rehearse", "--output_dir", str(tmp_path), "--only", "loss,spans"]
    assert bench.main(words) == 1
    failed, passed = lines(tmp_path)[1:]
    assert (failed["item"], failed["status"], failed["reason"]) == ("loss", "failed", "RuntimeError: planted")
    assert any("in broken" in line for line in failed["traceback"])
    assert (passed["item"], passed["status"]) == ("spans", "passed")
    assert "1 passed, 1 failed" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gpu", "--output_dir", str(tmp_path)]
    for more, said in (
        (["--rehearse", "--only", "nothing"], "--only nothing is the beginning of no item; there are: machine"),
        (["--rehearse", "--only", "loss,trains"], "--only trains is the beginning of no item; there are: machine"),
        (["--rehearse", "--seconds", "0"], "--seconds 0 is no time"),
        (["--rehearse", "--squad", str(tmp_path)], "--squad and --model belong together"),
        (["--rehearse", "--squad", str(tmp_path), "--model", str(tmp_path)], "train-v1.1.json.gz"),
        (["--part", "c"], "invalid choice"),
    ):
        assert bench.main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "gpu.jsonl").exists()


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert bench.main(["gpu", "--output_dir", str(tmp_path)]) == 2
    assert "use --rehearse" in capsys.readouterr().err


def test_both_parts_have_items() -> None:
    class Whole:
        is_rehearsal = False

        @staticmethod
        def choose(whole: Any, rehearsed: Any) -> Any:
            return whole

    items = command.all_items(Whole())  # type: ignore[arg-type]
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    assert {item.part for item in items} == {"a", "b"}
    assert [item.name for item in items if item.part == "a"][-1] == "unit tests"
    for tuning in ("q, v", "all-linear", "full"):
        assert {f"train {tuning}, batch {size}" for size in (32, 128, 256)} <= set(names)
    assert sum(name.startswith("SQuAD") for name in names) == 6
