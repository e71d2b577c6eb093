"""`--dry_run` behind a launcher: all ranks take part, rank 0 alone prints, nothing is written."""

import re
from pathlib import Path

import pytest

from tests.distributed.forking import start
from tests.tiny import tiny_model, tiny_squad

pytestmark = pytest.mark.distributed


def test_two_ranks_plan_together_and_one_prints(tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(tiny_model("bert", tmp_path / "bert")), "--dry_run"]
    words += ["--train_file", str(tiny_squad(tmp_path / "train.json", 12, seed=1, longest=40)), "--eval_steps", "no"]
    words += ["--store_dir", str(tmp_path / "store"), "--max_seq_length", "64", "--doc_stride", "16"]
    words += ["--output_dir", str(tmp_path / "out")]
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    group = start(words, tmp_path / "log", num_processes=2, environment=sharded)
    assert group.wait() == [0, 0], group.text()
    text = group.text()
    assert not (tmp_path / "out").exists()
    assert text.count("dry run: nothing was trained") == 1
    assert "2 processes on cpu, fsdp2: up to 1,024 tokens at once on each" in text
    assert re.search(r"MiB of each rank +fsdp2", text)
    assert start(
        [*words, "--optim", "adamw_8bit"], tmp_path / "again", num_processes=2, environment=sharded
    ).wait() == [
        2,
        2,
    ]
