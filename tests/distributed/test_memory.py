"""A rank that runs out of memory: the step is repeated by all, with the same features and half the budget."""

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launching import lines, run, torchrun
from tests.tiny import tiny_model, tiny_squad

pytestmark = pytest.mark.distributed

SMALL_MEMORY = """
import os, sys, torch
import qa_dist.training as training
limit = int(sys.argv.pop(1))
loss = training.span_loss
def limited(start_T, end_T, lengths, labels_B2):
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    if int(os.environ.get("RANK", "0")) == last and sum(lengths) > limit:
        raise torch.OutOfMemoryError("simulated")
    return loss(start_T, end_T, lengths, labels_B2)
training.span_loss = limited
from qa_dist.train import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    words = ["--model_name_or_path", str(tiny_model("bert", folder / "bert")), "--lora_dropout", "0"]
    words += ["--train_file", str(tiny_squad(folder / "train.json", 20, seed=1)), "--eval_steps", "no"]
    words += ["--store_dir", str(folder / "store"), "--max_seq_length", "64", "--doc_stride", "16"]
    return [*words, "--num_train_epochs", "2", "--global_batch_size", "12", "--disable_tqdm"]


def train(folder: Path, num_processes: int, limit: int, words: list[str]) -> tuple[int, str, list[float]]:
    folder.mkdir(exist_ok=True)
    (folder / "small_memory.py").write_text(SMALL_MEMORY, encoding="utf-8")
    command = torchrun(num_processes, "small_memory", [str(limit), *words, "--output_dir", str(folder / "out")])
    done = run(command, PYTHONPATH=f"{folder}:{Path(__file__).parents[2]}")
    log = folder / "out" / "metrics.jsonl"
    losses = [line["loss"] for line in lines(log)] if log.exists() else []
    return done.returncode, done.stderr, losses


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_step_is_repeated_with_half_the_budget(num_processes: int, words: list[str], tmp_path: Path) -> None:
    code, stderr, plenty = train(tmp_path / "plenty", num_processes, 10**6, words)
    assert code == 0, stderr
    code, stderr, scarce = train(tmp_path / "scarce", num_processes, 200, words)
    assert code == 0, stderr
    assert "out of memory in step 1: it is repeated with 512 tokens per device" in stderr
    assert len(scarce) == len(plenty) > 4
    np.testing.assert_allclose(scarce, plenty, rtol=1e-5)


def test_without_memory_for_one_feature_the_run_says_what_to_do(words: list[str], tmp_path: Path) -> None:
    code, stderr, losses = train(tmp_path, 2, 10, words)
    assert code != 0
    assert "out of memory with a single feature of 64 tokens at a time; use --gradient_checkpointing" in stderr
    assert losses == []
