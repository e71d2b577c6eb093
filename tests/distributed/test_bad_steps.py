"""A step that must not count, on ranks whose optimiser decides on the device, as on GPUs: nothing of it stays."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.forking import start_ranks
from tests.distributed.launching import lines
from tests.tiny import tiny_model, tiny_squad

pytestmark = pytest.mark.distributed

NUM_STEPS = 4


def train_with_a_fault(fault: str | None, at_step: int, words: list[str], rank: int) -> int:
    """Train with a fused optimiser; in a step, counted from 1, rank 1 meets a fault in its last micro-batch, once."""
    from qa_dist import train
    from qa_dist.training import trainer

    accumulate, loss = trainer.Trainer._accumulate, trainer.span_loss
    steps: list[int] = []

    def noted(self: Any, step: int, *rest: Any) -> bool:
        steps.append(step + 1)
        return accumulate(self, step, *rest)

    def faulty(*arguments: Any) -> torch.Tensor:
        losses: torch.Tensor = loss(*arguments)
        if rank == 1 and steps == [*range(1, at_step + 1)]:
            if fault == "out of memory":
                raise torch.OutOfMemoryError("simulated")
            if fault == "not finite":
                return losses * torch.nan
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    trainer.is_fused = lambda *_: True
    if fault is not None:
        trainer.Trainer._accumulate = noted  # type: ignore[method-assign]
        trainer.span_loss = faulty
    return train.main(words)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    words = ["--model_name_or_path", str(tiny_model("bert", folder / "bert")), "--lora_dropout", "0"]
    words += ["--train_file", str(tiny_squad(folder / "train.json", 20, seed=1)), "--eval_steps", "no"]
    words += ["--store_dir", str(folder / "store"), "--max_seq_length", "64", "--doc_stride", "16"]
    words += ["--max_train_steps", str(NUM_STEPS), "--checkpointing_steps", "1", "--resume_from_checkpoint", "auto"]
    return [*words, "--global_batch_size", "12", "--max_tokens_per_device", "1024", "--disable_tqdm"]


def train(folder: Path, words: list[str], fault: str | None = None, at_step: int = 0) -> tuple[list[int | None], str]:
    body = partial(train_with_a_fault, fault, at_step, [*words, "--output_dir", str(folder / "out")])
    group = start_ranks(body, folder / "log", num_processes=2)
    return group.wait(), group.text()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "out" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    codes, text = train(folder, words)
    assert codes == [0, 0], text
    assert len(losses(folder)) == NUM_STEPS
    return folder


@pytest.mark.parametrize("at_step", range(1, NUM_STEPS + 1))
def test_a_bad_step_leaves_nothing_behind(at_step: int, words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """The checkpoint before it goes on, without the fault, to what there is without any, bit for bit."""
    fault = "not finite" if at_step % 2 else "stop"
    codes, text = train(tmp_path, words, fault, at_step)
    done = at_step - 1 if fault == "not finite" else at_step
    if fault == "not finite":
        assert codes == [1, 1], text
        assert f"step {at_step}: the loss of" in text
        assert "of 12 features is not finite: q" in text
        assert text.count("the run stops") == 1
    else:
        assert codes == [85, 85], text
        assert f"stopped by SIGTERM after step {at_step}" in text
    assert losses(tmp_path) == losses(undisturbed)[:done] if done else not (tmp_path / "out" / "checkpoints").exists()
    codes, text = train(tmp_path, words)
    assert codes == [0, 0], text
    assert losses(tmp_path) == losses(undisturbed)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / "out" / name).read_bytes()


@pytest.mark.parametrize("at_step", [1, 3])
def test_a_step_without_memory_is_taken_again_whole(
    at_step: int, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    codes, text = train(tmp_path, words, "out of memory", at_step)
    assert codes == [0, 0], text
    assert f"out of memory in step {at_step}: it is repeated with 512 tokens per device" in text
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed), rtol=1e-5)
    found, wanted = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (tmp_path, undisturbed))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
