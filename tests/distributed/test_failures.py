"""When one rank fails, all end at once, and the log says which one it was."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import forking
from tests.distributed.launching import ROOT, run, torchrun
from tests.refusals import contents
from tests.support import forked_python
from tests.tiny import tiny_training
from tests.unit.trained import trained_folder

pytestmark = pytest.mark.distributed


def words(folder: Path) -> list[str]:
    """A run of a while, whose inputs are made in `folder`."""
    return [*tiny_training(folder, 40), "--output_dir", str(folder / "out"), "--num_train_epochs", "50"]


BROKEN = """
import sys
from qa_dist.train import main
from qa_dist.training.trainer import Trainer
step = Trainer.step
def failing(self, number):
    if self.ranks.rank == 1 and number == 3:
        raise RuntimeError("the disk of this node has gone")
    return step(self, number)
Trainer.step = failing
sys.exit(main())
"""


def test_a_rank_that_raises_ends_all_and_is_named(tmp_path: Path) -> None:
    """Under a real launcher, which ends the ranks that are left."""
    (tmp_path / "broken_train.py").write_text(BROKEN, encoding="utf-8")
    began = time.monotonic()
    _, *launched = torchrun(2, "broken_train", words(tmp_path))
    variables = forked_python.variables(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = run([forked_python.program("python"), *launched], **variables)
    assert done.returncode != 0
    assert "[rank 1] failed: RuntimeError: the disk of this node has gone" in done.stderr, done.stderr
    assert time.monotonic() - began < 120, "the other rank must not wait for a time-out"


def train_with_a_spoiled_loss(words: list[str], rank: int) -> int:
    """The fourth loss of every rank is not finite."""
    from qa_dist import train
    from qa_dist.model import rdrop

    real, calls = rdrop.span_loss, iter(range(1, 1000))

    def spoiled(*arguments: Any) -> Any:
        return real(*arguments) * (float("nan") if next(calls) == 4 else 1)

    rdrop.span_loss = spoiled
    return train.main(words)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_features(tmp_path: Path, num_processes: int) -> None:
    body = partial(train_with_a_spoiled_loss, words(tmp_path))
    group = forking.start_ranks(body, tmp_path / "log", num_processes=num_processes)
    assert group.wait() == [1] * num_processes
    text = group.text()
    assert "step 4: the loss of" in text, text
    assert "of 16 features is not finite: q" in text, text
    assert text.count("the run stops") == 1
    assert "Traceback" not in text
    assert "#0" in text or "#1" in text, text
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def train_from_other_weights(words: list[str], rank: int) -> int:
    """A weight of rank 1's base model differs by a millionth."""
    from qa_dist import train
    from qa_dist.training import loop

    build = loop.build_trainable

    def other(*arguments: Any, **options: Any) -> Any:
        model, report = build(*arguments, **options)
        if rank == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1e-6
        return model, report

    loop.build_trainable = other
    return train.main(words)


def test_a_rank_with_another_base_model_is_named(tmp_path: Path) -> None:
    body = partial(train_from_other_weights, words(tmp_path))
    group = forking.start_ranks(body, tmp_path / "log", num_processes=2)
    assert group.wait() == [2, 2]
    assert group.text().count("rank 1 starts from other weights than rank 0") == 1, group.text()


def test_a_mistake_of_the_user_is_said_once_and_ends_with_code_2(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.json")
    body = partial(forking.call_main, "qa_dist.train", [*words(tmp_path), "--train_file", missing])
    with forking.torchrun_store() as meeting:
        group = forking.start_ranks(body, tmp_path / "log", num_processes=2, environment=meeting)
        # The other one finds the same, or its peer gone.
        assert group.wait() in ([2, 2], [2, 1]), group.text()
    assert group.text().count("missing.json") == 1, group.text()


def evaluate_with_a_broken_rank(words: list[str], rank: int) -> int:
    """Rank 1 fails in its second batch, when rank 0 has received the first."""
    from qa_dist import evaluate
    from qa_dist.evaluation import passes

    real, calls = passes.span_loss, iter(range(1, 1000))

    def failing(*arguments: Any) -> Any:
        if rank == 1 and next(calls) == 2:
            raise RuntimeError("the memory of this node has gone")
        return real(*arguments)

    passes.span_loss = failing
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
