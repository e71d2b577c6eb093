"""A step that must not count, on ranks whose optimiser decides on the device, as on GPUs: nothing of it stays."""

import os
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.forking import in_a_fork, start_ranks
from tests.distributed.launching import free_port, lines
from tests.tiny import tiny_training

pytestmark = pytest.mark.distributed

NUM_STEPS = 4


def train_with_faults(fault: str | None, at_steps: Sequence[int], words: list[str], rank: int) -> int:
    """Train with a fused optimiser; in each of these steps, counted from 1, rank 1 meets a fault, once."""
    from qa_dist import train
    from qa_dist.model import rdrop
    from qa_dist.training import trainer

    accumulate, loss = trainer.Trainer._accumulate, rdrop.span_loss
    tries: list[int] = []

    def noted(self: Any, step: int, *rest: Any) -> bool:
        tries.append(step + 1)
        return accumulate(self, step, *rest)

    def faulty(*arguments: Any) -> torch.Tensor:
        losses: torch.Tensor = loss(*arguments)
        if rank == 1 and tries[-1] in at_steps and tries.count(tries[-1]) == 1:
            if fault == "out of memory":
                raise torch.OutOfMemoryError("simulated")
            if fault == "not finite":
                return losses * torch.nan
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    trainer.is_fused = lambda *_: True
    if fault is not None:
        trainer.Trainer._accumulate = noted  # type: ignore[method-assign]
        rdrop.span_loss = faulty
    return train.main(words)


@dataclass(frozen=True)
class Run:
    """A run of two ranks that meet at a port of its own, and what it left.

    Attributes:
        name: of the files beside the folder of the runs that keep what it left.
        folder: where it trains; runs with the same folder go on from each other.
        fault: "out of memory", "not finite" or "stop"; None: nothing happens to it.
        at_steps: where the fault strikes.
    """

    name: str
    folder: Path
    fault: str | None = None
    at_steps: tuple[int, ...] = ()
    port: int = field(default_factory=free_port)

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def left(self, what: str) -> Path:
        return self.folder / f"{self.name}.{what}"

    @property
    def codes(self) -> list[int]:
        return [int(self.left(f"code{rank}").read_text(encoding="utf-8")) for rank in range(2)]

    @property
    def text(self) -> str:
        return self.left("log").read_text(encoding="utf-8")

    @property
    def losses(self) -> list[float]:
        """Of every step that its folder knew of when it ended."""
        path = self.left("metrics")
        return [line["loss"] for line in lines(path)] if path.exists() else []


def do(run: Run, words: list[str], rank: int) -> int:
    """Do one run on this rank, which writes to the run's own log from here on."""
    stream = os.open(run.left("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    return train_with_faults(run.fault, run.at_steps, [*words, "--output_dir", str(run.output)], rank)


def run_all(runs: Sequence[Run], words: list[str], rank: int) -> int:
    """Do one run after the other, each in a fork, and keep what it left."""
    for run in runs:
        code = in_a_fork(partial(do, run, words, rank), run.port)
        run.left(f"code{rank}").write_text(str(code), encoding="utf-8")
        if rank == 0 and (run.output / "metrics.jsonl").exists():
            shutil.copy(run.output / "metrics.jsonl", run.left("metrics"))
    return 0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = [*tiny_training(tmp_path_factory.mktemp("inputs"), 20), "--lora_dropout", "0"]
    words += ["--max_train_steps", str(NUM_STEPS), "--checkpointing_steps", "1", "--resume_from_checkpoint", "auto"]
    return [*words, "--global_batch_size", "12", "--max_tokens_per_device", "1024", "--disable_tqdm"]


@pytest.fixture(scope="module")
def runs(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs by name, done by one pair of ranks.

    One folder meets both faults in each of its steps: a loss that is not finite ends it, the run that goes on is
    stopped after the same step, and the next one meets the fault of the step that follows.
    """
    folders = {name: tmp_path_factory.mktemp(name) for name in ("undisturbed", "disturbed", "memory")}
    planned = [Run("undisturbed", folders["undisturbed"])]
    for step in range(1, NUM_STEPS + 1):
        planned += [Run(f"{fault} {step}", folders["disturbed"], fault, (step,)) for fault in ("not finite", "stop")]
    planned.append(Run("end", folders["disturbed"]))
    planned.append(Run("out of memory", folders["memory"], "out of memory", tuple(range(1, NUM_STEPS + 1))))
    group = start_ranks(partial(run_all, planned, words), folders["memory"] / "log", num_processes=2)
    assert group.wait(400) == [0, 0], group.text()
    found = {run.name: run for run in planned}
    assert found["undisturbed"].codes == [0, 0], found["undisturbed"].text
    assert len(found["undisturbed"].losses) == NUM_STEPS
    return found


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_a_loss_that_is_not_finite_ends_the_run_in_any_step(step: int, runs: dict[str, Run]) -> None:
    run = runs[f"not finite {step}"]
    assert run.codes == [1, 1], run.text
    # The last step has what the others leave of 42 features.
    num_features = 12 if step < NUM_STEPS else 6
    assert re.search(rf"step {step}: the loss of \d of {num_features} features is not finite: q", run.text), run.text
    assert run.text.count("the run stops") == 1
    assert run.losses == runs["undisturbed"].losses[: step - 1]


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_a_stop_in_any_step_lets_the_step_be_taken_once(step: int, runs: dict[str, Run]) -> None:
    """The run before it met a bad loss in the same step, of which nothing is left."""
    run = runs[f"stop {step}"]
    assert run.codes == [85, 85], run.text
    assert f"stopped by SIGTERM after step {step}" in run.text
    assert run.losses == runs["undisturbed"].losses[:step]


def test_after_a_fault_in_every_step_the_result_is_that_without_any(runs: dict[str, Run]) -> None:
    run, undisturbed = runs["end"], runs["undisturbed"]
    assert run.codes == [0, 0], run.text
    assert run.losses == undisturbed.losses
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run.output / name).read_bytes() == (undisturbed.output / name).read_bytes()


def test_a_step_without_memory_is_taken_again_whole(runs: dict[str, Run]) -> None:
    run, undisturbed = runs["out of memory"], runs["undisturbed"]
    assert run.codes == [0, 0], run.text
    for step in range(1, NUM_STEPS + 1):
        assert f"out of memory in step {step}: it is repeated with {1024 >> step} tokens per device" in run.text
    np.testing.assert_allclose(run.losses, undisturbed.losses, rtol=1e-5)
    found, wanted = (load_file(each.output / "adapter_model.safetensors") for each in (run, undisturbed))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
