"""`--dry_run` behind a launcher: all ranks take part, rank 0 alone prints, nothing is written."""

import re
from pathlib import Path

import pytest

from tests.distributed.forking import start
from tests.tiny import tiny_training

pytestmark = pytest.mark.distributed


def test_two_ranks_plan_together_and_one_prints(tmp_path: Path) -> None:
    words = [*tiny_training(tmp_path, 12, longest=40), "--dry_run", "--output_dir", str(tmp_path / "out")]
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
