"""When one rank fails, all end at once, and the log says which one it was."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import forking
from tests.distributed.launching import run, torchrun
from tests.refusals import contents
from tests.tiny import tiny_model, tiny_squad
from tests.unit.trained import trained_folder

pytestmark = pytest.mark.distributed


def write_module(folder: Path, body: str) -> None:
    """A module `broken_train` that runs qa_dist.train with something broken in it."""
    start = "from qa_dist.train import main\nsys.exit(main())\n"
    text = f"import sys\nfrom qa_dist.training import loop, trainer\n{body}\n{start}"
    (folder / "broken_train.py").write_text(text, encoding="utf-8")


def start(folder: Path, num_processes: int) -> tuple[int, str, float]:
    words = ["--model_name_or_path", str(tiny_model("bert", folder / "bert"))]
    words += ["--train_file", str(tiny_squad(folder / "train.json", 40, seed=1)), "--eval_steps", "no"]
    words += ["--store_dir", str(folder / "store"), "--output_dir", str(folder / "out")]
    words += ["--max_seq_length", "64", "--doc_stride", "16", "--num_train_epochs", "50"]
    began = time.monotonic()
    done = run(torchrun(num_processes, "broken_train", words), PYTHONPATH=f"{folder}:{Path(__file__).parents[2]}")
    return done.returncode, done.stderr, time.monotonic() - began


def test_a_rank_that_raises_ends_all_and_is_named(tmp_path: Path) -> None:
    body = """
step = trainer.Trainer.step
def failing(self, number):
    if self.ranks.rank == 1 and number == 3:
        raise RuntimeError("the disk of this node has gone")
    return step(self, number)
trainer.Trainer.step = failing
"""
    write_module(tmp_path, body)
    code, stderr, seconds = start(tmp_path, 2)
    assert code != 0
    assert "[rank 1] failed: RuntimeError: the disk of this node has gone" in stderr, stderr
    assert seconds < 120, "the other rank must not wait for a time-out"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_features(tmp_path: Path, num_processes: int) -> None:
    body = """
loss = trainer.span_loss
calls = 0
def spoiled(*arguments):
    global calls
    calls += 1
    found = loss(*arguments)
    return found * float("nan") if calls == 4 else found
trainer.span_loss = spoiled
"""
    write_module(tmp_path, body)
    code, stderr, _ = start(tmp_path, num_processes)
    assert code != 0
    assert "step 4: the loss of" in stderr, stderr
    assert "of 16 features is not finite: q" in stderr, stderr
    assert stderr.count("the run stops") == 1
    assert num_processes == 2 or "Traceback" not in stderr
    assert "#0" in stderr or "#1" in stderr, stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_rank_with_another_base_model_is_named(tmp_path: Path) -> None:
    body = """
import os
import torch
build = loop.build_trainable
def other(*arguments, **options):
    model, report = build(*arguments, **options)
    if os.environ["RANK"] == "1":
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-6
    return model, report
loop.build_trainable = other
"""
    write_module(tmp_path, body)
    code, stderr, _ = start(tmp_path, 2)
    assert code != 0
    assert stderr.count("rank 1 starts from other weights than rank 0") == 1, stderr
    assert "exitcode  : 2" in stderr


def test_a_mistake_of_the_user_is_said_once_and_ends_with_code_2(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "out"), "--train_file", str(tmp_path / "missing.json")]
    words += ["--model_name_or_path", str(tiny_model("bert", tmp_path / "bert")), "--eval_steps", "no"]
    words += ["--max_seq_length", "64", "--doc_stride", "16"]
    done = run(torchrun(2, "qa_dist.train", words))
    assert done.returncode != 0
    assert done.stderr.count("missing.json") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr


def evaluate_with_a_broken_rank(words: list[str], rank: int) -> int:
    """Rank 1 fails in its second batch, when rank 0 has received the first."""
    from qa_dist import evaluate
    from qa_dist.evaluation import loop as evaluation

    real, calls = evaluation.span_loss, iter(range(1, 1000))

    def failing(*arguments: Any) -> Any:
        if rank == 1 and next(calls) == 2:
            raise RuntimeError("the memory of this node has gone")
        return real(*arguments)

    evaluation.span_loss = failing
    return evaluate.main(words)


def test_a_rank_that_fails_in_an_evaluation_leaves_the_earlier_logits(tmp_path: Path) -> None:
    trained = trained_folder(tmp_path / "trained")
    results = tmp_path / "results"
    results.mkdir()
    (results / "logits.npy").write_bytes(b"earlier")
    words = ["--adapter", str(trained / "adapter"), "--results_dir", str(results)]
    words += ["--gather", "logits", "--eval_tokens_per_device", "64"]
    group = forking.start_ranks(partial(evaluate_with_a_broken_rank, words), tmp_path / "log", num_processes=2)
    assert group.wait() == [1, 1]
    assert "[rank 1] failed: RuntimeError: the memory of this node has gone" in group.text()
    assert contents(results) == {"logits.npy": b"earlier"}
