"""A rank that runs out of memory: the step is repeated by all, with the same features and half the budget."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.forking import start_ranks
from tests.distributed.launching import lines
from tests.tiny import tiny_training

pytestmark = pytest.mark.distributed


def train_in_small_memory(limit: int, words: list[str], rank: int) -> int:
    """Train; the last rank has no memory for more than `limit` tokens at a time."""
    from qa_dist.model import rdrop
    from qa_dist.train import main

    loss, last = rdrop.span_loss, int(os.environ.get("WORLD_SIZE", "1")) - 1

    def limited(start_T: torch.Tensor, end_T: torch.Tensor, lengths: tuple[int, ...], *rest: Any) -> torch.Tensor:
        if rank == last and sum(lengths) > limit:
            raise torch.OutOfMemoryError("simulated")
        return loss(start_T, end_T, lengths, *rest)

    rdrop.span_loss = limited
    return main(words)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = [*tiny_training(tmp_path_factory.mktemp("inputs"), 20), "--lora_dropout", "0"]
    return [*words, "--num_train_epochs", "2", "--global_batch_size", "12", "--disable_tqdm"]


def train(folder: Path, num_processes: int, limit: int, words: list[str]) -> tuple[list[int | None], str, list[float]]:
    folder.mkdir(exist_ok=True)
    body = partial(train_in_small_memory, limit, [*words, "--output_dir", str(folder / "out")])
    group = start_ranks(body, folder / "log", num_processes=num_processes)
    codes = group.wait()
    log = folder / "out" / "metrics.jsonl"
    losses = [line["loss"] for line in lines(log)] if log.exists() else []
    return codes, group.text(), losses


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_step_is_repeated_with_half_the_budget(num_processes: int, words: list[str], tmp_path: Path) -> None:
    codes, text, plenty = train(tmp_path / "plenty", num_processes, 10**6, words)
    assert codes == [0] * num_processes, text
    codes, text, scarce = train(tmp_path / "scarce", num_processes, 200, words)
    assert codes == [0] * num_processes, text
    assert "out of memory in step 1: it is repeated with 512 tokens per device" in text
    assert len(scarce) == len(plenty) > 4
    np.testing.assert_allclose(scarce, plenty, rtol=1e-5)


def test_without_memory_for_one_feature_the_run_says_what_to_do(words: list[str], tmp_path: Path) -> None:
    codes, text, losses = train(tmp_path, 2, 10, words)
    assert codes == [1, 1]
    assert "out of memory with a single feature of 64 tokens at a time; use --gradient_checkpointing" in text
    assert losses == []
